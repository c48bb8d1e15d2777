-- What one pass reads. {braces} are filled in by the caller: identifiers, compiled expressions, and bounds of the outbox, which are numbers,
-- as literals, so that the planner sees them and uses the index for both ranges.

-- name: begin_pass
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY;

-- name: limits
-- Behind the session's settings.
SET LOCAL lock_timeout = '100ms';
SET LOCAL statement_timeout = '30s';
SET LOCAL idle_in_transaction_session_timeout = '30s';

-- name: lock_outbox
-- With its slots, before there is a snapshot: a slot that is freed between the two would look empty to a snapshot that is older.
LOCK TABLE syncd.outbox IN ACCESS SHARE MODE;

-- name: lock_source
LOCK TABLE {source} IN ACCESS SHARE MODE;

-- name: one_table
-- A table without what inherits from it: a child is a source of its own.
ONLY {table};

-- name: all_partitions
{table};

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
-- The first statement of a pass that takes a snapshot: S1. With it, what the pass must know before it reads: is this still our place to
-- be, the names that the locked oids have now, whether there is a marker since the oldest position, the history of its transactions (NULL in
-- a restored copy that has none of its own yet), and the next transaction id: no transaction of this history has that id or a higher one.
-- The doubts are read behind the snapshot: no transaction that it sees has moved them unnoticed.
SELECT pg_current_snapshot()::text, (SELECT last_value FROM syncd.outbox_id), pg_is_in_recovery(),
       (SELECT c.run_id::text FROM syncd.consumers AS c WHERE c.name = {consumer}),
       (SELECT coalesce(json_agg(json_build_array(r.oid::bigint, n.nspname, r.relname)), '[]')
        FROM pg_class AS r JOIN pg_namespace AS n ON n.oid = r.relnamespace WHERE r.oid = ANY ({oids}::oid[])),
       EXISTS (SELECT FROM syncd.outbox AS o WHERE o.op <> 'k' AND ({range})),
       (SELECT l.freed::text FROM syncd.outbox_limit AS l),
       syncd.history(),
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint + age(pg_snapshot_xmax(pg_current_snapshot())::xid),
       (SELECT d.last_value FROM syncd.doubts AS d);

-- name: read_outbox_locks
-- Who keeps the outbox, or an index of it, from being read.
SELECT l.pid, left(a.query, 100) FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
WHERE l.locktype = 'relation' AND l.mode = 'AccessExclusiveLock' AND l.pid IS DISTINCT FROM pg_backend_pid()
  AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
  AND l.relation IN (SELECT c.oid FROM pg_class AS c WHERE c.relnamespace = 'syncd'::regnamespace AND starts_with(c.relname::text, 'outbox'))
ORDER BY l.granted DESC, l.pid LIMIT 1;

-- name: export_snapshot
-- For a transaction on another connection that is to see what this one sees.
SELECT pg_export_snapshot();

-- name: read_markers
SELECT o.source, o.op::text FROM syncd.outbox AS o
WHERE o.op <> 'k' AND ({range}) AND o.source = ANY ('{{{sources}}}'::integer[]) ORDER BY o.xid, o.id;

-- name: read_registry_changes
SELECT 1 FROM syncd.outbox AS o WHERE o.op <> 'k' AND o.op IN ('a', 'd') AND ({range}) LIMIT 1;

-- name: in_progress_range
o.xid = ANY ('{{{in_progress}}}'::xid8[]);

-- name: newer_range
o.xid >= '{xmax}'::xid8;

-- name: read_changed_keys
-- Keys written by transactions that the pass sees and the position did not: those in progress then, and those begun since. A window that
-- takes more than one page keeps its own end: only transactions that the first page's snapshot saw.
SELECT o.xid::text::bigint, o.id, o.source, o.key FROM syncd.outbox AS o
WHERE {range} AND {after} AND {window} AND o.op = 'k' AND o.source = ANY ('{{{sources}}}'::integer[])
ORDER BY o.xid, o.id LIMIT {page_rows};

-- name: after_row
-- Only behind a first page: as a bound below the range's own it would have the index read from its beginning.
(o.xid, o.id) > ('{xid}'::xid8, {id});

-- name: window_end
pg_visible_in_snapshot(o.xid, '{snapshot}'::pg_snapshot);

-- name: no_bound
true;

