-- Attach and detach since revision 0002.

-- Record a source in syncd's own tables, with the rules that the caller has compiled, and create
-- its trigger functions.
CREATE OR REPLACE FUNCTION syncd.register(source regclass, key text[], key_types text[],
                                          vector text, vector_type text, dimension integer,
                                          project text, dataset text, live text, metric text,
                                          columns text[], arguments jsonb) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    source_id integer;
BEGIN
    PERFORM syncd.check_session_owner(source);
    INSERT INTO syncd.attachments (source, key, key_types, vector, vector_type, dimension, project,
                                   dataset, live, metric, columns, column_kinds, arguments,
                                   schema_name, table_name, attached_schema, attached_name,
                                   attached_rules)
    SELECT source, key, key_types, vector, vector_type, dimension, project, dataset, live, metric,
           columns,
           ARRAY(SELECT syncd.column_kind(source, c.name)
                 FROM unnest(columns) WITH ORDINALITY AS c (name, place) ORDER BY c.place),
           arguments,
           n.nspname, r.relname, n.nspname, r.relname, ARRAY[project, dataset, live]
    FROM pg_class AS r JOIN pg_namespace AS n ON n.oid = r.relnamespace WHERE r.oid = source
    RETURNING id INTO source_id;
    PERFORM syncd.keep_rules(source_id);
    PERFORM syncd.make_capture(source_id, key);
    PERFORM syncd.mark(source_id, 'a');
    RETURN source_id;
END
$function$;

