-- Freeing the outbox, and its cap.

-- name: rotate
-- One message to the server, which commits by itself: the locks do not outlive the work, even where syncd is frozen meanwhile. Each statement
-- has to see what was committed before it took a lock, so BEGIN, which comes before this, names its isolation level.
SET LOCAL statement_timeout = '10s';
SELECT r.freed, r.later, r.marked, r.rows, r.max_rows FROM syncd.rotate_outbox({slot_rows}, {slot_seconds}) AS r;
COMMIT;

-- name: read_outbox_rows
SELECT syncd.outbox_rows();

-- name: read_own_part
-- Whether this consumer has been told to rebuild, and whether it is the one that the outbox is kept for.
SELECT c.must_rebuild, (SELECT o.consumer FROM syncd.oldest_needed() AS o) IS NOT DISTINCT FROM c.name FROM syncd.consumers AS c WHERE c.name = %s AND c.run_id = %s;

-- name: end_must_rebuild
-- Said by the consumer itself, once it stands at a position whose changes are all there or has begun to read the tables again.
UPDATE syncd.consumers SET must_rebuild = false, needs = %s::pg_snapshot WHERE name = %s AND run_id = %s AND must_rebuild;
