-- The statements of a pass. The caller fills in the names in braces: identifiers, expressions that
-- PostgreSQL printed, and literals. Statements with bounds of the outbox are planned once for a
-- session: the settings of a pass leave the planner only the index, whatever the bounds are, and
-- planning takes four times as long as running. Bounds of a page are literals, so that the planner
-- sees them and uses the index. The last section has the parts that one statement needs once for
-- each column, or in one of two forms.

-- name: begin_pass
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;

-- name: limits
-- They follow the session's settings.
SET LOCAL lock_timeout = '100ms';
SET LOCAL statement_timeout = '30s';
SET LOCAL idle_in_transaction_session_timeout = '30s';

-- name: lock_outbox
-- The slots are locked with it, before there is a snapshot. A slot that is freed after the snapshot
-- would look empty to it.
LOCK TABLE syncd.outbox IN ACCESS SHARE MODE;

-- name: lock_source
LOCK TABLE {source} IN ACCESS SHARE MODE;

-- name: lock_tables
-- The outbox and the sources, if all of them can be locked at once.
LOCK TABLE {tables} IN ACCESS SHARE MODE;

-- name: plan_with_keys
-- For the rows of a partitioned table: a plan that knows the keys leaves partitions out.
SET LOCAL plan_cache_mode = 'force_custom_plan';

-- name: savepoint
SAVEPOINT syncd_source;

-- name: release_savepoint
RELEASE SAVEPOINT syncd_source;

-- name: rollback_to_savepoint
ROLLBACK TO SAVEPOINT syncd_source;

-- name: commit
COMMIT;

-- name: rollback
ROLLBACK;

-- name: read_snapshot
-- The first statement of a pass that takes a snapshot: S1. It also reads the facts that the pass
-- needs before it reads rows: whether the consumer's name is still this run's, and the present
-- names and the mark of each table. A mark has a part of the catalogue's facts that is cheap to
-- read: if it is the same, the table's facts are the same. Each change of a column or a trigger is
-- another xmin. The history of the database's transactions is NULL in a restored copy that has no
-- history of its own yet. No transaction of this history has the next transaction id or a higher
-- one. The doubts are read behind the snapshot: no transaction that the snapshot sees has moved
-- them unnoticed. There is a row for each table, or one without a table: an aggregate in JSON
-- costs 0.04 ms more. Parameters: the consumer's name, and the oids.
SELECT pg_current_snapshot()::text, (SELECT last_value FROM syncd.outbox_id), pg_is_in_recovery(),
       (SELECT c.run_id::text FROM syncd.consumers AS c WHERE c.name = %s),
       (SELECT l.freed::text FROM syncd.outbox_limit AS l),
       -- as syncd.history(), which the server would plan at each call
       (SELECT left(m.incarnation::text, 8) || '.' || d.oid
        FROM syncd.meta AS m CROSS JOIN pg_database AS d
        WHERE m.xmin::text::bigint = mod(m.xid::text::bigint, 4294967296)
          AND d.datname = current_database()),
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint
           + age(pg_snapshot_xmax(pg_current_snapshot())::xid),
       (SELECT d.last_value FROM syncd.doubts AS d),
       r.oid::bigint, n.nspname, r.relname,
       concat_ws(' ', r.relkind, r.relfilenode, r.relpersistence,
                 r.relrowsecurity, r.relforcerowsecurity,
                 ARRAY(SELECT t.xmin FROM pg_attribute AS t
                       WHERE t.attrelid = r.oid AND t.attnum > 0 ORDER BY t.attnum),
                 ARRAY(SELECT t.xmin FROM pg_trigger AS t
                       WHERE t.tgrelid = r.oid ORDER BY t.tgname))
FROM (VALUES (1)) AS o
LEFT JOIN (pg_class AS r JOIN pg_namespace AS n ON n.oid = r.relnamespace)
    ON r.oid = ANY (%s::oid[]);

-- name: read_outbox_locks
-- The session that keeps the outbox, or an index of it, from being read.
SELECT l.pid, left(a.query, 100)
FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock'
  AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
  AND l.relation IN (SELECT c.oid FROM pg_class AS c
                     WHERE c.relnamespace = 'syncd'::regnamespace
                       AND starts_with(c.relname::text, 'outbox'))
ORDER BY l.granted DESC, l.pid LIMIT 1;

-- name: import_snapshot
-- After the locks and before anything that takes a snapshot.
SET TRANSACTION SNAPSHOT {snapshot};

-- name: export_snapshot
-- A transaction on another connection uses it to see the same rows.
SELECT pg_export_snapshot();

