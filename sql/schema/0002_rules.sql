-- The rules of a source: what they mean is kept, whatever is renamed.

-- The rules of a source mean what they meant when it was attached, as a view's would: PostgreSQL parsed them then, and syncd.rules keeps what it
-- made of them, in which types, functions, operators, enum values and columns are numbers. Printed whenever they are read, they have the
-- present names. Text alone is not enough: after ALTER TYPE .. RENAME VALUE, ALTER FUNCTION .. RENAME or ALTER EXTENSION .. SET SCHEMA it fails
-- for every row, or means something else. A view, or an index over a copy of the table, would make PostgreSQL keep the same, but with
-- dependencies: then DROP TYPE and DROP FUNCTION fail because of syncd, among them the last step of the usual exchange of an enum type.
-- A tree cannot be written as text, so that no dump holds it: the columns are generated, and a restored copy has none. It is also of no use to
-- another major version (pg_upgrade). In both cases the text, which syncd.remember keeps at its present names, is compiled again.
ALTER TABLE syncd.attachments
    ADD COLUMN schema_name text,  -- of the table, when it was last looked at: a dropped table's name is in no catalogue
    ADD COLUMN table_name text,
    ADD COLUMN attached_schema text,  -- of the table when it was attached; NULL where that was before this revision
    ADD COLUMN attached_name text,
    ADD COLUMN attached_rules text[];  -- project, dataset and live as they were printed then
UPDATE syncd.attachments SET attached_rules = ARRAY[project, dataset, live];
UPDATE syncd.attachments AS a SET schema_name = n.nspname, table_name = c.relname
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = a.source;

-- What PostgreSQL made of an expression that compile_expression has just indexed: a tree, or the number of a plain column. NULL for a constant of
-- the server's own types, which can have no other meaning. Called immutable so that a generated column can be made of it.
CREATE FUNCTION syncd.compiled_tree(role text) RETURNS pg_node_tree
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT i.indexprs FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE c.relname = 'syncd_like_' || role AND c.relnamespace = pg_my_temp_schema()
      AND EXISTS (SELECT FROM pg_depend AS d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                  AND NOT (d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid AND d.refobjsubid = 0))
$function$;

CREATE FUNCTION syncd.compiled_column(role text) RETURNS smallint
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT i.indkey[0] FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE c.relname = 'syncd_like_' || role AND c.relnamespace = pg_my_temp_schema() AND i.indkey[0] <> 0
$function$;

CREATE FUNCTION syncd.is_compiled() RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT EXISTS (SELECT FROM pg_class AS c WHERE c.relname = 'syncd_like_live' AND c.relnamespace = pg_my_temp_schema())
$function$;

CREATE TABLE syncd.rules (
    source integer PRIMARY KEY REFERENCES syncd.attachments ON DELETE CASCADE,
    compiled boolean GENERATED ALWAYS AS (syncd.is_compiled()) STORED,  -- false in a restored copy: nothing else of the row counts there
    server integer NOT NULL DEFAULT current_setting('server_version_num')::integer / 10000,  -- the major version that can read the trees
    functions oid[] NOT NULL,  -- that the expressions call, also as operators
    columns smallint[] NOT NULL,  -- of the source, that they use: a dropped one is printed as "?dropped?column?", without an error
    project pg_node_tree GENERATED ALWAYS AS (syncd.compiled_tree('project')) STORED,
    dataset pg_node_tree GENERATED ALWAYS AS (syncd.compiled_tree('dataset')) STORED,
    live pg_node_tree GENERATED ALWAYS AS (syncd.compiled_tree('live')) STORED,
    project_column smallint GENERATED ALWAYS AS (syncd.compiled_column('project')) STORED,
    dataset_column smallint GENERATED ALWAYS AS (syncd.compiled_column('dataset')) STORED,
    live_column smallint GENERATED ALWAYS AS (syncd.compiled_column('live')) STORED
);

-- A compiled expression with the present names. Constants are printed as a service reads them, whatever the session has set. NULL where it can no longer be printed: something that it names was dropped.
CREATE FUNCTION syncd.print_expression(tree pg_node_tree, plain_column smallint, source oid) RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog
    SET quote_all_identifiers = off SET standard_conforming_strings = on SET datestyle = 'ISO, YMD' SET intervalstyle = 'postgres'
    SET timezone = 'UTC' SET extra_float_digits = 1 SET bytea_output = 'hex'
AS $function$
BEGIN
    IF tree IS NOT NULL THEN
        RETURN format('(%s)', pg_get_expr(tree, source));
    END IF;
    RETURN (SELECT format('(%I)', a.attname) FROM pg_attribute AS a
            WHERE a.attrelid = source AND a.attnum = plain_column AND NOT a.attisdropped);
