-- Statements of verify, on its own connection, at the snapshot to which a pass has brought the
-- indexes.

-- name: begin
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;
SET TRANSACTION SNAPSHOT {snapshot};

-- name: limits
-- After the session's settings. The first FETCH of a large table may take long, so a statement has
-- no limit; the other limits still end the transaction of a suspended client.
SET LOCAL lock_timeout = '100ms';
SET LOCAL statement_timeout = 0;
SET LOCAL idle_in_transaction_session_timeout = '60s';
SET LOCAL max_parallel_workers_per_gather = 0;
SET LOCAL cursor_tuple_fraction = 1.0;
SET LOCAL jit = off;

-- name: take_turn
-- For a shard, until its transaction ends. Each shard reads the whole table, so only two of them
-- verify at a time.
SELECT CASE WHEN pg_try_advisory_xact_lock(8317708088) THEN true
            ELSE pg_try_advisory_xact_lock(8317708089) END;

-- name: is_in_the_way
-- Whether a session waits for our lock on the table: an ALTER TABLE that waits for us makes each
-- writer wait behind it.
SELECT EXISTS (SELECT FROM pg_locks AS l
               WHERE l.locktype = 'relation' AND NOT l.granted
                 AND pg_backend_pid() = ANY (pg_blocking_pids(l.pid)));

-- name: has_rows
-- mine is true, or the condition of a shard's own rows.
SELECT EXISTS (SELECT FROM {source} WHERE {mine});