-- name: read_marked
-- Whether there is a marker that a position does not see. Transactions that the pass sees and the
-- position did not are in two ranges of the index: those in progress at the position, and those
-- that began since.
SELECT EXISTS (SELECT FROM syncd.outbox AS o WHERE o.op <> 'k' AND o.xid = ANY (%s::xid8[]))
       OR EXISTS (SELECT FROM syncd.outbox AS o WHERE o.op <> 'k' AND o.xid >= %s::xid8);

-- name: read_markers
-- The markers of some sources, in the same two ranges.
SELECT o.source, o.op::text FROM syncd.outbox AS o
WHERE o.op <> 'k' AND (o.xid = ANY (%s::xid8[]) OR o.xid >= %s::xid8)
  AND o.source = ANY (%s::integer[])
ORDER BY o.xid, o.id;

-- name: read_registry_changes
SELECT 1 FROM syncd.outbox AS o
WHERE o.op <> 'k' AND o.op IN ('a', 'd')
  AND (o.xid = ANY (%s::xid8[]) OR o.xid >= %s::xid8)
LIMIT 1;

-- name: read_keys_in_progress
-- The first page of changed keys, of transactions that were in progress at the position. This
-- statement and the next three also read the markers of all sources.
SELECT o.xid::text::bigint, o.id, o.source, o.op::text, o.key FROM syncd.outbox AS o
WHERE o.xid = ANY (%s::xid8[])
  AND (o.op <> 'k' OR o.source = ANY (%s::integer[]))
ORDER BY o.xid, o.id LIMIT %s::bigint;

-- name: read_keys_begun_since
-- The first page of changed keys, of transactions that began after the position. It has no bound on
-- (xid, id): such a bound below the range would have the index read from its beginning.
SELECT o.xid::text::bigint, o.id, o.source, o.op::text, o.key FROM syncd.outbox AS o
WHERE o.xid >= %s::xid8
  AND (o.op <> 'k' OR o.source = ANY (%s::integer[]))
ORDER BY o.xid, o.id LIMIT %s::bigint;

-- name: read_more_keys_in_progress
-- A further page. The window keeps its end: only transactions that the first page's snapshot saw.
SELECT o.xid::text::bigint, o.id, o.source, o.op::text, o.key FROM syncd.outbox AS o
WHERE o.xid = ANY (%s::xid8[]) AND (o.xid, o.id) > (%s::xid8, %s::bigint)
  AND pg_visible_in_snapshot(o.xid, %s::pg_snapshot)
  AND (o.op <> 'k' OR o.source = ANY (%s::integer[]))
ORDER BY o.xid, o.id LIMIT %s::bigint;

-- name: read_more_keys_begun_since
-- A further page.
SELECT o.xid::text::bigint, o.id, o.source, o.op::text, o.key FROM syncd.outbox AS o
WHERE o.xid >= %s::xid8 AND (o.xid, o.id) > (%s::xid8, %s::bigint)
  AND pg_visible_in_snapshot(o.xid, %s::pg_snapshot)
  AND (o.op <> 'k' OR o.source = ANY (%s::integer[]))
ORDER BY o.xid, o.id LIMIT %s::bigint;

-- name: of_shard
-- A page of changed keys for a shard: the whole page is counted, and only the shard's own keys are
-- sent. Each row begins with facts of the page: its number of rows, the number of keys with an id
-- above the given one, its last xid and id, its highest id. A page without own keys is one row.
-- Parameters after the page's: the id, and the sources that are not filtered.
WITH syncd_page (xid, id, source, op, key) AS MATERIALIZED ({page})
SELECT syncd_s.*, syncd_p.xid, syncd_p.id, syncd_p.source, syncd_p.op, syncd_p.key
FROM (SELECT count(*), count(*) FILTER (WHERE a.id > %s::bigint AND a.op = 'k'), max(a.xid),
             max(a.id) FILTER (WHERE a.xid = (SELECT max(b.xid) FROM syncd_page AS b)), max(a.id)
      FROM syncd_page AS a) AS syncd_s
LEFT JOIN syncd_page AS syncd_p
    ON syncd_p.key IS NULL OR syncd_p.source = ANY (%s::integer[]) OR {mine};

-- name: read_rows_by_key
-- This statement and the next four read live rows, with the same columns: key, project, dataset,
-- vector, fingerprint and attached columns. A row is live if the live rule says so and it has a
-- vector. A key that was asked for and is not returned is a tombstone. An index cannot name a row
-- without a key, or without a part of it, and NULLs would end the order of keys. The vector and
-- the columns are NULL if they are not wanted. OFFSET 0 keeps the planner from computing the
-- vector and the columns twice, for the row and for its fingerprint.
SELECT syncd_r.syncd_key, syncd_r.syncd_project, syncd_r.syncd_dataset,
       {sent_vector}, {fingerprint}, {sent_columns}::text