EXCEPTION WHEN OTHERS THEN
    RETURN NULL;
END
$function$;

-- The rules of each source with the present names. What cannot be printed is as it was last stored. Whether they are kept: the trees are there, and were
-- made by this server for this very database, and nothing that they name was dropped. The arguments are those with which the table would be
-- attached now: as they were given, but for expressions in which a name has changed since.
CREATE VIEW syncd.present_rules AS
SELECT a.id, coalesce(p.project, a.project) AS project, coalesce(p.dataset, a.dataset) AS dataset, coalesce(p.live, a.live) AS live,
       r.source IS NOT NULL AND (p.project IS NOT NULL OR r.project IS NULL AND r.project_column IS NULL)
       AND (p.dataset IS NOT NULL OR r.dataset IS NULL AND r.dataset_column IS NULL)
       AND (p.live IS NOT NULL OR r.live IS NULL AND r.live_column IS NULL) AS kept,
       coalesce(r.functions, '{}') AS functions,
       a.arguments || CASE WHEN p.project <> a.attached_rules[1] THEN jsonb_build_object('project', p.project) ELSE '{}' END
                   || CASE WHEN p.dataset <> a.attached_rules[2] THEN jsonb_build_object('dataset', p.dataset) ELSE '{}' END
                   || CASE WHEN p.live <> a.attached_rules[3] THEN jsonb_build_object('live', p.live) ELSE '{}' END AS arguments
FROM syncd.attachments AS a
LEFT JOIN syncd.rules AS r ON r.source = a.id AND r.compiled AND r.server = current_setting('server_version_num')::integer / 10000
    AND NOT EXISTS (SELECT FROM pg_attribute AS d WHERE d.attrelid = a.source AND d.attnum = ANY (r.columns) AND d.attisdropped)
CROSS JOIN LATERAL (
    SELECT CASE WHEN r.project IS NOT NULL OR r.project_column IS NOT NULL THEN syncd.print_expression(r.project, r.project_column, a.source) END,
           CASE WHEN r.dataset IS NOT NULL OR r.dataset_column IS NOT NULL THEN syncd.print_expression(r.dataset, r.dataset_column, a.source) END,
           CASE WHEN r.live IS NOT NULL OR r.live_column IS NOT NULL THEN syncd.print_expression(r.live, r.live_column, a.source) END
) AS p (project, dataset, live);

-- An empty temporary table whose columns have the names, types and numbers of the source's: what is compiled over it can be printed over the source.
CREATE FUNCTION syncd.make_like(source regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd SET default_table_access_method = 'heap'
AS $function$
DECLARE
    columns text;
    dropped text;
BEGIN
    SELECT string_agg(CASE WHEN a.attisdropped THEN format('"syncd dropped %s" boolean', a.attnum)
                           ELSE format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod))
                                || coalesce((SELECT format(' COLLATE %s.%I', c.collnamespace::regnamespace, c.collname) FROM pg_collation AS c
                                             WHERE c.oid = a.attcollation AND c.oid <> t.typcollation), '') END, ', ' ORDER BY a.attnum),
           string_agg(format('DROP COLUMN "syncd dropped %s"', a.attnum), ', ') FILTER (WHERE a.attisdropped)
    INTO columns, dropped
    FROM pg_attribute AS a LEFT JOIN pg_type AS t ON t.oid = a.atttypid WHERE a.attrelid = source AND a.attnum > 0;
    EXECUTE format('CREATE TEMPORARY TABLE syncd_like (%s)', columns);
    IF dropped IS NOT NULL THEN
        EXECUTE format('ALTER TABLE pg_temp.syncd_like %s', dropped);
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'the expressions of table % cannot be compiled: %', source, SQLERRM USING ERRCODE = 'insufficient_privilege',
        HINT = format('As the owner of what is named, give role %I the right to use it. A temporary table takes: GRANT TEMPORARY ON DATABASE %I TO %I;',
                      current_user, current_database(), current_user);
END
$function$;

-- A user's expression over a row, as PostgreSQL understands it: proved to be one immutable expression by indexing it over the table that make_like
-- has made, and printed with every name's schema, so that it means the same under any search_path. The index stays for register.
CREATE OR REPLACE FUNCTION syncd.compile_expression(source regclass, expression text, type text, role text) RETURNS text
LANGUAGE plpgsql
AS $function$
DECLARE
    compiled text;
    cause text;
    context text;
    one_statement refcursor;
