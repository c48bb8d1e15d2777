-- Freeing the outbox, and its cap.

-- name: rotate
-- One message to the server, which commits by itself: the locks end with the work, even if syncd is
-- suspended meanwhile. Each statement must see the commits before it took a lock, so the BEGIN
-- before this message names its isolation level.
SET LOCAL statement_timeout = '10s';
SELECT r.freed, r.later, r.marked, r.rows, r.max_rows
FROM syncd.rotate_outbox({slot_rows}, {slot_seconds}) AS r;
COMMIT;

-- name: read_outbox_rows
SELECT syncd.outbox_rows();

-- name: read_own_part
-- Whether this consumer must rebuild, and whether the outbox keeps its oldest rows for it.
SELECT c.must_rebuild,
       (SELECT o.consumer FROM syncd.oldest_needed() AS o) IS NOT DISTINCT FROM c.name
       FROM syncd.consumers AS c WHERE c.name = %s AND c.run_id = %s;

-- name: end_must_rebuild
-- The consumer itself ends it: it has a position after which all changes are kept, or it has begun
-- to read the tables again.
UPDATE syncd.consumers SET must_rebuild = false, needs = %s::pg_snapshot
WHERE name = %s AND run_id = %s AND must_rebuild;
