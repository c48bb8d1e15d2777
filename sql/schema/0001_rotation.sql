-- Rotation: the outbox is freed a slot at a time, by TRUNCATE, and never makes a writer wait.
--
-- Right is whatever slot a row lands in: passes read all three. So the slot may be switched at any moment, and a writer that read the
-- number before may write to the old slot after. What matters is what is freed: a slot that nobody has open, of which every row is
-- visible in the oldest snapshot that any consumer may still start from. `freed` says so to everybody else: whoever stands at a snapshot
-- that does not see all that it sees may have lost changes, and reads the tables again. Every pass and every start look at it.

-- How many rows there are, from ids and sizes: counting would cost as much as reading them. At most too many, never by much.
CREATE FUNCTION syncd.outbox_rows() RETURNS bigint
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, syncd SET enable_seqscan = off
AS $function$
    SELECT coalesce(sum(least(greatest(s.ids, 1), s.bytes / 60)), 0)::bigint FROM (  -- no row is shorter than 60 bytes
        SELECT (SELECT o.id FROM syncd.outbox_0 AS o ORDER BY o.xid DESC, o.id DESC LIMIT 1)
               - (SELECT o.id FROM syncd.outbox_0 AS o ORDER BY o.xid, o.id LIMIT 1) + 1 AS ids, pg_relation_size('syncd.outbox_0') AS bytes
        UNION ALL
        SELECT (SELECT o.id FROM syncd.outbox_1 AS o ORDER BY o.xid DESC, o.id DESC LIMIT 1)
               - (SELECT o.id FROM syncd.outbox_1 AS o ORDER BY o.xid, o.id LIMIT 1) + 1, pg_relation_size('syncd.outbox_1')
        UNION ALL
        SELECT (SELECT o.id FROM syncd.outbox_2 AS o ORDER BY o.xid DESC, o.id DESC LIMIT 1)
               - (SELECT o.id FROM syncd.outbox_2 AS o ORDER BY o.xid, o.id LIMIT 1) + 1, pg_relation_size('syncd.outbox_2')
    ) AS s WHERE s.ids IS NOT NULL
$function$;

-- A snapshot that sees what either sees.
CREATE FUNCTION syncd.seen_by_either(a pg_snapshot, b pg_snapshot) RETURNS pg_snapshot
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT (coalesce(min(h.xid::text::bigint), m.xmax)::text || ':' || m.xmax::text || ':'
            || coalesce(string_agg(h.xid::text, ',' ORDER BY h.xid::text::bigint), ''))::pg_snapshot
    FROM (SELECT greatest(pg_snapshot_xmax(a)::text::bigint, pg_snapshot_xmax(b)::text::bigint) AS xmax) AS m
    LEFT JOIN (SELECT pg_snapshot_xip(a) AS xid UNION SELECT pg_snapshot_xip(b)) AS h
           ON NOT pg_visible_in_snapshot(h.xid, a) AND NOT pg_visible_in_snapshot(h.xid, b)
    GROUP BY m.xmax
$function$;

-- The oldest snapshot that a consumer may still start from, and whose it is. No row where nobody needs anything.
CREATE FUNCTION syncd.oldest_needed(OUT consumer text, OUT snapshot pg_snapshot)
LANGUAGE sql STABLE SET search_path = pg_catalog, syncd
AS $function$
    SELECT c.name, c.needs FROM syncd.consumers AS c WHERE NOT c.must_rebuild
    ORDER BY pg_snapshot_xmax(c.needs), (SELECT count(*) FROM pg_snapshot_xip(c.needs)) DESC, c.name LIMIT 1
$function$;

