-- The consumer's own rows, and its other statements outside passes.

-- name: read_server
-- A dump is restored with its indexes last: before them some tables lack rows.
SELECT pg_is_in_recovery(), current_setting('server_version_num')::integer,
       current_setting('max_prepared_transactions')::integer,
       to_regclass('syncd.alembic_version') IS NOT NULL
           AND to_regclass('syncd.meta_one_row') IS NOT NULL, current_setting('server_encoding');

-- name: read_revision
SELECT version_num FROM syncd.alembic_version;

-- name: read_identity
-- The row is written once. If its xmin is not its own transaction, the database was restored from a
-- dump.
SELECT m.incarnation::text, m.xmin::text::bigint = m.xid::text::bigint % 4294967296
FROM syncd.meta AS m;

-- name: lock_identity
SET LOCAL idle_in_transaction_session_timeout = '30s';
-- One consumer at a time; syncd.token() can still read.
LOCK TABLE syncd.meta IN EXCLUSIVE MODE;

-- name: lock_outbox
-- Without waiting: writers would queue behind us.
LOCK TABLE syncd.outbox IN ACCESS EXCLUSIVE MODE NOWAIT;

-- name: forget_outbox
TRUNCATE syncd.outbox;

-- name: forget_freed
-- Snapshots of another cluster have no meaning here.
UPDATE syncd.outbox_limit SET freed = NULL;

-- name: forget_needs
UPDATE syncd.consumers SET needs = DEFAULT, must_rebuild = false;

-- name: forget_outbox_rows
-- For an outbox with an open writer. Its rows and later writers' rows are this cluster's: they
-- stay.
DELETE FROM syncd.outbox;

-- name: forget_checkpoints
DELETE FROM syncd.checkpoints;

-- name: forget_identity
DELETE FROM syncd.meta;

-- name: doubt_identity
-- The next reader finds a restored copy, and removes the other cluster's ids.
DELETE FROM syncd.meta;
INSERT INTO syncd.meta (xid) VALUES ('3');

-- name: new_identity
INSERT INTO syncd.meta DEFAULT VALUES;

-- name: take_consumer_name
-- From now on the outbox keeps the rows that this consumer needs: all rows since the checkpoint
-- from which it may start. For a new consumer, and for one that must rebuild: all rows since now.
INSERT INTO syncd.consumers AS c (name, run_id) VALUES (%s, %s)
ON CONFLICT (name) DO UPDATE
SET run_id = excluded.run_id, started_at = now(), reported_at = now(),
    state = CASE WHEN c.must_rebuild THEN 'must_rebuild' ELSE 'catching_up' END,
    needs = CASE WHEN c.must_rebuild THEN excluded.needs ELSE c.needs END, must_rebuild = false
RETURNING state = 'must_rebuild', started_at;

-- name: keep_consumer_name
-- After a reconnect. If there is no row, or an older one than ours, the database was restored,
-- turned back, or was a standby without our row. A newer row than ours is another process's, which
-- has replaced us: it stays.
INSERT INTO syncd.consumers AS c (name, run_id, started_at) VALUES (%s, %s, %s)
ON CONFLICT (name) DO UPDATE
SET run_id = excluded.run_id, started_at = excluded.started_at, reported_at = now(),
    state = 'catching_up'
WHERE c.run_id <> excluded.run_id AND c.started_at < excluded.started_at;

-- name: set_notify_mode
SELECT pg_catalog.setval('syncd.notify_mode', %s);

-- name: read_notify_mode
SELECT last_value FROM syncd.notify_mode;

-- name: set_outbox_max_rows
UPDATE syncd.outbox_limit SET max_rows = %s;

-- name: read_freed
SELECT freed::text FROM syncd.outbox_limit;

-- name: read_registry
-- The first statement of a REPEATABLE READ transaction: the sources are read at this snapshot.
SELECT pg_current_snapshot()::text, (SELECT last_value FROM syncd.outbox_id);

-- name: read_open_writers
-- At rest: the last id of the outbox and the doubts, which move with every write; the ids of all
-- transactions that hold a lock on their own id, as open ones do, prepared ones too; and those of
-- them that have written to the outbox or moved syncd.doubts. A writer that loses the guard wakes
-- no consumer at its commit. A transaction that a pass's snapshot saw open and that is not among
-- them has ended since. Ids are 32 bits wide here.
WITH held AS MATERIALIZED (
    SELECT l.locktype, l.virtualtransaction, l.transactionid FROM pg_locks AS l
    WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock'
       OR l.locktype = 'relation' AND l.mode = 'RowExclusiveLock'
          AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
          AND l.relation IN ('syncd.outbox'::regclass, 'syncd.outbox_0'::regclass,
                             'syncd.outbox_1'::regclass, 'syncd.outbox_2'::regclass,
                             'syncd.doubts'::regclass))
SELECT (SELECT o.last_value FROM syncd.outbox_id AS o),
       (SELECT d.last_value FROM syncd.doubts AS d),
       coalesce(array_agg(h.transactionid::text::bigint), '{}'),
       coalesce(array_agg(h.transactionid::text::bigint)
                FILTER (WHERE EXISTS (SELECT FROM held AS w WHERE w.locktype = 'relation'
                                      AND w.virtualtransaction = h.virtualtransaction)), '{}')
FROM held AS h WHERE h.locktype = 'transactionid';

