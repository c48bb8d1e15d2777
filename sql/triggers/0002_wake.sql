-- Wake the consumer as in revision 0001, unless the server's notification queue is half full: if
-- the queue is full, a transaction that has notified fails at COMMIT. The question costs about a
-- microsecond, and only the winner of the guard asks it. It also frees the notifications that all
-- listeners have read.
CREATE OR REPLACE FUNCTION syncd.wake() RETURNS void
LANGUAGE plpgsql
AS $function$
BEGIN
    IF pg_try_advisory_xact_lock(8317708086) THEN
        PERFORM pg_notify('syncd', '')
        FROM syncd.notify_mode AS m
        WHERE (m.last_value = 2 OR m.last_value = 1
               AND current_setting('max_prepared_transactions') = '0')
          AND pg_notification_queue_usage() < 0.5;
    END IF;
END
$function$;