BEGIN
    BEGIN
        -- A cursor refuses text that ends the statement and begins another, before any of it runs.
        OPEN one_statement FOR EXECUTE pg_catalog.format('SELECT (((%s)::%s)) FROM pg_temp.syncd_like', expression, type);
        CLOSE one_statement;
        EXECUTE pg_catalog.format('CREATE INDEX %I ON pg_temp.syncd_like (((%s)::%s))', 'syncd_like_' || role, expression, type);
    EXCEPTION WHEN OTHERS THEN
        GET STACKED DIAGNOSTICS cause = MESSAGE_TEXT, context = PG_EXCEPTION_CONTEXT;
        PERFORM syncd.blame_event_trigger(cause, context);
        RAISE EXCEPTION 'the % expression cannot be used: %', role, cause
            USING ERRCODE = 'invalid_parameter_value', DETAIL = expression,
                  HINT = 'It must be one immutable expression over the columns of ' || source::text
                         || ' that can be cast to ' || type || '.';
    END;
    -- A plain column is no expression to an index; more than one column, a condition or another type was more than one expression.
    SELECT CASE WHEN i.indnatts = 1 AND i.indpred IS NULL AND (SELECT a.atttypid FROM pg_catalog.pg_attribute AS a
                                                               WHERE a.attrelid = i.indexrelid AND a.attnum = 1) = type::pg_catalog.regtype
                THEN syncd.print_expression(i.indexprs, i.indkey[0], source) END
    INTO compiled
    FROM pg_catalog.pg_index AS i
    WHERE i.indexrelid = (SELECT c.oid FROM pg_catalog.pg_class AS c
                          WHERE c.relname = 'syncd_like_' || role AND c.relnamespace = pg_catalog.pg_my_temp_schema());
    IF compiled IS NULL THEN
        RAISE EXCEPTION 'the % expression is more than one expression', role USING ERRCODE = 'invalid_parameter_value',
            DETAIL = expression, HINT = 'Give one expression over the columns of ' || source::text || '.';
    END IF;
    RETURN compiled;
END
$function$;

-- Keep what compile_expression has compiled for a source in this transaction. What was kept before goes.
CREATE FUNCTION syncd.keep_rules(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
BEGIN
    DELETE FROM syncd.rules AS r WHERE r.source = source_id;
    INSERT INTO syncd.rules (source, functions, columns)
    SELECT source_id, coalesce(array_agg(DISTINCT coalesce(o.oprcode::oid, d.refobjid)) FILTER (WHERE d.refclassid <> 'pg_class'::regclass), '{}'),
           coalesce(array_agg(DISTINCT d.refobjsubid::smallint) FILTER (WHERE d.refclassid = 'pg_class'::regclass), '{}')
    FROM pg_depend AS d JOIN pg_class AS c ON d.classid = 'pg_class'::regclass AND d.objid = c.oid
    LEFT JOIN pg_operator AS o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
    WHERE c.relnamespace = pg_my_temp_schema() AND c.relname IN ('syncd_like_project', 'syncd_like_dataset', 'syncd_like_live')
      AND (o.oid IS NOT NULL OR d.refclassid = 'pg_proc'::regclass OR d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0);
END
$function$;

-- Bring what syncd remembers of a source up to date: the name of its table, and its rules with the present names. Rules that are not kept are compiled
-- again from their text; that raises where the text no longer means anything.
CREATE FUNCTION syncd.remember(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    a syncd.attachments;
    rules syncd.present_rules;
BEGIN
    SELECT * INTO a FROM syncd.attachments AS t WHERE t.id = source_id AND EXISTS (SELECT FROM pg_class AS c WHERE c.oid = t.source) FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    SELECT * INTO rules FROM syncd.present_rules AS p WHERE p.id = source_id;
    IF NOT rules.kept THEN
        PERFORM syncd.make_like(a.source);
        rules.project := syncd.compile_expression(a.source, rules.project, 'text', 'project');
        rules.dataset := syncd.compile_expression(a.source, rules.dataset, 'text', 'dataset');
        rules.live := syncd.compile_expression(a.source, rules.live, 'boolean', 'live');
        PERFORM syncd.keep_rules(source_id);
        DROP TABLE pg_temp.syncd_like;
    END IF;
    UPDATE syncd.attachments AS t
    SET schema_name = n.nspname, table_name = c.relname, project = rules.project, dataset = rules.dataset, live = rules.live
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE t.id = source_id AND c.oid = a.source
      AND (t.schema_name, t.table_name, t.project, t.dataset, t.live) IS DISTINCT FROM (n.nspname, c.relname, rules.project, rules.dataset, rules.live);
END
$function$;

-- Rules of what was attached before this revision. One whose text means nothing any more is left to the service, which says so.
DO $do$
DECLARE
    each record;
BEGIN
    FOR each IN SELECT a.id FROM syncd.attachments AS a LOOP
        BEGIN
            PERFORM syncd.remember(each.id);
        EXCEPTION WHEN OTHERS THEN
            RAISE NOTICE 'the rules of source % cannot be compiled: %', each.id, SQLERRM;
        END;
    END LOOP;
END
$do$;
