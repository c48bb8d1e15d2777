-- Attach and detach as they are since revision 0002.

-- A user's expression over a row, as Postgres understands it: proved to be one immutable expression by indexing it over an empty copy of
-- the source, and printed back with every name's schema, so that it means the same under any search_path.
CREATE OR REPLACE FUNCTION syncd.compile_expression(source regclass, expression text, type text, role text) RETURNS text
LANGUAGE plpgsql
AS $function$
DECLARE
    caller_path text := pg_catalog.current_setting('search_path');
    compiled text;
    cause text;
    one_statement refcursor;
BEGIN
    BEGIN
        EXECUTE pg_catalog.format('CREATE TEMPORARY TABLE syncd_like (LIKE %s)', source);
        -- A cursor refuses text that ends the statement and begins another, before any of it runs.
        OPEN one_statement FOR EXECUTE pg_catalog.format('SELECT (((%s)::%s)) FROM pg_temp.syncd_like', expression, type);
        CLOSE one_statement;
        EXECUTE pg_catalog.format('CREATE INDEX syncd_like_expression ON pg_temp.syncd_like (((%s)::%s))', expression, type);
    EXCEPTION WHEN OTHERS THEN
        GET STACKED DIAGNOSTICS cause = MESSAGE_TEXT;
        RAISE EXCEPTION 'the % expression cannot be used: %', role, cause
            USING ERRCODE = 'invalid_parameter_value', DETAIL = expression,
                  HINT = 'It must be one immutable expression over the columns of ' || source::text
                         || ' that can be cast to ' || type || '.';
    END;
    PERFORM pg_catalog.set_config('search_path', 'pg_catalog', true);
    -- A plain column is no expression to an index; more than one column, a condition or another type was more than one expression.
    SELECT CASE WHEN i.indnatts = 1 AND i.indpred IS NULL AND (SELECT a.atttypid FROM pg_catalog.pg_attribute AS a
                                                               WHERE a.attrelid = i.indexrelid AND a.attnum = 1) = type::pg_catalog.regtype
                THEN coalesce(pg_catalog.pg_get_expr(i.indexprs, i.indrelid),
                              (SELECT pg_catalog.format('%I', a.attname) FROM pg_catalog.pg_attribute AS a
                               WHERE a.attrelid = i.indrelid AND a.attnum = i.indkey[0])) END
    INTO compiled
    FROM pg_catalog.pg_index AS i
    WHERE i.indexrelid = (SELECT c.oid FROM pg_catalog.pg_class AS c
                          WHERE c.relname = 'syncd_like_expression' AND c.relnamespace = pg_catalog.pg_my_temp_schema());
    PERFORM pg_catalog.set_config('search_path', caller_path, true);
    DROP TABLE pg_temp.syncd_like;
    IF compiled IS NULL THEN
        RAISE EXCEPTION 'the % expression is more than one expression', role USING ERRCODE = 'invalid_parameter_value',
            DETAIL = expression, HINT = 'Give one expression over the columns of ' || source::text || '.';
    END IF;
    RETURN pg_catalog.format('(%s)', compiled);
END
$function$;

