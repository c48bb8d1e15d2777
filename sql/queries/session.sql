-- Settings that syncd's SQL needs and that a role, a database, a DSN or the environment may have
-- changed. It is one list: as it is for one transaction, with SET in place of SET LOCAL for syncd's
-- own session. A pooler may give each transaction another session, and a setting of a shared
-- session would reach other programs.

-- name: begin
-- A default of the session may be read-only, or another isolation level.
BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE NOT DEFERRABLE;

-- name: settings
-- The text forms.
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
-- Also for attach on the command line, although its rules are in the user's own text forms.
SET LOCAL standard_conforming_strings = on;

-- name: time_outs
-- Time-outs; syncd's own limits follow them.
SET LOCAL statement_timeout = 0;
SET LOCAL lock_timeout = 0;
SET LOCAL idle_in_transaction_session_timeout = '30s';

-- name: time_outs_since_17
SET LOCAL transaction_timeout = 0;

-- name: service_settings
-- For a service, and for each command that names no table in the user's search_path.
SET LOCAL search_path = pg_catalog, syncd;
SET LOCAL row_security = off;

-- name: plan_settings
-- Pages are read in the order of an index. Right after a slot was freed, or after a large
-- transaction, there are no statistics. Then the planner would sort all remaining rows for each
-- page (with a million rows: 400 ms instead of 2).
SET LOCAL enable_seqscan = off;
SET LOCAL enable_sort = off;
SET LOCAL enable_indexscan = on;
SET LOCAL enable_indexonlyscan = on;
SET LOCAL enable_bitmapscan = on;
SET LOCAL enable_nestloop = on;
SET LOCAL enable_partition_pruning = on;
-- Statements with parameters are planned once: their plans do not depend on them.
SET LOCAL plan_cache_mode = 'force_generic_plan';
SET LOCAL max_parallel_workers_per_gather = 0;
SET LOCAL jit = off;

-- name: own_session_settings
-- Only for syncd's own session: for each BEGIN, and for the time between transactions.
SET default_transaction_isolation = 'read committed';
SET default_transaction_read_only = off;
SET default_transaction_deferrable = off;
SET idle_session_timeout = 0;

-- name: deallocate_all
DEALLOCATE ALL;

-- name: first_of_init
-- Alembic begins the transaction of init; psql does if an operator runs its SQL by hand.
SET TRANSACTION ISOLATION LEVEL READ COMMITTED, READ WRITE, NOT DEFERRABLE;

-- name: time_outs_of_init
-- The SQL of init is printed for any version of the server.
DO $do$
BEGIN
    IF current_setting('transaction_timeout', true) IS NOT NULL THEN
        PERFORM set_config('transaction_timeout', '0', true);
    END IF;
END
$do$;

-- name: new_tables
-- For init: syncd's tables are updated and have unique indexes.
SET LOCAL default_table_access_method = 'heap';

-- name: read_role
SELECT current_user::pg_catalog.text;
