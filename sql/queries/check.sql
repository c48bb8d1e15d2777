-- Statements of check and why. Each one only reads, and none waits for a lock.

-- name: limits
-- After the session's settings.
SET LOCAL statement_timeout = '10s';
SET LOCAL idle_in_transaction_session_timeout = '30s';
SET LOCAL lock_timeout = '100ms';

-- name: read_server
SELECT current_setting('server_version'), current_setting('server_version_num')::integer,
       current_user::text, pg_is_in_recovery(),
       (SELECT e.extversion FROM pg_extension AS e WHERE e.extname = 'vector');

-- name: read_encoding
SELECT current_setting('server_encoding');

-- name: read_read_only
SELECT s.setting = 'on', s.source, current_database()::text, session_user::text
FROM pg_settings AS s WHERE s.name = 'default_transaction_read_only';

-- name: read_clock
SELECT extract(epoch FROM clock_timestamp())::double precision;

-- name: read_schema_rights
-- The role that owns schema syncd, and whether the present role may use it.
SELECT pg_get_userbyid(n.nspowner)::text, has_schema_privilege(n.oid, 'USAGE')
FROM pg_namespace AS n WHERE n.nspname = 'syncd';

-- name: read_missing_rights
-- Privileges on syncd's own tables that a service needs and this role lacks. A NULL privilege
-- stands for a table that does not exist.
SELECT w.relation, CASE WHEN c.oid IS NOT NULL THEN w.privilege END
FROM (VALUES ('alembic_version', 'SELECT'), ('attachments', 'SELECT'), ('present_rules', 'SELECT'),
             ('checkpoints', 'SELECT'), ('checkpoints', 'INSERT'), ('checkpoints', 'DELETE'),
             ('consumers', 'SELECT'), ('consumers', 'INSERT'), ('consumers', 'UPDATE'),
             ('dataset_reports', 'SELECT'), ('dataset_reports', 'INSERT'),
             ('dataset_reports', 'UPDATE'), ('dataset_reports', 'DELETE'), ('doubts', 'SELECT'),
             ('layout', 'SELECT'), ('layout', 'INSERT'), ('layout', 'UPDATE'),
             ('meta', 'SELECT'), ('meta', 'INSERT'), ('meta', 'DELETE'), ('notify_mode', 'SELECT'),
             ('outbox', 'SELECT'), ('outbox_0', 'TRUNCATE'), ('outbox_1', 'TRUNCATE'),
             ('outbox_2', 'TRUNCATE'), ('outbox_id', 'SELECT'), ('outbox_limit', 'SELECT'),
             ('outbox_limit', 'UPDATE'), ('outbox_slot', 'SELECT'), ('outbox_slot', 'UPDATE'),
             ('quarantine_reports', 'SELECT'), ('quarantine_reports', 'INSERT'),
             ('quarantine_reports', 'UPDATE'), ('quarantine_reports', 'DELETE')
     ) AS w (relation, privilege)
LEFT JOIN pg_class AS c ON c.relname = w.relation AND c.relnamespace = 'syncd'::regnamespace
WHERE c.oid IS NULL
   OR NOT CASE c.relkind WHEN 'S' THEN has_sequence_privilege(c.oid, w.privilege)
          ELSE has_table_privilege(c.oid, w.privilege) END
ORDER BY 1, 2;

-- name: read_arguments
-- The arguments with which each source would be attached now.
SELECT p.id, p.arguments FROM syncd.present_rules AS p;

-- name: read_source
SELECT pg_get_userbyid(c.relowner)::text, has_table_privilege(c.oid, 'SELECT'),
       has_schema_privilege(c.relnamespace, 'USAGE'),
       row_security_active(c.oid), c.relkind <> 'p'
           AND EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhparent = c.oid),
       greatest(c.reltuples, 0)::bigint
FROM pg_class AS c WHERE c.oid = %s;

