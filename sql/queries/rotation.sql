-- Freeing the outbox, and its cap.

-- name: begin_rotation
BEGIN ISOLATION LEVEL READ COMMITTED;
SET LOCAL statement_timeout = '10s';

-- name: read_committed
-- First in a transaction: each statement of the rotation has to see what was committed before it took a lock.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED;

-- name: rotate
SELECT r.freed, r.later, r.marked, r.rows, r.max_rows FROM syncd.rotate_outbox(%s, %s) AS r;

-- name: read_outbox_rows
SELECT syncd.outbox_rows();

-- name: read_own_part
-- Whether this consumer has been told to rebuild, and whether it is the one that the outbox is kept for.
SELECT c.must_rebuild, (SELECT o.consumer FROM syncd.oldest_needed() AS o) IS NOT DISTINCT FROM c.name FROM syncd.consumers AS c WHERE c.name = %s AND c.run_id = %s;

-- name: end_must_rebuild
-- Said by the consumer itself, once it stands at a position whose changes are all there or has begun to read the tables again.
UPDATE syncd.consumers SET must_rebuild = false, needs = %s::pg_snapshot WHERE name = %s AND run_id = %s AND must_rebuild;