FROM (SELECT {key} AS syncd_key, {project} AS syncd_project, {dataset} AS syncd_dataset,
             {send}({vector}) AS syncd_vector, ROW({key_columns}) AS syncd_hashed,
             jsonb_build_array({columns}) AS syncd_columns
      FROM {source}
      WHERE {column} = ANY ({keys})
            AND ({key_columns}) IS NOT NULL AND {live} AND {vector} IS NOT NULL
      OFFSET 0) AS syncd_r;

-- name: read_rows_by_composite_key
-- match_columns repeats the condition for each column of a partitioned table, so that the planner
-- leaves out the partitions that cannot hold the keys; for other tables it is true.
SELECT syncd_r.syncd_key, syncd_r.syncd_project, syncd_r.syncd_dataset,
       {sent_vector}, {fingerprint}, {sent_columns}::text
FROM (SELECT {key} AS syncd_key, {project} AS syncd_project, {dataset} AS syncd_dataset,
             {send}({vector}) AS syncd_vector, ROW({key_columns}) AS syncd_hashed,
             jsonb_build_array({columns}) AS syncd_columns
      FROM {source}
      WHERE ({key_columns}) IN (SELECT {elements}
                                FROM unnest({texts}::json[]) AS syncd_k (syncd_key))
            AND {match_columns}
            AND ({key_columns}) IS NOT NULL AND {live} AND {vector} IS NOT NULL
      OFFSET 0) AS syncd_r;

-- name: read_page
-- The rows of a page of a scan, or of the whole table. from_start and to_end are true or false; the
-- planner drops a bound that is not wanted. match_datasets is true if all datasets are wanted.
SELECT syncd_r.syncd_key, syncd_r.syncd_project, syncd_r.syncd_dataset,
       {sent_vector}, {fingerprint}, {sent_columns}::text
FROM (SELECT {key} AS syncd_key, {project} AS syncd_project, {dataset} AS syncd_dataset,
             {send}({vector}) AS syncd_vector, ROW({key_columns}) AS syncd_hashed,
             jsonb_build_array({columns}) AS syncd_columns
      FROM {source}
      WHERE ({from_start} OR ({key_columns}) > ({after}))
            AND ({to_end} OR ({key_columns}) <= ({until}))
            AND {match_datasets}
            AND ({key_columns}) IS NOT NULL AND {live} AND {vector} IS NOT NULL
      OFFSET 0) AS syncd_r;

-- name: read_all_but
-- The whole table without some keys. CASE keeps every expression of the user's from those rows.
SELECT syncd_r.syncd_key, syncd_r.syncd_project, syncd_r.syncd_dataset,
       {sent_vector}, {fingerprint}, {sent_columns}::text
FROM (SELECT {key} AS syncd_key, {project} AS syncd_project, {dataset} AS syncd_dataset,
             {send}({vector}) AS syncd_vector, ROW({key_columns}) AS syncd_hashed,
             jsonb_build_array({columns}) AS syncd_columns
      FROM {source}
      WHERE CASE WHEN ({key_columns}) IN ({failing}) THEN false
                 ELSE {match_datasets} AND ({key_columns}) IS NOT NULL AND {live} END
            AND {vector} IS NOT NULL
      OFFSET 0) AS syncd_r;

-- name: read_unkeyed_rows
-- The live rows with a NULL in a key column. Instead of a key they have a label: the present part
-- of the key as text, and the place of the row.
SELECT syncd_r.syncd_key, syncd_r.syncd_project, syncd_r.syncd_dataset,
       {sent_vector}, {fingerprint}, {sent_columns}::text
FROM (SELECT coalesce({key}::text, 'NULL') || ' at ctid ' || ctid::text
             || CASE WHEN {partitioned} THEN ' of ' || tableoid::regclass::text ELSE '' END
                 AS syncd_key,
             {project} AS syncd_project, {dataset} AS syncd_dataset,
             {send}({vector}) AS syncd_vector, ROW({key_columns}) AS syncd_hashed,
             jsonb_build_array({columns}) AS syncd_columns
      FROM {source}
      WHERE NOT (({key_columns}) IS NOT NULL) AND {live} AND {vector} IS NOT NULL
      OFFSET 0) AS syncd_r;

-- name: read_unkeyed_labels
-- The labels of all rows with a NULL in a key column, live or not.
SELECT coalesce({key}::text, 'NULL') || ' at ctid ' || ctid::text
       || CASE WHEN {partitioned} THEN ' of ' || tableoid::regclass::text ELSE '' END
FROM {source} WHERE NOT (({key_columns}) IS NOT NULL);

-- name: may_lack_keys
-- Whether rows without a key are possible at all. A constraint that was never validated says
-- nothing of older rows.
SELECT EXISTS (SELECT FROM pg_attribute AS a
               WHERE a.attrelid = {oid}::oid AND a.attname = ANY ({key})
                 AND (NOT a.attnotnull
                      OR EXISTS (SELECT FROM pg_constraint AS c
                                 WHERE c.conrelid = a.attrelid AND c.contype = 'n'
                                   AND NOT c.convalidated AND a.attnum = ANY (c.conkey))));

