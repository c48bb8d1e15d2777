-- The tables of `syncd bench`, in their own schema, which is dropped at the end.

-- name: create_schema
CREATE SCHEMA syncd_bench;

-- name: drop_schema
DROP SCHEMA IF EXISTS syncd_bench CASCADE;

-- name: begin
-- One benchmark at a time in a database, as long as this session lives; and whether pgvector is
-- installed or available.
SELECT pg_try_advisory_lock(hashtext('syncd_bench')),
       EXISTS (SELECT FROM pg_extension WHERE extname = 'vector'),
       EXISTS (SELECT FROM pg_available_extensions WHERE name = 'vector');

-- name: list_foreign_sources
SELECT source::text FROM syncd.sources WHERE source::text NOT IN ('syncd.embeddings') ORDER BY 1;

-- name: list_running_consumers
SELECT DISTINCT split_part(application_name, '/', 2) FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'syncd/%' ORDER BY 1;

-- name: list_sessions
SELECT pid FROM pg_stat_activity WHERE application_name = %s;

-- name: forget_consumer
-- Otherwise it would hold the outbox forever.
DELETE FROM syncd.consumers WHERE name = %s;

-- name: create_vector_extension
CREATE EXTENSION IF NOT EXISTS vector;

-- name: drop_vector_extension
DROP EXTENSION IF EXISTS vector;

-- name: create_table
CREATE TABLE syncd_bench.{table} (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
                                  embedding {type} NOT NULL);

-- name: create_table_like
CREATE TABLE syncd_bench.{table} (LIKE syncd_bench.followed INCLUDING ALL);

-- name: add_column
ALTER TABLE syncd_bench.{table} ADD COLUMN {column} integer;

-- name: create_btree
CREATE INDEX ON syncd_bench.{table} ({column});

-- name: create_hnsw
CREATE INDEX ON syncd_bench.{table}
    USING hnsw (embedding {operators}) WITH (m = 16, ef_construction = 64);

-- name: index_bytes
SELECT sum(pg_relation_size(indexrelid))::bigint FROM pg_index
WHERE indrelid = %s::regclass AND NOT indisprimary;

-- name: copy_table
INSERT INTO syncd_bench.{table} OVERRIDING SYSTEM VALUE SELECT * FROM syncd_bench.followed
ORDER BY id;

-- name: continue_keys
-- After a copy, which brings its own keys.
SELECT setval(pg_get_serial_sequence(%s, 'id'), max(id)) FROM syncd_bench.{table};

-- name: set_setting
SELECT set_config(%s, %s, false);

-- name: shared_buffers
SHOW shared_buffers;

-- name: use_index
SELECT set_config('enable_indexscan', %s, false);

-- name: set_ef_search
SELECT set_config('hnsw.ef_search', %s, false);

-- name: set_iterative_scan
SET hnsw.iterative_scan = strict_order;

-- name: pgvector_version
SELECT extversion FROM pg_extension WHERE extname = 'vector';

-- name: nearest
SELECT id FROM syncd_bench.{table} ORDER BY embedding {operator} {vector} LIMIT {k};

-- name: nearest_below
-- The limit is a literal, so that the planner knows how many rows pass.
SELECT id FROM syncd_bench.{table} WHERE {column} < {limit} ORDER BY embedding {operator} {vector}
LIMIT {k};

-- name: explain
EXPLAIN (FORMAT JSON) {query};

-- name: insert_sample
-- From a table of vectors: the measurement must not include their creation. The table has many
-- vectors, since an HNSW index stores equal vectors only once.
INSERT INTO syncd_bench.{table} (embedding) SELECT embedding FROM syncd_bench.samples
WHERE id = (SELECT 1 + floor(random() * 20000)::bigint);

-- name: insert_returning
INSERT INTO syncd_bench.{table} (embedding) SELECT embedding FROM syncd_bench.samples WHERE id = %s
RETURNING id;

-- name: find_row
SELECT id FROM syncd_bench.{table} WHERE id = %s;

-- name: change_rows
UPDATE syncd_bench.{table} AS t SET embedding = s.embedding
FROM unnest(%s::bigint[], %s::bigint[]) AS c (key, sample)
JOIN syncd_bench.samples AS s ON s.id = c.sample
WHERE t.id = c.key;

-- name: delete_rows
DELETE FROM syncd_bench.{table} WHERE id = ANY(%s);

-- name: token
SELECT syncd.token();

-- name: copy_rows
COPY syncd_bench.{table} ({columns}) FROM STDIN (FORMAT BINARY);

-- name: attach
SELECT rows FROM syncd.attach(%s, metric => %s);

-- name: attach_with_columns
SELECT rows FROM syncd.attach(%s, metric => %s, columns => %s::text[]);

-- name: attach_datasets
-- Rows go to datasets whose names no other table has.
SELECT rows
FROM syncd.attach(%s, metric => %s,
                  dataset => format('%%L || (id %%%% %%s)::text', %s::text, %s::bigint));

-- name: drop_table
DROP TABLE syncd_bench.{table};

-- name: detach
SELECT syncd.detach(%s);

-- name: vacuum
VACUUM ANALYZE syncd_bench.{table};

-- name: hash_rows
SELECT count(*), sum(hash_array_extended(ARRAY[{send}(embedding)], 0)) FROM syncd_bench.{table};

-- name: no_parallel_workers
SET LOCAL max_parallel_workers_per_gather = 0;

-- name: drift
DELETE FROM syncd_bench.{table}
WHERE id IN (SELECT id FROM syncd_bench.{table} ORDER BY random() LIMIT %s);

-- name: forget_changes
-- In the transaction that made the changes, so that no consumer sees them.
DELETE FROM syncd.outbox WHERE xid = pg_current_xact_id();
