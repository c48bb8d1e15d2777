-- The rules of a source keep their meaning through each rename.

-- The rules of a source keep the meaning that they had at attach, as a view does. PostgreSQL parsed
-- them then, and syncd.rules keeps the parse trees, in which types, functions, operators, enum
-- values and columns are numbers. They are printed at each read, with the present names. Text alone
-- is not enough: after ALTER TYPE .. RENAME VALUE, ALTER FUNCTION .. RENAME or ALTER EXTENSION ..
-- SET SCHEMA it fails for every row, or has another meaning. A view, or an index over a copy of the
-- table, would make PostgreSQL keep the same trees, but with dependencies. Then DROP TYPE and DROP
-- FUNCTION would fail because of syncd, among them the last step of the usual exchange of an enum
-- type. A tree cannot be written as text, so a dump does not hold it: the columns are generated,
-- and a restored copy has none. Another major version (pg_upgrade) cannot use it either. In both
-- cases the text is compiled again; syncd.remember keeps it at its present names.
ALTER TABLE syncd.attachments
    -- The table's schema and name at the last look: a dropped table's name is in no catalogue.
    ADD COLUMN schema_name text,
    ADD COLUMN table_name text,
    -- The table's schema and name at attach; NULL if it was attached before this revision.
    ADD COLUMN attached_schema text,
    ADD COLUMN attached_name text,
    ADD COLUMN attached_rules text[];  -- project, dataset and live, as they were printed at attach
UPDATE syncd.attachments SET attached_rules = ARRAY[project, dataset, live];
UPDATE syncd.attachments AS a SET schema_name = n.nspname, table_name = c.relname
FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.oid = a.source;

-- PostgreSQL's form of an expression that compile_expression has just indexed: a tree, or the
-- number of a plain column. NULL for a constant of the server's own types, which can have no other
-- meaning. Declared immutable so that a generated column can use it.
CREATE FUNCTION syncd.compiled_tree(role text) RETURNS pg_node_tree
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT i.indexprs FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE c.relname = 'syncd_like_' || role AND c.relnamespace = pg_my_temp_schema()
      AND EXISTS (SELECT FROM pg_depend AS d
                  WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                    AND NOT (d.refclassid = 'pg_class'::regclass AND d.refobjid = i.indrelid
                           AND d.refobjsubid = 0))
$function$;

CREATE FUNCTION syncd.compiled_column(role text) RETURNS smallint
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT i.indkey[0] FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE c.relname = 'syncd_like_' || role AND c.relnamespace = pg_my_temp_schema()
      AND i.indkey[0] <> 0
$function$;

CREATE FUNCTION syncd.is_compiled() RETURNS boolean
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT EXISTS (SELECT FROM pg_class AS c
                   WHERE c.relname = 'syncd_like_live' AND c.relnamespace = pg_my_temp_schema())
$function$;

CREATE TABLE syncd.rules (
    source integer PRIMARY KEY REFERENCES syncd.attachments ON DELETE CASCADE,
    -- False in a restored copy: no other column of the row is valid there.
    compiled boolean GENERATED ALWAYS AS (syncd.is_compiled()) STORED,
    -- The major version that can read the trees.
    server integer NOT NULL DEFAULT current_setting('server_version_num')::integer / 10000,
    -- The functions that the expressions call, also as operators.
    functions oid[] NOT NULL,
    -- The source's columns that they use: a dropped one is printed as "?dropped?column?", without
    -- an error.
    columns smallint[] NOT NULL,
    project pg_node_tree GENERATED ALWAYS AS (syncd.compiled_tree('project')) STORED,
    dataset pg_node_tree GENERATED ALWAYS AS (syncd.compiled_tree('dataset')) STORED,
    live pg_node_tree GENERATED ALWAYS AS (syncd.compiled_tree('live')) STORED,
    project_column smallint GENERATED ALWAYS AS (syncd.compiled_column('project')) STORED,
    dataset_column smallint GENERATED ALWAYS AS (syncd.compiled_column('dataset')) STORED,
    live_column smallint GENERATED ALWAYS AS (syncd.compiled_column('live')) STORED
);

-- A compiled expression with the present names. Constants are printed as a service reads them,
-- under any settings of the session. NULL if an object that it names was dropped: then it cannot be
-- printed.
CREATE FUNCTION syncd.print_expression(tree pg_node_tree, plain_column smallint, source oid)
    RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog
    SET quote_all_identifiers = off SET standard_conforming_strings = on
    SET datestyle = 'ISO, YMD' SET intervalstyle = 'postgres'
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