-- name: read_page_end
-- The last key of the next page of a scan, in the order of the key's own index.
SELECT {key} FROM {source}
WHERE ({from_start} OR ({key_columns}) > ({after})) AND ({key_columns}) IS NOT NULL
ORDER BY {key_columns} OFFSET {page_rows} - 1 LIMIT 1;

-- name: plan
-- Raises an error if a rule is wrong, and reads no row.
EXPLAIN {query};

-- name: estimate_rows
-- A table that was never analysed has no count. Its size at a kilobyte a row is good enough for an
-- order.
SELECT c.oid::bigint,
       CASE WHEN c.reltuples > 0 THEN c.reltuples ELSE pg_table_size(c.oid) / 1024 END
           ::double precision
FROM pg_class AS c WHERE c.oid = ANY ({oids}::oid[]);

-- name: read_fingerprint_probe
-- Another server's fingerprints are comparable to this one's if this number is the same.
SELECT jsonb_hash_extended(jsonb_build_array(1, 'a'),
       hash_record_extended(ROW(1::bigint, 'a'::text COLLATE "C"),
                            hash_array_extended(ARRAY['\x01ff'::bytea], 0)));

-- name: read_bucket_probe
-- Another server gives keys the same buckets as this one if this number is the same. A bucket
-- depends on the server's byte order and on the bytes of a text, so on the database's encoding.
SELECT hashtextextended(current_setting('server_encoding') COLLATE "C", 0);

-- name: one_table
-- Here the parts of statements begin. This is the source if the table is not partitioned: a table
-- that inherits from it is another source.
ONLY {table};

-- name: fingerprint
-- It covers the key, the attached columns and the vector as it is sent. A hash of text would cost
-- more than all the rest, and depend on settings.
hash_record_extended(syncd_r.syncd_hashed, hash_array_extended(ARRAY[syncd_r.syncd_vector], 0));

-- name: fingerprint_with_columns
jsonb_hash_extended(
    syncd_r.syncd_columns, hash_record_extended(
        syncd_r.syncd_hashed, hash_array_extended(ARRAY[syncd_r.syncd_vector], 0)));

-- name: mine
-- Whether a key's text, as the outbox has it, is in one of a shard's buckets. The collation is
-- named, because a nondeterministic one hashes its sort keys.
(hashtextextended({key} COLLATE "C", 0) & 65535) BETWEEN {first} AND {last};

-- name: if_mine
-- CASE keeps the user's expressions from rows of other shards: an error on such a row is not ours.
CASE WHEN {mine} THEN {condition} ELSE {otherwise} END;

-- name: match_datasets
ARRAY[{project}, {dataset}]
    = ANY (SELECT ARRAY[syncd_w ->> 0, syncd_w ->> 1] FROM unnest({wanted}::json[]) AS syncd_w);

-- name: keys
-- The keys of a column that is not a time.
{texts}::{type}[];

-- name: time_keys
-- The keys of a column that is a time. To the planner a cast from text to a time depends on
-- settings, so that it would leave out no partition; these functions do not.
syncd.key_times({texts}, NULL::pg_catalog.{kind});

-- name: asked_texts
-- The keys as a parameter, in the outbox's form.
$1::text[];

-- name: changed_texts
-- The keys of one source among the first rows that read_keys_begun_since reads. The parameters are
-- the position's xmax and the sources.
ARRAY(SELECT syncd_k.key
      FROM (SELECT syncd_o.source, syncd_o.op, syncd_o.key FROM syncd.outbox AS syncd_o
            WHERE syncd_o.xid >= $1::xid8
              AND (syncd_o.op <> 'k' OR syncd_o.source = ANY ($2::integer[]))
            ORDER BY syncd_o.xid, syncd_o.id LIMIT {most}) AS syncd_k
      WHERE syncd_k.source = {source} AND syncd_k.op = 'k');

-- name: match_column
{column} = ANY (syncd.key_elements($1::json[], {place})::{type}[]);

-- name: match_time_column
{column} = ANY (syncd.key_times(syncd.key_elements($1::json[], {place}), NULL::pg_catalog.{kind}));

-- name: element
-- One of the elements of a composite key that was asked for.
(syncd_key ->> {place})::{type};

-- name: bound
-- One column of a key that is a bound of a page or fails.
{value}::text::{type};

-- name: text_key
-- The key if it is one column and not an integer.
{column}::text;

-- name: composite_key
-- The key if it is several columns.
json_build_array({columns})::text;

-- name: time_column
-- A time in a key, as the triggers write it.
syncd.key_text({column}::{type});