-- Switch to another slot where one is empty, and free the others where nobody needs them. It may be called by anybody at any time, as a
-- transaction of its own: it holds locks that must not wait for the rest of a longer one. It runs with the rights of syncd's owner, since only
-- an owner may truncate and the role that serves need not be one; what it does is safe whoever calls it.
--
-- Over the cap, the slowest consumer is told to rebuild; the next one not before the others have had the time to save a checkpoint.
-- later: a slot could not be freed because somebody has it open, a writer, a pass or pg_dump. marked: who was told to rebuild.
CREATE FUNCTION syncd.rotate_outbox(slot_rows bigint, slot_seconds double precision,
                                    OUT freed integer, OUT later boolean, OUT marked text, OUT rows bigint, OUT max_rows bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    current_slot integer := (SELECT s.last_value FROM syncd.outbox_slot AS s);
    current_rows bigint;
    next_slot integer;
    slot integer;
    newest xid8;
    needed record;
    seen pg_snapshot;
    needed_by_someone boolean;
BEGIN
    freed := 0;
    later := false;
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE EXCEPTION 'syncd.rotate_outbox must see what others have committed meanwhile' USING ERRCODE = 'invalid_transaction_state',
            HINT = 'Call it at READ COMMITTED.';
    END IF;
    PERFORM set_config('synchronous_commit', 'local', true);  -- else the lock would be held until a standby has answered
    PERFORM set_config('lock_timeout', '100ms', true);
    PERFORM set_config('enable_seqscan', 'off', true);
    SELECT l.max_rows INTO STRICT max_rows FROM syncd.outbox_limit AS l;
    rows := syncd.outbox_rows();
    IF NOT pg_try_advisory_xact_lock(8317708087) THEN  -- another consumer is at it
        RETURN;
    END IF;

    -- First the switch, while no lock is held: writers go on in the next slot at once. setval is not undone by a rollback, and need not be.
    -- To either of the others: a transaction that stays open for hours pins one of them.
    SELECT s.slot INTO next_slot FROM (VALUES ((current_slot + 1) % 3, 1), ((current_slot + 2) % 3, 2)) AS s (slot, place)
    WHERE pg_relation_size(('syncd.outbox_' || s.slot)::regclass) = 0 ORDER BY s.place LIMIT 1;
    EXECUTE format('SELECT least((SELECT s.last_value FROM syncd.outbox_id AS s) '
                   '             - (SELECT o.id FROM syncd.%1$I AS o ORDER BY o.xid, o.id LIMIT 1) + 1, pg_relation_size(%2$L) / 60)',
                   'outbox_' || current_slot, 'syncd.outbox_' || current_slot) INTO current_rows;
    IF next_slot IS NOT NULL AND pg_relation_size(('syncd.outbox_' || current_slot)::regclass) > 0
       AND (current_rows >= least(slot_rows, max_rows / 4) OR rows > max_rows
            OR (SELECT l.switched_at < now() - make_interval(secs => slot_seconds) FROM syncd.outbox_limit AS l)) THEN
        UPDATE syncd.outbox_limit AS l SET switched_at = now();
        PERFORM setval('syncd.outbox_slot', next_slot);
        current_slot := next_slot;
    END IF;

    FOR step IN 1..2 LOOP
        slot := (current_slot + step) % 3;
        CONTINUE WHEN pg_relation_size(('syncd.outbox_' || slot)::regclass) = 0;
        BEGIN
            -- NOWAIT: whoever came after a lock that waits would wait as well, writers too.
            EXECUTE format('LOCK TABLE syncd.%I IN ACCESS EXCLUSIVE MODE NOWAIT', 'outbox_' || slot);
        EXCEPTION WHEN lock_not_available THEN
            later := true;
            CONTINUE;
        END;
        -- Under the lock every transaction that wrote to the slot has ended, and the statements that follow see what it wrote.
        EXECUTE format('SELECT o.xid FROM syncd.%I AS o ORDER BY o.xid DESC, o.id DESC LIMIT 1', 'outbox_' || slot) INTO newest;
        LOOP
            SELECT n.consumer, n.snapshot INTO needed FROM syncd.oldest_needed() AS n;
            needed_by_someone := false;
            IF needed.consumer IS NOT NULL AND newest IS NOT NULL THEN
                needed_by_someone := newest >= pg_snapshot_xmax(needed.snapshot);
                IF NOT needed_by_someone THEN
                    EXECUTE format('SELECT EXISTS (SELECT FROM syncd.%I AS o WHERE o.xid = ANY (ARRAY(SELECT pg_snapshot_xip($1))))',
                                   'outbox_' || slot) INTO needed_by_someone USING needed.snapshot;
                END IF;
            END IF;
            EXIT WHEN NOT needed_by_someone OR rows <= max_rows
                 OR (SELECT l.marked_at > clock_timestamp() - interval '20 seconds' FROM syncd.outbox_limit AS l);
            marked := needed.consumer;
            UPDATE syncd.outbox_limit AS l SET marked_at = clock_timestamp();
            UPDATE syncd.consumers AS c SET must_rebuild = true WHERE c.name = marked;
            DELETE FROM syncd.checkpoints AS c WHERE c.consumer = marked;
        END LOOP;
        CONTINUE WHEN needed_by_someone;
        IF newest IS NOT NULL THEN
            seen := needed.snapshot;
            IF seen IS NULL THEN  -- nobody needs anything: then the least that can be said, all up to the newest row but what is open now
                SELECT format('%s:%s:%s', coalesce(min(x.xid::text::bigint), newest::text::bigint + 1), newest::text::bigint + 1,
                              string_agg(x.xid::text, ',' ORDER BY x.xid::text::bigint))::pg_snapshot
                INTO seen FROM pg_snapshot_xip(pg_current_snapshot()) AS x (xid) WHERE x.xid <= newest;
            END IF;
            UPDATE syncd.outbox_limit AS l SET freed = CASE WHEN l.freed IS NULL THEN seen ELSE syncd.seen_by_either(l.freed, seen) END;
        END IF;
        EXECUTE format('TRUNCATE syncd.%I', 'outbox_' || slot);
        freed := freed + 1;
        rows := syncd.outbox_rows();
    END LOOP;
END
$function$;