-- Is this a table that can be watched? Raises when it is not.
CREATE OR REPLACE FUNCTION syncd.check_source(source regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    c pg_class;
BEGIN
    SELECT * INTO STRICT c FROM pg_class WHERE oid = source;
    IF c.relkind NOT IN ('r', 'p') THEN
        RAISE EXCEPTION '% is not a table', source USING ERRCODE = 'wrong_object_type', HINT = 'Attach the table that holds the rows.';
    ELSIF c.relispartition THEN
        RAISE EXCEPTION '% is a partition of %', source, pg_partition_root(source) USING ERRCODE = 'feature_not_supported',
            HINT = format('Attach the whole table: SELECT * FROM syncd.attach(%L);', pg_partition_root(source)::text);
    ELSIF c.relpersistence = 't' THEN
        RAISE EXCEPTION '% is a temporary table, which only its own session can read', source USING ERRCODE = 'wrong_object_type',
            HINT = 'Attach a permanent table.';
    ELSIF c.relpersistence = 'u' THEN
        RAISE EXCEPTION '% is an unlogged table, which a crash of the server empties without a trace', source
            USING ERRCODE = 'wrong_object_type', HINT = format('ALTER TABLE %s SET LOGGED;', source);
    ELSIF c.relnamespace = 'syncd'::regnamespace AND c.relname <> 'embeddings' OR c.relnamespace = 'pg_catalog'::regnamespace THEN
        RAISE EXCEPTION '% belongs to the system', source USING ERRCODE = 'wrong_object_type', HINT = 'Attach a table of your own.';
    ELSIF c.relkind = 'p' THEN
        PERFORM syncd.check_partitions(source);
    ELSIF EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhparent = source) THEN
        RAISE EXCEPTION 'table % has inheritance children, whose rows its triggers do not see', source
            USING ERRCODE = 'feature_not_supported', HINT = 'Attach each child by itself.';
    END IF;
    PERFORM syncd.check_owner(source);
END
$function$;

-- Note a source in syncd's own tables, and make its trigger functions.
CREATE OR REPLACE FUNCTION syncd.register(source regclass, key text[], key_types text[], vector text, vector_type text, dimension integer,
                               project text, dataset text, live text, metric text, columns text[], arguments jsonb) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    source_id integer;
BEGIN
    PERFORM syncd.check_session_owner(source);
    INSERT INTO syncd.attachments (source, key, key_types, vector, vector_type, dimension, project, dataset, live, metric, columns, column_kinds, arguments)
    VALUES (source, key, key_types, vector, vector_type, dimension, project, dataset, live, metric, columns,
            ARRAY(SELECT syncd.column_kind(source, c.name) FROM unnest(columns) WITH ORDINALITY AS c (name, place) ORDER BY c.place), arguments)
    RETURNING id INTO source_id;
    PERFORM syncd.make_capture(source_id, key);
    PERFORM syncd.mark(source_id, 'a');
    RETURN source_id;
END
$function$;

CREATE OR REPLACE FUNCTION syncd.attach(
    source text,
    key text[] DEFAULT NULL,
    vector text DEFAULT NULL,
    project text DEFAULT $$'default'$$,
    dataset text DEFAULT NULL,
    live text DEFAULT 'true',
    metric text DEFAULT 'cosine',
    columns text[] DEFAULT '{}',
    OUT rows bigint, OUT live_rows bigint, OUT datasets bigint)
LANGUAGE plpgsql
AS $function$
DECLARE
    relation pg_catalog.regclass := syncd.table_of(source);
    table_name text;
    key_names text[];
    key_types text[];
    vector_name text;
    vector_type text;
    dimension integer;
    compiled_project text;
    compiled_dataset text;
    compiled_live text;
    given jsonb;
    old_id integer;
    old_arguments jsonb;
    new_id integer;
    bad text;