-- name: read_rows
-- The one rule for what is live: the live expression, and a vector. A key that was asked for and is not returned is a tombstone.
-- The fingerprint covers key, attached columns and the vector as it is sent; OFFSET 0 keeps the planner from making them twice.
SELECT syncd_r.syncd_key, syncd_r.syncd_project, syncd_r.syncd_dataset, {sent}, {fingerprint}, {sent_columns}
FROM (SELECT {key} AS syncd_key, {project} AS syncd_project, {dataset} AS syncd_dataset, {send}({vector}) AS syncd_vector, ROW({hashed}) AS syncd_hashed,
             {columns} AS syncd_columns
      FROM {source} WHERE {match} AND {live} AND {vector} IS NOT NULL OFFSET 0) AS syncd_r;

-- name: plan
EXPLAIN {query};

-- name: live_but
CASE WHEN ({columns}) IN ({failing}) THEN false ELSE {match} AND {live} END;

-- name: sent_vector
syncd_r.syncd_vector;

-- name: not_sent
NULL;

-- name: fingerprint
-- Not of text: it would cost more than all the rest, and depend on settings.
hash_record_extended(syncd_r.syncd_hashed, hash_array_extended(ARRAY[syncd_r.syncd_vector], 0));

-- name: fingerprint_with_columns
jsonb_hash_extended(syncd_r.syncd_columns, hash_record_extended(syncd_r.syncd_hashed, hash_array_extended(ARRAY[syncd_r.syncd_vector], 0)));

-- name: columns
jsonb_build_array({columns});

-- name: sent_columns
syncd_r.syncd_columns::text;

-- name: read_fingerprint_probe
-- Another server's fingerprints are comparable to this one's if this number is the same.
SELECT jsonb_hash_extended(jsonb_build_array(1, 'a'),
       hash_record_extended(ROW(1::bigint, 'a'::text COLLATE "C"), hash_array_extended(ARRAY['\x01ff'::bytea], 0)));

-- name: read_page_end
-- The last key of the next page of a scan, in the order of the key's own index.
SELECT {key} FROM {source} WHERE {after} AND {keyed} ORDER BY {columns} OFFSET {page_rows} - 1 LIMIT 1;

-- name: estimate_rows
-- A table that was never analysed has no count; its size, at a kilobyte a row, does for an order.
SELECT c.oid::bigint, CASE WHEN c.reltuples > 0 THEN c.reltuples ELSE pg_table_size(c.oid) / 1024 END::double precision
FROM pg_class AS c WHERE c.oid = ANY ({oids}::oid[]);

-- name: match_keys
{column} = ANY ({keys});

-- name: given_keys
$1::text[];

-- name: given_elements
syncd.key_elements($1::json[], {place});

-- name: values
{texts}::{type}[];

-- name: times
-- A cast from text to a time depends on settings as far as the planner knows, so that it would leave no partition out.
syncd.key_times({texts}, NULL::pg_catalog.{kind});

-- name: match_composite_keys
({columns}) IN (SELECT {elements} FROM unnest($1::json[]) AS syncd_k (syncd_key));

-- name: match_everything
true;

-- name: keyed
-- A row without a key, or without a part of it, is no row that an index can name; NULLs would end the order of keys as well.
({columns}) IS NOT NULL;

-- name: part_is_null
{column} IS NULL;

-- name: may_lack_keys
-- Whether rows without a key are possible at all. A constraint that was never validated says nothing of older rows.
SELECT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = {oid}::oid AND a.attname = ANY ({key}) AND
               (NOT a.attnotnull OR EXISTS (SELECT FROM pg_constraint AS c WHERE c.conrelid = a.attrelid AND c.contype = 'n' AND NOT c.convalidated
                                            AND a.attnum = ANY (c.conkey))));

-- name: unkeyed_label
-- What a row without a key is called: its key's text as far as there is one, and where the row is.
coalesce({key}::text, 'NULL') || ' at ctid ' || ctid::text;

-- name: unkeyed_label_in_partition
coalesce({key}::text, 'NULL') || ' at ctid ' || ctid::text || ' of ' || tableoid::regclass::text;

-- name: read_unkeyed_labels
SELECT {label} FROM {source} WHERE {match};

-- name: match_after
({columns}) > ({after});

-- name: match_until
({columns}) <= ({until});

-- name: match_datasets
ARRAY[{project}, {dataset}] = ANY (SELECT ARRAY[syncd_w ->> 0, syncd_w ->> 1] FROM unnest({wanted}::json[]) AS syncd_w);

-- name: json_element
(syncd_key ->> {place})::{type};

-- name: literal_element
{value}::text::{type};

-- name: text_key
{column}::text;

-- name: time_element
-- As the triggers write it.
syncd.key_text({column}::{type});

-- name: composite_key
json_build_array({columns})::text;