-- The rules of each source with the present names; an expression that cannot be printed is as it
-- was last stored. They are kept if the trees are there, were made by this server for this
-- database, and name no dropped object. The arguments are those with which the table would be
-- attached now: the given ones, except expressions in which a name has changed since.
CREATE VIEW syncd.present_rules AS
SELECT a.id, coalesce(p.project, a.project) AS project, coalesce(p.dataset, a.dataset) AS dataset,
       coalesce(p.live, a.live) AS live,
       r.source IS NOT NULL
           AND (p.project IS NOT NULL OR r.project IS NULL AND r.project_column IS NULL)
       AND (p.dataset IS NOT NULL OR r.dataset IS NULL AND r.dataset_column IS NULL)
       AND (p.live IS NOT NULL OR r.live IS NULL AND r.live_column IS NULL) AS kept,
       coalesce(r.functions, '{}') AS functions,
       a.arguments
           || CASE WHEN p.project <> a.attached_rules[1]
                   THEN jsonb_build_object('project', p.project) ELSE '{}' END
           || CASE WHEN p.dataset <> a.attached_rules[2]
                   THEN jsonb_build_object('dataset', p.dataset) ELSE '{}' END
           || CASE WHEN p.live <> a.attached_rules[3]
                   THEN jsonb_build_object('live', p.live) ELSE '{}' END AS arguments
FROM syncd.attachments AS a
LEFT JOIN syncd.rules AS r ON r.source = a.id AND r.compiled
    AND r.server = current_setting('server_version_num')::integer / 10000
    AND NOT EXISTS (SELECT FROM pg_attribute AS d
                    WHERE d.attrelid = a.source AND d.attnum = ANY (r.columns) AND d.attisdropped)
CROSS JOIN LATERAL (
    SELECT CASE WHEN r.project IS NOT NULL OR r.project_column IS NOT NULL
                THEN syncd.print_expression(r.project, r.project_column, a.source) END,
           CASE WHEN r.dataset IS NOT NULL OR r.dataset_column IS NOT NULL
                THEN syncd.print_expression(r.dataset, r.dataset_column, a.source) END,
           CASE WHEN r.live IS NOT NULL OR r.live_column IS NOT NULL
                THEN syncd.print_expression(r.live, r.live_column, a.source) END
) AS p (project, dataset, live);