-- The attachment of a table, for a caller that may not read syncd's tables.
DROP FUNCTION syncd.attachment(regclass);
CREATE FUNCTION syncd.attachment(source regclass, OUT id integer, OUT arguments jsonb,
                                 OUT project text, OUT dataset text, OUT live text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, syncd
AS $function$
    SELECT a.id, a.arguments, p.project, p.dataset, p.live
    FROM syncd.attachments AS a JOIN syncd.present_rules AS p ON p.id = a.id
    WHERE a.source = attachment.source
$function$;

DROP FUNCTION syncd.attach(text, text[], text, text, text, text, text, text[]);
CREATE FUNCTION syncd.attach(
    source text,
    key text[] DEFAULT NULL,
    vector text DEFAULT NULL,
    project text DEFAULT $$'default'$$,
    dataset text DEFAULT NULL,
    live text DEFAULT 'true',
    metric text DEFAULT 'cosine',
    columns text[] DEFAULT '{}',
    -- For a table with a writer that fires only row triggers and that syncd cannot detect: see
    -- syncd.fires_per_row.
    row_triggers boolean DEFAULT false,
    OUT rows bigint, OUT live_rows bigint, OUT datasets bigint)
-- The caller's search path and text forms stay: names and expressions are written for them.
LANGUAGE plpgsql SET quote_all_identifiers = off
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
    old record;
    expressions constant text[] := ARRAY['project', 'dataset', 'live'];
    new_id integer;
    bad text;
    context text;
BEGIN
    PERFORM syncd.check_source(relation);
    SELECT c.relname INTO table_name FROM pg_catalog.pg_class AS c WHERE c.oid = relation;
    SELECT k.names, k.types INTO key_names, key_types FROM syncd.key_columns(relation, key) AS k;
    SELECT v.name, v.type, v.dimension INTO vector_name, vector_type, dimension
    FROM syncd.vector_column(relation, vector) AS v;
    IF metric IS NULL OR metric NOT IN ('cosine', 'l2', 'ip') THEN
        RAISE EXCEPTION 'there is no metric %', pg_catalog.quote_nullable(metric)
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = pg_catalog.format(
                      'SELECT * FROM syncd.attach(%L, metric => ''cosine''); there are cosine, l2 '
                      'or ip.', relation::text);
    END IF;
    PERFORM syncd.check_columns(relation, columns);
    dataset := coalesce(dataset, pg_catalog.quote_literal(table_name));
    project := coalesce(project, $$'default'$$);
    live := coalesce(live, 'true');
    columns := coalesce(columns, '{}');
    PERFORM syncd.make_like(relation);
    compiled_project := syncd.compile_expression(relation, project, 'text', 'project');
    compiled_dataset := syncd.compile_expression(relation, dataset, 'text', 'dataset');
    compiled_live := syncd.compile_expression(relation, live, 'boolean', 'live');
    given := pg_catalog.jsonb_build_object('key', key_names, 'vector', vector_name, 'project',
                                           project, 'dataset', dataset, 'live', live,
                                           'metric', metric, 'columns', columns);
    IF row_triggers THEN  -- only then: an earlier revision's attachment has no such entry
        given := given || '{"row_triggers": true}';
    END IF;

    BEGIN
        EXECUTE pg_catalog.format(
            'SELECT pg_catalog.count(*), '
            'pg_catalog.count(*) FILTER (WHERE %1$s AND %2$I IS NOT NULL), '
            'pg_catalog.count(DISTINCT pg_catalog.json_build_array(%3$s, %4$s)::text) '
            'FILTER (WHERE %1$s AND %2$I IS NOT NULL) FROM %5$s',
            compiled_live, vector_name, compiled_project, compiled_dataset, relation)
            INTO rows, live_rows, datasets;
    EXCEPTION WHEN OTHERS THEN
        GET STACKED DIAGNOSTICS bad = MESSAGE_TEXT;
        RAISE EXCEPTION 'the rows of table % cannot be counted: %', relation, bad
            USING ERRCODE = SQLSTATE,
            DETAIL = pg_catalog.format('live: %s; project: %s; dataset: %s', live, project,
                                       dataset),
            HINT = 'Each of these must have a value for every row: guard a part that can fail with '
                   'CASE, or repair the rows.';
    END;
    IF rows > 0 AND live_rows = 0 THEN
        RAISE WARNING 'none of the % rows of % is live: the rule is % and % IS NOT NULL', rows,
            relation, live, pg_catalog.quote_ident(vector_name)
            USING HINT = pg_catalog.format(
                'A search finds nothing until a row is live. If the rule is wrong: '
                'SELECT * FROM syncd.attach(%L, live => ''true'');', relation::text);
    END IF;

    SELECT * INTO old FROM syncd.attachment(relation) AS a;
    -- The compiled text counts: under another search_path, or with another function of the same
    -- name, the same text may have another meaning now.
    IF (old.arguments OPERATOR(pg_catalog.-) expressions)
       OPERATOR(pg_catalog.=) (given OPERATOR(pg_catalog.-) expressions)
       AND syncd.writes_keys_as(old.id, key_types)
       AND (old.project, old.dataset, old.live)
           OPERATOR(pg_catalog.=) (compiled_project, compiled_dataset, compiled_live) THEN
        DROP TABLE pg_temp.syncd_like;
        PERFORM syncd.mend(source);
        RETURN;
    END IF;
    IF old.id IS NOT NULL THEN
        PERFORM syncd.drop_triggers(relation, old.id);
        PERFORM syncd.unregister(old.id);
    END IF;
    new_id := syncd.register(relation, key_names, key_types, vector_name, vector_type, dimension,
                             compiled_project, compiled_dataset,
                             compiled_live, metric, columns, given);
    DROP TABLE pg_temp.syncd_like;
    PERFORM syncd.mend_triggers(relation, new_id);
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS bad = MESSAGE_TEXT, context = PG_EXCEPTION_CONTEXT;
    PERFORM syncd.blame_event_trigger(bad, context);
    RAISE;
END
$function$;

CREATE OR REPLACE FUNCTION syncd.detach(source text) RETURNS boolean
LANGUAGE plpgsql SET quote_all_identifiers = off
AS $function$
DECLARE
    relation pg_catalog.regclass := pg_catalog.to_regclass(source);
    source_id integer;
    message text;
    context text;
BEGIN
    -- The table was dropped with its triggers: syncd.sources shows its number.
    IF relation IS NULL THEN
        IF source !~ '^[0-9]+$' THEN
            RAISE EXCEPTION 'table % does not exist', source USING ERRCODE = 'undefined_table',
                HINT = 'SELECT source FROM syncd.sources; it shows a dropped table by its number: '
                       'detach it by that number.';
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
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, context = PG_EXCEPTION_CONTEXT;
    PERFORM syncd.blame_event_trigger(message, context);
    RAISE;
END
$function$;

-- Attachments of dropped tables that had a table's name, at their attach or last, the newest first.
-- A table that is exchanged for another one is renamed before it is dropped.
CREATE FUNCTION syncd.orphans(relation regclass, OUT id integer, OUT arguments jsonb)
    RETURNS SETOF record
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, syncd
AS $function$
    SELECT a.id, a.arguments
    FROM syncd.attachments AS a JOIN pg_class AS c ON c.relname IN (a.table_name, a.attached_name)
    JOIN pg_namespace AS n ON n.oid = c.relnamespace
        AND (n.nspname = a.schema_name OR n.nspname = a.attached_schema
             AND c.relname = a.attached_name)
    WHERE c.oid = relation AND NOT EXISTS (SELECT FROM pg_class AS o WHERE o.oid = a.source)
    ORDER BY a.id DESC
$function$;

-- A table that was dropped and created again is another table: attach it with the arguments of the
-- dropped one, and detach that one.
CREATE FUNCTION syncd.reattach(source text, OUT rows bigint, OUT live_rows bigint,
                               OUT datasets bigint)
LANGUAGE plpgsql SET quote_all_identifiers = off
AS $function$
DECLARE
    relation pg_catalog.regclass := syncd.table_of(source);
    given jsonb := (SELECT o.arguments FROM syncd.orphans(relation) AS o LIMIT 1);
BEGIN
    IF given IS NULL THEN
        RAISE EXCEPTION 'no table named % was attached and dropped', relation
            USING ERRCODE = 'invalid_parameter_value',
            HINT = pg_catalog.format('SELECT * FROM syncd.attach(%L);', relation::text);
    END IF;
    PERFORM syncd.check_owner(relation);
    IF (SELECT a.id FROM syncd.attachment(relation) AS a) IS NULL THEN
        SELECT a.rows, a.live_rows, a.datasets INTO rows, live_rows, datasets
        FROM syncd.attach(source,
                          key => ARRAY(SELECT pg_catalog.jsonb_array_elements_text(given -> 'key')),
                          vector => given ->> 'vector',
                          project => given ->> 'project', dataset => given ->> 'dataset',
                          live => given ->> 'live', metric => given ->> 'metric',
                          columns => ARRAY(
                              SELECT pg_catalog.jsonb_array_elements_text(given -> 'columns')),
                          row_triggers => coalesce((given ->> 'row_triggers')::boolean, false)
                          ) AS a;
    END IF;
    PERFORM syncd.unregister(o.id) FROM syncd.orphans(relation) AS o;
END
$function$;