-- name: read_place
-- Present place of a source's table. First the root of which it is a partition now, and whether the
-- root is attached. Then another table, and whether that table is attached: it has the name that
-- the source's table had at attach, if the dataset was named after it. Its schema is the present
-- one or the schema at attach.
SELECT CASE WHEN c.relispartition THEN pg_partition_root(c.oid)::text END,
       EXISTS (SELECT FROM syncd.attachments AS r
               WHERE c.relispartition AND r.source = pg_partition_root(c.oid)),
       o.oid::regclass::text, EXISTS (SELECT FROM syncd.attachments AS r WHERE r.source = o.oid)
FROM syncd.attachments AS a JOIN pg_class AS c ON c.oid = a.source
LEFT JOIN pg_namespace AS n ON n.nspname = a.attached_schema
LEFT JOIN pg_class AS o ON o.relname = a.attached_name AND o.relnamespace IN (n.oid, c.relnamespace)
    AND o.oid <> c.oid
    AND o.relkind IN ('r', 'p') AND a.arguments ->> 'dataset' = quote_literal(a.attached_name)
    AND EXISTS (SELECT FROM pg_attribute AS v WHERE v.attrelid = o.oid AND v.attname = a.vector
                  AND NOT v.attisdropped)
WHERE a.id = %s
ORDER BY o.relnamespace = n.oid DESC NULLS LAST LIMIT 1;

-- name: read_unlogged
-- Tables of a source that hold rows and that a crash of the server empties.
SELECT t.relation::text FROM syncd.tables_of(%s::oid) AS t JOIN pg_class AS c ON c.oid = t.relation
WHERE c.relpersistence = 'u' AND c.relkind = 'r' ORDER BY 1;

-- name: read_stray_triggers
-- Triggers that call a source's functions from another table: they came with a dump, or with a
-- partition that was detached.
SELECT t.tgrelid::regclass::text, t.tgname::text
FROM syncd.attachments AS a JOIN pg_proc AS f ON f.pronamespace = 'syncd'::regnamespace
    AND f.proname LIKE format('capture\_%%s\_%%%%', a.id)
JOIN pg_trigger AS t ON t.tgfoid = f.oid AND t.tgparentid = 0
WHERE a.id = %s AND t.tgrelid <> a.source
  AND NOT EXISTS (SELECT FROM syncd.tables_of(a.source) AS s WHERE s.relation = t.tgrelid)
  ORDER BY 1, 2;

-- name: read_missing_triggers
SELECT m.relation::regclass::text, m.trigger::text, m.problem FROM syncd.missing_triggers(%s) AS m
WHERE m.problem <> 'unwanted';

-- name: read_apply_workers
-- Replication origins that are not of PostgreSQL's own subscriptions: another tool's apply worker
-- has them. Only for a table with statement triggers.
SELECT o.roname FROM pg_replication_origin AS o
WHERE o.roname !~ '^pg_[0-9_]+$' AND NOT syncd.fires_per_row(%s::oid::regclass) ORDER BY 1 LIMIT 3;

-- name: read_key
-- Whether a unique index has exactly the key's columns in their order; the columns that may be NULL
-- now; the columns that no longer exist.
SELECT EXISTS (
           SELECT FROM pg_index AS i
           WHERE i.indrelid = %(source)s::oid AND i.indisunique AND i.indisvalid
             AND i.indpred IS NULL AND i.indexprs IS NULL
             AND (SELECT array_agg(a.attname::text ORDER BY k.place)
                  FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, place)
                  JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
                  WHERE k.place <= i.indnkeyatts) = %(key)s::text[]),
       ARRAY(SELECT n.name FROM unnest(%(key)s::text[]) AS n (name)
             WHERE EXISTS (SELECT FROM pg_attribute AS a
                           WHERE a.attrelid = %(source)s::oid AND a.attname = n.name
                             AND NOT a.attnotnull
                           AND NOT a.attisdropped)),
       ARRAY(SELECT n.name FROM unnest(%(key)s::text[]) AS n (name)
             WHERE NOT EXISTS (SELECT FROM pg_attribute AS a
                               WHERE a.attrelid = %(source)s::oid AND a.attname = n.name
                                 AND NOT a.attisdropped));