-- An empty temporary table whose columns have the names, types and numbers of the source's columns:
-- an expression compiled over it can be printed over the source.
CREATE FUNCTION syncd.make_like(source regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd SET default_table_access_method = 'heap'
AS $function$
DECLARE
    columns text;
    dropped text;
BEGIN
    SELECT string_agg(CASE WHEN a.attisdropped THEN format('"syncd dropped %s" boolean', a.attnum)
                           ELSE format('%I %s', a.attname, format_type(a.atttypid, a.atttypmod))
                                || coalesce(
                                    (SELECT format(' COLLATE %s.%I', c.collnamespace::regnamespace,
                                                   c.collname)
                                     FROM pg_collation AS c
                                     WHERE c.oid = a.attcollation AND c.oid <> t.typcollation), '')
                      END, ', ' ORDER BY a.attnum),
           string_agg(format('DROP COLUMN "syncd dropped %s"', a.attnum), ', ')
               FILTER (WHERE a.attisdropped)
    INTO columns, dropped
    FROM pg_attribute AS a LEFT JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = source AND a.attnum > 0;
    EXECUTE format('CREATE TEMPORARY TABLE syncd_like (%s)', columns);
    IF dropped IS NOT NULL THEN
        EXECUTE format('ALTER TABLE pg_temp.syncd_like %s', dropped);
    END IF;
EXCEPTION WHEN insufficient_privilege THEN
    RAISE EXCEPTION 'the expressions of table % cannot be compiled: %', source, SQLERRM
        USING ERRCODE = 'insufficient_privilege',
        HINT = format(
            'As the owner of the named object, give role %I the right to use it. A temporary table '
            'needs: GRANT TEMPORARY ON DATABASE %I TO %I;',
                      current_user, current_database(), current_user);
END
$function$;

-- A user's expression over a row, as PostgreSQL understands it. An index over the table of
-- make_like proves that it is one immutable expression. It is printed with the schema of each name,
-- so it has the same meaning under any search_path. The index stays for register.
CREATE OR REPLACE FUNCTION syncd.compile_expression(source regclass, expression text, type text,
                                                    role text) RETURNS text
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
        OPEN one_statement FOR EXECUTE pg_catalog.format(
            'SELECT (((%s)::%s)) FROM pg_temp.syncd_like', expression, type);
        CLOSE one_statement;
        EXECUTE pg_catalog.format('CREATE INDEX %I ON pg_temp.syncd_like (((%s)::%s))',
                                  'syncd_like_' || role, expression, type);
    EXCEPTION WHEN OTHERS THEN
        GET STACKED DIAGNOSTICS cause = MESSAGE_TEXT, context = PG_EXCEPTION_CONTEXT;
        PERFORM syncd.blame_event_trigger(cause, context);
        RAISE EXCEPTION 'the % expression cannot be used: %', role, cause
            USING ERRCODE = 'invalid_parameter_value', DETAIL = expression,
                  HINT = 'It must be one immutable expression over the columns of ' || source::text
                         || ' that can be cast to ' || type || '.';
    END;
    -- For an index a plain column is not an expression. More than one column, a condition or
    -- another type means more than one expression.
    SELECT CASE WHEN i.indnatts = 1 AND i.indpred IS NULL
        AND (SELECT a.atttypid FROM pg_catalog.pg_attribute AS a
             WHERE a.attrelid = i.indexrelid AND a.attnum = 1) = type::pg_catalog.regtype
                THEN syncd.print_expression(i.indexprs, i.indkey[0], source) END
    INTO compiled
    FROM pg_catalog.pg_index AS i
    WHERE i.indexrelid = (SELECT c.oid FROM pg_catalog.pg_class AS c
                          WHERE c.relname = 'syncd_like_' || role
                            AND c.relnamespace = pg_catalog.pg_my_temp_schema());
    IF compiled IS NULL THEN
        RAISE EXCEPTION 'the % expression is more than one expression', role
            USING ERRCODE = 'invalid_parameter_value',
            DETAIL = expression,
                  HINT = 'Give one expression over the columns of ' || source::text || '.';
    END IF;
    RETURN compiled;
END
$function$;

-- Keep the expressions that compile_expression has compiled for a source in this transaction. They
-- replace the ones kept before.
CREATE FUNCTION syncd.keep_rules(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
BEGIN
    DELETE FROM syncd.rules AS r WHERE r.source = source_id;
    INSERT INTO syncd.rules (source, functions, columns)
    SELECT source_id,
           coalesce(array_agg(DISTINCT coalesce(o.oprcode::oid, d.refobjid))
                    FILTER (WHERE d.refclassid <> 'pg_class'::regclass), '{}'),
           coalesce(array_agg(DISTINCT d.refobjsubid::smallint)
                    FILTER (WHERE d.refclassid = 'pg_class'::regclass), '{}')
    FROM pg_depend AS d JOIN pg_class AS c ON d.classid = 'pg_class'::regclass AND d.objid = c.oid
    LEFT JOIN pg_operator AS o ON d.refclassid = 'pg_operator'::regclass AND o.oid = d.refobjid
    WHERE c.relnamespace = pg_my_temp_schema()
      AND c.relname IN ('syncd_like_project', 'syncd_like_dataset', 'syncd_like_live')
      AND (o.oid IS NOT NULL OR d.refclassid = 'pg_proc'::regclass
           OR d.refclassid = 'pg_class'::regclass AND d.refobjsubid > 0);
END
$function$;

-- Update the recorded names of a source: the name of its table, and its rules with the present
-- names. Rules that are not kept are compiled again from their text; that raises an error if the
-- text is no longer valid.
CREATE FUNCTION syncd.remember(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    a syncd.attachments;
    rules syncd.present_rules;
BEGIN
    SELECT * INTO a FROM syncd.attachments AS t
    WHERE t.id = source_id AND EXISTS (SELECT FROM pg_class AS c WHERE c.oid = t.source) FOR UPDATE;
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
    SET schema_name = n.nspname, table_name = c.relname, project = rules.project,
        dataset = rules.dataset, live = rules.live
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
    WHERE t.id = source_id AND c.oid = a.source
      AND (t.schema_name, t.table_name, t.project, t.dataset, t.live)
          IS DISTINCT FROM (n.nspname, c.relname, rules.project, rules.dataset, rules.live);
END
$function$;

-- Compile the rules of sources attached before this revision. A rule whose text is no longer valid
-- is left as it is: the service reports it.
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

-- Roles of services keep their right to read: it includes this revision's tables and sequence.
DO $grant$
DECLARE
    role text;
    things text;
BEGIN
    FOR role, things IN
        SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC'
                        ELSE a.grantee::pg_catalog.regrole::text END, k.things
        FROM (VALUES ('syncd.outbox_id', 'SEQUENCE syncd.doubts'),
                     ('syncd.attachments', 'syncd.rules, syncd.present_rules')) AS k (known, things)
        JOIN pg_catalog.pg_class AS c ON c.oid = k.known::pg_catalog.regclass,
        LATERAL pg_catalog.aclexplode(c.relacl) AS a
        WHERE a.privilege_type = 'SELECT' AND a.grantee <> c.relowner LOOP
        EXECUTE pg_catalog.format('GRANT SELECT ON %s TO %s', things, role);
    END LOOP;
END
$grant$;