BEGIN
    PERFORM syncd.check_source(relation);
    SELECT c.relname INTO table_name FROM pg_catalog.pg_class AS c WHERE c.oid = relation;
    SELECT k.names, k.types INTO key_names, key_types FROM syncd.key_columns(relation, key) AS k;
    SELECT v.name, v.type, v.dimension INTO vector_name, vector_type, dimension FROM syncd.vector_column(relation, vector) AS v;
    IF metric IS NULL OR metric NOT IN ('cosine', 'l2', 'ip') THEN
        RAISE EXCEPTION 'there is no metric %', pg_catalog.quote_nullable(metric)
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = pg_catalog.format('SELECT * FROM syncd.attach(%L, metric => ''cosine''); there are cosine, l2 or ip.', relation::text);
    END IF;
    PERFORM syncd.check_columns(relation, columns);
    dataset := coalesce(dataset, pg_catalog.quote_literal(table_name));
    project := coalesce(project, $$'default'$$);
    live := coalesce(live, 'true');
    columns := coalesce(columns, '{}');
    compiled_project := syncd.compile_expression(relation, project, 'text', 'project');
    compiled_dataset := syncd.compile_expression(relation, dataset, 'text', 'dataset');
    compiled_live := syncd.compile_expression(relation, live, 'boolean', 'live');
    given := pg_catalog.jsonb_build_object('key', key_names, 'vector', vector_name, 'project', project, 'dataset', dataset, 'live', live,
                                           'metric', metric, 'columns', columns);

    BEGIN
        EXECUTE pg_catalog.format(
            'SELECT pg_catalog.count(*), pg_catalog.count(*) FILTER (WHERE %1$s AND %2$I IS NOT NULL), '
            'pg_catalog.count(DISTINCT pg_catalog.json_build_array(%3$s, %4$s)::text) FILTER (WHERE %1$s AND %2$I IS NOT NULL) FROM %5$s',
            compiled_live, vector_name, compiled_project, compiled_dataset, relation)
            INTO rows, live_rows, datasets;
    EXCEPTION WHEN OTHERS THEN
        GET STACKED DIAGNOSTICS bad = MESSAGE_TEXT;
        RAISE EXCEPTION 'the rows of table % cannot be counted: %', relation, bad USING ERRCODE = SQLSTATE,
            DETAIL = pg_catalog.format('live: %s; project: %s; dataset: %s', live, project, dataset),
            HINT = 'Each of these must have a value for every row: guard what can fail with CASE, or mend the rows.';
    END;
    IF rows > 0 AND live_rows = 0 THEN
        RAISE WARNING 'none of the % rows of % is live: the rule is % and % IS NOT NULL', rows, relation, live, pg_catalog.quote_ident(vector_name)
            USING HINT = pg_catalog.format('Nothing will be found until a row is. If the rule is wrong: SELECT * FROM syncd.attach(%L, live => ''true'');',
                                           relation::text);
    END IF;

    SELECT a.id, a.arguments INTO old_id, old_arguments FROM syncd.attachment(relation) AS a;
    IF old_id IS NOT NULL AND old_arguments = given THEN  -- the same again: nothing to change, but perhaps to mend
        PERFORM syncd.mend(source);
        RETURN;
    END IF;
    IF old_id IS NOT NULL THEN
        PERFORM syncd.drop_triggers(relation, old_id);
        PERFORM syncd.unregister(old_id);
    END IF;
    new_id := syncd.register(relation, key_names, key_types, vector_name, vector_type, dimension, compiled_project, compiled_dataset,
                             compiled_live, metric, columns, given);
    PERFORM syncd.mend_triggers(relation, new_id);
END
$function$;

CREATE OR REPLACE FUNCTION syncd.detach(source text) RETURNS boolean
LANGUAGE plpgsql
AS $function$
DECLARE
    relation pg_catalog.regclass := pg_catalog.to_regclass(source);
    source_id integer;
BEGIN
    IF relation IS NULL THEN  -- the table itself is gone: its triggers went with it, and syncd.sources shows its number
        IF source !~ '^[0-9]+$' THEN
            RAISE EXCEPTION 'table % does not exist', source USING ERRCODE = 'undefined_table',
                HINT = 'SELECT source FROM syncd.sources; a table that was dropped is there by its number, by which it is detached.';
        END IF;
        relation := source::pg_catalog.oid::pg_catalog.regclass;
    END IF;
    SELECT a.id INTO source_id FROM syncd.attachment(relation) AS a;
    IF source_id IS NULL THEN
        RETURN false;
    END IF;
    IF EXISTS (SELECT FROM pg_catalog.pg_class AS c WHERE c.oid = relation) THEN
        PERFORM syncd.check_owner(relation);
        PERFORM syncd.drop_triggers(relation, source_id);
    END IF;
    PERFORM syncd.unregister(source_id);
    RETURN true;
END
$function$;