-- name: read_vector_column
SELECT format_type(a.atttypid, a.atttypmod) FROM pg_attribute AS a
WHERE a.attrelid = %s::oid AND a.attname = %s AND a.attnum > 0 AND NOT a.attisdropped;

-- name: read_vector_candidates
SELECT a.attname FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
WHERE a.attrelid = %s::oid AND a.attnum > 0 AND NOT a.attisdropped
  AND (a.atttypid IN ('real[]'::regtype, 'double precision[]'::regtype)
       OR t.typname IN ('vector', 'halfvec')) ORDER BY a.attnum;

-- name: has_rows
SELECT EXISTS (SELECT FROM {source}),
       EXISTS (SELECT FROM {source} WHERE {live} AND {vector} IS NOT NULL);

-- name: sample_dimensions
SELECT syncd_s.syncd_project, syncd_s.syncd_dataset, syncd_s.syncd_dimension, count(*)
FROM (SELECT {project} AS syncd_project, {dataset} AS syncd_dataset, {dimension} AS syncd_dimension
      FROM {source} WHERE {live} AND {vector} IS NOT NULL LIMIT 1000) AS syncd_s
GROUP BY 1, 2, 3 ORDER BY 1, 2, 4 DESC;

-- name: dimension_of_array
cardinality({vector});

-- name: dimension_of_bytes
octet_length({vector}) / 4;

-- name: dimension_of_text
-- For pgvector's types: their own functions may be in any schema.
array_length(string_to_array({vector}::text, ','), 1);

-- name: read_notification_queue
-- Share of the server's notification queue that is full, and the session that most likely keeps it
-- full. The server does not show which sessions listen. A listener keeps the notifications that it
-- has not read, and it reads none during a transaction.
SELECT q.usage, a.pid, a.datname::text, a.usename::text, a.application_name, a.state,
       left(a.query, 200),
       extract(epoch FROM clock_timestamp() - a.xact_start)::double precision, a.xact_start::text
FROM pg_notification_queue_usage() AS q (usage)
LEFT JOIN pg_stat_activity AS a ON a.backend_type = 'client backend' AND a.xact_start IS NOT NULL
    AND a.pid <> pg_backend_pid()
ORDER BY coalesce(a.state LIKE 'idle%%', false) DESC, a.xact_start LIMIT 1;

-- name: read_notify
SELECT m.last_value, current_setting('max_prepared_transactions')::integer
FROM syncd.notify_mode AS m;

-- name: read_outbox
SELECT l.max_rows,
       pg_relation_size('syncd.outbox_0') + pg_relation_size('syncd.outbox_1')
           + pg_relation_size('syncd.outbox_2')
FROM syncd.outbox_limit AS l;

-- name: read_consumers
-- All consumers, first the one that needs the oldest rows of the outbox.
SELECT c.name, c.state, c.lag_rows, c.lag_seconds,
       extract(epoch FROM clock_timestamp() - c.reported_at)::double precision,
       extract(epoch FROM clock_timestamp() - c.checkpoint_at)::double precision,
       (SELECT min(pg_snapshot_xmin(k.snapshot)::text::bigint) FROM syncd.checkpoints AS k
        WHERE k.consumer = c.name),
       c.shard, c.layout, c.replica, c.address, (SELECT l.shards FROM syncd.layout AS l)
FROM syncd.consumers AS c ORDER BY 7 NULLS FIRST, 1;

-- name: read_quarantine
SELECT q.dataset, q.reason, count(*), (array_agg(q.key ORDER BY q.since, q.key))[1:3]
FROM syncd.quarantine_reports AS q
WHERE q.consumer = %s GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2;

-- name: read_exclusive_locks
-- Sessions that hold or wait for the lock that keeps syncd from reading. A waiting session stops us
-- too: we queue behind it. syncd's own sessions release their locks by themselves.
SELECT l.relation::regclass::text, l.pid, l.granted,
       ARRAY(SELECT b.pid FROM unnest(pg_blocking_pids(l.pid)) AS b (pid)
             WHERE NOT EXISTS (SELECT FROM pg_stat_activity AS o
                               WHERE o.pid = b.pid AND o.application_name LIKE 'syncd/%%')),
       a.usename::text, a.application_name, a.state, left(a.query, 200),
       extract(epoch FROM clock_timestamp() - a.xact_start)::double precision, a.xact_start::text
FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.relation = ANY (%s::oid[])
  AND l.pid <> pg_backend_pid()
  AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
ORDER BY l.granted DESC, a.xact_start;

-- name: read_writers
-- Open transactions that have written to a source. The state and the start of another role's
-- session are NULL without pg_read_all_stats.
SELECT a.pid, a.usename::text, a.application_name, a.state, left(a.query, 200),
       extract(epoch FROM clock_timestamp() - a.xact_start)::double precision,
       extract(epoch FROM clock_timestamp() - a.state_change)::double precision, a.xact_start::text,
       array_agg(DISTINCT l.relation::regclass::text)
FROM pg_locks AS l JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.granted
  AND l.mode NOT IN ('AccessShareLock', 'RowShareLock', 'AccessExclusiveLock')
  AND l.relation = ANY (%s::oid[])
  AND l.pid <> pg_backend_pid()
  AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
GROUP BY 1, 2, 3, 4, 5, 6, 7, 8 ORDER BY 6 DESC NULLS LAST;

-- name: read_oldest_transactions
SELECT a.pid, a.datname::text, a.usename::text, a.application_name, a.state, left(a.query, 200),
       extract(epoch FROM clock_timestamp() - a.xact_start)::double precision, a.xact_start::text
FROM pg_stat_activity AS a
WHERE (a.backend_xid IS NOT NULL OR a.backend_xmin IS NOT NULL) AND a.datname IS NOT NULL
  AND a.pid <> pg_backend_pid()
  AND a.backend_type IS DISTINCT FROM 'autovacuum worker'
ORDER BY a.xact_start NULLS LAST LIMIT 3;

-- name: read_prepared_transactions
-- Each one with the sources that it has written to or locked. A prepared transaction's locks have
-- no pid.
SELECT x.gid, x.owner::text, x.database::text,
       extract(epoch FROM clock_timestamp() - x.prepared)::double precision, x.prepared::text,
       ARRAY(SELECT DISTINCT l.relation::regclass::text FROM pg_locks AS t
             JOIN pg_locks AS l ON l.virtualtransaction = t.virtualtransaction
             WHERE t.locktype = 'transactionid' AND t.transactionid = x.transaction
               AND t.pid IS NULL AND l.pid IS NULL
               AND l.locktype = 'relation' AND l.relation = ANY (%s::oid[])
               AND l.mode NOT IN ('AccessShareLock', 'RowShareLock')
               AND l.database = (SELECT d.oid FROM pg_database AS d
                                 WHERE d.datname = current_database()))
FROM pg_prepared_xacts AS x ORDER BY x.prepared;

-- name: read_leaves
-- The sources and their partitions.
SELECT s.source::bigint, p.relid::oid::bigint
FROM unnest(%s::oid[]) AS s (source), pg_partition_tree(s.source::regclass) AS p;

-- name: count_waiting_rows
-- Outbox rows of a source that its position does not include, up to a bound.
SELECT count(*) FROM (
    SELECT FROM syncd.outbox AS o
    WHERE o.source = %(source)s AND o.xid >= pg_snapshot_xmin(%(snapshot)s::pg_snapshot)
      AND NOT pg_visible_in_snapshot(o.xid, %(snapshot)s::pg_snapshot) LIMIT 100000) AS waiting;

-- name: read_search
-- Whether syncd.connect_search has been called, and whether this role may search.
SELECT EXISTS (SELECT FROM pg_catalog.pg_foreign_server WHERE srvname = 'syncd_search'),
       pg_catalog.has_function_privilege(
           'syncd.ask(text,text,text,integer,jsonb,real,double precision,boolean)', 'EXECUTE'),
       (SELECT pg_catalog.pg_get_userbyid(nspowner) FROM pg_catalog.pg_namespace
        WHERE nspname = 'syncd');

-- name: try_search
-- No dataset has an empty name: the service's error proves that it was asked.
SELECT key FROM syncd.search('', '[0]'::pg_catalog.text);