-- name: read_doubters
-- Before a pass's snapshot: the ids of the open transactions, prepared ones too, that have moved
-- syncd.doubts. Of each the oldest id that it holds, since later ones are its savepoints'.
WITH held AS MATERIALIZED (
    SELECT l.locktype, l.virtualtransaction, l.transactionid FROM pg_locks AS l
    WHERE l.locktype = 'transactionid' AND l.mode = 'ExclusiveLock'
       OR l.locktype = 'relation' AND l.mode = 'RowExclusiveLock'
          AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
          AND l.relation = 'syncd.doubts'::regclass)
SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint
           + age(pg_snapshot_xmax(pg_current_snapshot())::xid) - max(age(t.transactionid))
FROM held AS d JOIN held AS t USING (virtualtransaction)
WHERE d.locktype = 'relation' AND t.locktype = 'transactionid' GROUP BY virtualtransaction;

-- name: read_doubts
SELECT d.last_value FROM syncd.doubts AS d;

-- name: read_last_outbox_id
SELECT o.last_value, d.last_value FROM syncd.outbox_id AS o, syncd.doubts AS d;

-- name: take_guard
-- While this session holds the guard no writer notifies: the consumer is awake, and a NOTIFY would
-- only serialise commits. It is not taken if another consumer may be asleep.
SELECT pg_try_advisory_lock(8317708086)
WHERE NOT EXISTS (SELECT FROM syncd.consumers AS c
                  WHERE c.name <> %s AND c.reported_at > now() - interval '1 minute');

-- name: release_guard
SELECT pg_advisory_unlock(8317708086);


-- name: listen
LISTEN syncd;

-- name: ping
SELECT 1;

-- name: durable_limits
-- These limits and the next ones follow BEGIN and the session's settings. They end a transaction
-- whose service is suspended: its locks would keep the outbox from being freed. Other sessions hold
-- the consumers' rows for moments; on a busy machine that is longer than a pass waits for a table.
SET LOCAL synchronous_commit = on;
SET LOCAL lock_timeout = '5s';
SET LOCAL statement_timeout = '30s';
SET LOCAL idle_in_transaction_session_timeout = '30s';

-- name: start_limits
-- Shorter than a start may take: a start that was given up must not take the name later.
SET LOCAL statement_timeout = '20s';
SET LOCAL idle_in_transaction_session_timeout = '30s';

-- name: report_limits
SET LOCAL synchronous_commit = off;
SET LOCAL statement_timeout = '30s';
SET LOCAL idle_in_transaction_session_timeout = '30s';

-- name: write_nonce
INSERT INTO syncd.checkpoints (nonce, consumer, snapshot) VALUES (%s, %s, %s::pg_snapshot)
RETURNING xid::text;

-- name: forget_old_nonces
-- Two checkpoints are kept on disk, and no newer ones are saved while it is full. A few more rows
-- cost nothing: they let syncd recognise an older copy of the directory.
DELETE FROM syncd.checkpoints
WHERE consumer = %(consumer)s AND NOT nonce = ANY (%(kept)s::uuid[])
  AND nonce NOT IN (SELECT c.nonce FROM syncd.checkpoints AS c WHERE c.consumer = %(consumer)s
                    ORDER BY c.xid DESC LIMIT 4);

-- name: note_needs
-- The oldest position of the checkpoints on disk: the outbox keeps all newer rows.
UPDATE syncd.consumers SET needs = (
    SELECT c.snapshot FROM syncd.checkpoints AS c
    WHERE c.consumer = %(consumer)s AND c.nonce = ANY (%(kept)s::uuid[])
    ORDER BY pg_snapshot_xmax(c.snapshot), (SELECT count(*) FROM pg_snapshot_xip(c.snapshot)) DESC
    LIMIT 1)
WHERE name = %(consumer)s
  AND EXISTS (SELECT FROM syncd.checkpoints AS c
              WHERE c.consumer = %(consumer)s AND c.nonce = ANY (%(kept)s::uuid[]));

-- name: note_checkpoint
UPDATE syncd.consumers SET checkpoint_at = now() WHERE name = %s AND run_id = %s;

-- name: has_nonce
SELECT 1 FROM syncd.checkpoints AS c
WHERE c.nonce = %s AND c.xid = %s::xid8
  AND c.xmin::text::bigint = c.xid::text::bigint %% 4294967296;

-- name: report_consumer
UPDATE syncd.consumers
SET state = %s, position = %s, lag_rows = %s, lag_seconds = %s, reported_at = now()
WHERE name = %s AND run_id = %s;

-- name: report_dataset
INSERT INTO syncd.dataset_reports (consumer, dataset, state, rows) VALUES (%s, %s, %s, %s)
ON CONFLICT (consumer, md5(dataset)) DO UPDATE SET state = excluded.state, rows = excluded.rows;

-- name: forget_dataset_reports
DELETE FROM syncd.dataset_reports WHERE consumer = %s AND NOT dataset = ANY (%s);

-- name: forget_dataset_report
DELETE FROM syncd.dataset_reports WHERE consumer = %s AND md5(dataset) = md5(%s);

-- name: report_quarantined
INSERT INTO syncd.quarantine_reports (consumer, source, dataset, key, reason, since)
VALUES (%s, %s, %s, %s, %s, %s)
ON CONFLICT (consumer, source, md5(key)) DO UPDATE
SET dataset = excluded.dataset, reason = excluded.reason, since = excluded.since;

-- name: forget_quarantined
DELETE FROM syncd.quarantine_reports WHERE consumer = %s AND source = %s AND md5(key) = md5(%s);

-- name: forget_all_quarantined
DELETE FROM syncd.quarantine_reports WHERE consumer = %s;

-- name: read_heartbeat_xid
-- In the transaction of a report: an index whose position sees this id has all earlier commits.
SELECT pg_current_xact_id()::text;
