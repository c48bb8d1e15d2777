-- What syncd's SQL rests on, and what a role, a database, a DSN or the environment may have set otherwise. One list: as it stands for one
-- transaction, with SET in place of SET LOCAL for a session of our own. A pooler may give each transaction another session, and a setting of a
-- session that is shared would reach other programs.

-- name: begin
-- A default of the session may be read-only, or another isolation level.
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE NOT DEFERRABLE;

-- name: settings
-- How text is written and read.
SET LOCAL client_encoding = 'UTF8';
SET LOCAL datestyle = 'ISO, YMD';
SET LOCAL intervalstyle = 'postgres';
SET LOCAL timezone = 'UTC';
SET LOCAL quote_all_identifiers = off;
SET LOCAL bytea_output = 'hex';
SET LOCAL extra_float_digits = 1;
SET LOCAL array_nulls = on;
SET LOCAL transform_null_equals = off;
SET LOCAL client_min_messages = 'notice';

-- name: literals
-- Also for the command line's attach, whose rules are in the user's own text forms otherwise.
SET LOCAL standard_conforming_strings = on;

-- name: time_outs
-- Who ends what takes long: limits of syncd's own come behind these.
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = 0;
SET LOCAL idle_in_transaction_session_timeout = '30s';

-- name: time_outs_since_17
SET LOCAL transaction_timeout = 0;

-- name: service_settings
-- Of a service, and of whatever names no table as its user would.
SET LOCAL search_path = pg_catalog, syncd;
SET LOCAL row_security = off;

-- name: plan_settings
-- Pages are read in the order of an index; where statistics are missing, as right after a slot was freed or a large transaction, the planner
-- would rather sort all that is left for each page (400 ms instead of 2 with a million rows).
SET LOCAL enable_seqscan = off;
SET LOCAL enable_sort = off;
SET LOCAL enable_indexscan = on;
SET LOCAL enable_indexonlyscan = on;
SET LOCAL enable_bitmapscan = on;
SET LOCAL enable_nestloop = on;
SET LOCAL enable_partition_pruning = on;
SET LOCAL plan_cache_mode = 'auto';
SET LOCAL max_parallel_workers_per_gather = 0;
SET LOCAL jit = off;

-- name: own_session_settings
-- Only for a session of our own: of its transactions' beginnings, and of its rests between them.
SET default_transaction_isolation = 'read committed';
SET default_transaction_read_only = off;
SET default_transaction_deferrable = off;
SET idle_session_timeout = 0;

-- name: first_of_init
-- Its transaction is begun by Alembic, and by psql where its SQL is run by hand.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE, NOT DEFERRABLE;

-- name: time_outs_of_init
-- Its SQL is printed for any version.
DO $do$
BEGIN
    IF current_setting('transaction_timeout', true) IS NOT NULL THEN
        PERFORM set_config('transaction_timeout', '0', true);
    END IF;
END
$do$;

-- name: new_tables
-- For init: a table of syncd's is updated and has unique indexes.
SET LOCAL default_table_access_method = 'heap';

-- name: read_role
SELECT current_user::pg_catalog.text;
