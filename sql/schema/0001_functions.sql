-- What users call: attach, detach, token. attach and detach run with their caller's rights; the helpers with SECURITY DEFINER write
-- syncd's own tables for them.

-- A user's expression over a row, as Postgres understands it: proved to be one immutable expression by indexing it over an empty copy of
-- the source, and printed back with every name's schema, so that it means the same under any search_path.
CREATE FUNCTION syncd.compile_expression(source regclass, expression text, type text, role text) RETURNS text
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

-- The vector column: the one named, else one called embedding, else the only one of a vector type.
CREATE FUNCTION syncd.vector_column(source regclass, vector text, OUT name text, OUT type text, OUT dimension integer)
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    candidates text[];
    extension_types text[] := ARRAY['vector', 'halfvec'];
    advice text;
BEGIN
    SELECT array_agg(a.attname ORDER BY a.attnum) INTO candidates
    FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = source AND a.attnum > 0 AND NOT a.attisdropped
      AND (a.atttypid IN ('real[]'::regtype, 'double precision[]'::regtype) OR t.typname = ANY (extension_types)
           OR a.atttypid = 'bytea'::regtype AND a.attname IN (vector, 'embedding'));
    advice := CASE WHEN candidates IS NULL
        THEN format('ALTER TABLE %s ADD COLUMN embedding real[]; a vector is of type vector, halfvec, real[], double precision[] or bytea.', source)
        ELSE format('SELECT * FROM syncd.attach(%L, vector => %L); the candidates are: %s', source, candidates[1],
                    array_to_string(candidates, ', ')) END;
    IF vector IS NULL THEN
        IF 'embedding' = ANY (candidates) THEN
            name := 'embedding';
        ELSIF cardinality(candidates) = 1 THEN
            name := candidates[1];
        ELSE
            RAISE EXCEPTION 'table % has % that could hold the vector', source,
                    CASE WHEN candidates IS NULL THEN 'no column' ELSE 'several columns' END
                USING ERRCODE = 'invalid_parameter_value', HINT = advice;
        END IF;
    ELSE
        name := vector;
        IF NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = source AND a.attname = vector AND a.attnum > 0
                       AND NOT a.attisdropped) THEN
            RAISE EXCEPTION 'table % has no column %', source, quote_ident(vector)
                USING ERRCODE = 'undefined_column', HINT = advice;
        ELSIF NOT vector = ANY (coalesce(candidates, '{}')) THEN
            RAISE EXCEPTION 'column % of table % is of type %, which holds no vector', quote_ident(vector), source,
                    (SELECT format_type(a.atttypid, a.atttypmod) FROM pg_attribute AS a WHERE a.attrelid = source AND a.attname = vector)
                USING ERRCODE = 'datatype_mismatch',
                      HINT = 'A vector is of type vector, halfvec, real[], double precision[] or bytea (little-endian float32).';
        END IF;
    END IF;
    SELECT CASE a.atttypid WHEN 'real[]'::regtype THEN 'real[]' WHEN 'double precision[]'::regtype THEN 'double precision[]'
                           WHEN 'bytea'::regtype THEN 'bytea' ELSE t.typname::text END,
           CASE WHEN t.typname = ANY (extension_types) AND a.atttypmod > 0 THEN a.atttypmod END
    INTO type, dimension
    FROM pg_attribute AS a JOIN pg_type AS t ON t.oid = a.atttypid
    WHERE a.attrelid = source AND a.attname = name;
END
$function$;

-- The key's columns: those named, else the primary key; checked to be unique, not null and of a type that syncd knows.
CREATE FUNCTION syncd.key_columns(source regclass, key text[], OUT names text[], OUT types text[])
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    known constant regtype[] := ARRAY['smallint', 'integer', 'bigint', 'uuid', 'text', 'character varying']::regtype[];
    advice constant text := format('SELECT * FROM syncd.attach(%L, key => ARRAY[''COLUMN'']);', source);
    bad text;
BEGIN
    names := key;
    IF names IS NULL THEN
        SELECT array_agg(a.attname::text ORDER BY k.place) INTO names
        FROM pg_index AS i, unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, place)
        JOIN pg_attribute AS a ON a.attnum = k.attnum
        WHERE i.indrelid = source AND i.indisprimary AND a.attrelid = source;
        IF names IS NULL THEN
            RAISE EXCEPTION 'table % has no primary key', source
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = format('ALTER TABLE %s ADD PRIMARY KEY (COLUMN); or name the columns of a unique key: ', source) || advice;
        END IF;
    END IF;
    SELECT quote_ident(n.name) INTO bad FROM unnest(names) AS n (name)
    WHERE NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = source AND a.attname = n.name AND a.attnum > 0 AND NOT a.attisdropped)
    LIMIT 1;
    IF bad IS NOT NULL OR cardinality(names) = 0 THEN
        RAISE EXCEPTION 'table % has no column %', source, coalesce(bad, 'for an empty key') USING ERRCODE = 'undefined_column',
            HINT = 'Name the columns of a unique key: ' || advice;
    END IF;
    SELECT format('%I of type %s', a.attname, format_type(a.atttypid, a.atttypmod)) INTO bad
    FROM unnest(names) AS n (name) JOIN pg_attribute AS a ON a.attname = n.name
    WHERE a.attrelid = source AND NOT a.atttypid = ANY (known) LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'key column % cannot be a key', bad USING ERRCODE = 'datatype_mismatch',
            HINT = 'Key columns are of type smallint, integer, bigint, uuid, text or varchar.';
    END IF;
    SELECT format('%I', a.attname) INTO bad
    FROM unnest(names) AS n (name) JOIN pg_attribute AS a ON a.attname = n.name
    WHERE a.attrelid = source AND a.attgenerated = 'v' LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'key column % of table % is a virtual generated column, which no unique index can hold', bad, source
            USING ERRCODE = 'feature_not_supported', HINT = 'Make it GENERATED ALWAYS AS (...) STORED, or take others: ' || advice;
    END IF;
    SELECT format('%I', a.attname) INTO bad
    FROM unnest(names) AS n (name) JOIN pg_attribute AS a ON a.attname = n.name
    WHERE a.attrelid = source AND NOT a.attnotnull LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'key column % of table % may be NULL', bad, source USING ERRCODE = 'invalid_parameter_value',
            HINT = format('ALTER TABLE %s ALTER COLUMN %s SET NOT NULL;', source, bad);
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_index AS i
        WHERE i.indrelid = source AND i.indisunique AND i.indisvalid AND i.indpred IS NULL AND i.indexprs IS NULL
          AND (SELECT array_agg(a.attname::text ORDER BY k.place) FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, place)
               JOIN pg_attribute AS a ON a.attrelid = source AND a.attnum = k.attnum
               WHERE k.place <= i.indnkeyatts) = names) THEN
        RAISE EXCEPTION 'no unique index of table % has exactly the key columns (%)', source, array_to_string(names, ', ')
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = format('CREATE UNIQUE INDEX ON %s (%s);', source,
                                (SELECT string_agg(quote_ident(n.name), ', ' ORDER BY n.place) FROM unnest(names) WITH ORDINALITY AS n (name, place)));
    END IF;
    SELECT array_agg(format_type(a.atttypid, NULL) ORDER BY n.place) INTO types
    FROM unnest(names) WITH ORDINALITY AS n (name, place) JOIN pg_attribute AS a ON a.attname = n.name
    WHERE a.attrelid = source;
END
$function$;

CREATE FUNCTION syncd.check_owner(source regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog
AS $function$
BEGIN
    IF NOT pg_has_role((SELECT c.relowner FROM pg_class AS c WHERE c.oid = source), 'USAGE') THEN
        RAISE EXCEPTION 'must be owner of table %', source USING ERRCODE = 'insufficient_privilege',
            HINT = (SELECT format('Connect as %1$I, the owner of the table: SYNCD_DSN="... user=%1$I"', pg_get_userbyid(c.relowner))
                    FROM pg_class AS c WHERE c.oid = source);
    END IF;
END
$function$;

-- Is this a table that can be watched? Raises when it is not.
CREATE FUNCTION syncd.check_source(source regclass) RETURNS void
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

-- How a search compares a column's values: NULL where the column is not there, empty where it cannot. A domain is what it is made of.
CREATE FUNCTION syncd.column_kind(source oid, column_name text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, syncd
AS $function$
    WITH RECURSIVE bases AS (
        SELECT a.atttypid AS type, a.attcollation AS collation FROM pg_attribute AS a
        WHERE a.attrelid = source AND a.attname = column_name AND a.attnum > 0 AND NOT a.attisdropped
        UNION ALL
        SELECT t.typbasetype, b.collation FROM bases AS b JOIN pg_type AS t ON t.oid = b.type WHERE t.typtype = 'd'
    )
    SELECT CASE WHEN EXISTS (SELECT FROM pg_collation AS c WHERE c.oid = b.collation AND NOT c.collisdeterministic) THEN ''
                WHEN t.typtype = 'e' THEN 'enum'
                WHEN e.typtype = 'e' THEN 'text_array'
                ELSE coalesce((SELECT k.kind FROM (VALUES
                    ('smallint', 'integer'), ('integer', 'integer'), ('bigint', 'integer'), ('real', 'real'), ('double precision', 'double'),
                    ('numeric', 'numeric'), ('text', 'text'), ('character varying', 'text'), ('character', 'character'), ('boolean', 'boolean'),
                    ('uuid', 'uuid'), ('timestamptz', 'instant'), ('timestamp', 'timestamp'), ('date', 'date'), ('text[]', 'text_array'),
                    ('character varying[]', 'text_array'), ('smallint[]', 'integer_array'), ('integer[]', 'integer_array'),
                    ('bigint[]', 'integer_array'), ('jsonb', 'json')) AS k (type, kind) WHERE k.type::regtype = t.oid), '') END
    FROM bases AS b JOIN pg_type AS t ON t.oid = b.type LEFT JOIN pg_type AS e ON e.typarray = t.oid AND t.typcategory = 'A'
    WHERE t.typtype <> 'd'
$function$;

-- The columns that searches may filter on: of the table, of a type that syncd can compare, each once, and none with a filter's own word for a name.
CREATE FUNCTION syncd.check_columns(source regclass, columns text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    bad text;
BEGIN
    SELECT coalesce(quote_ident(c.name), 'NULL') INTO bad FROM unnest(columns) AS c (name) WHERE syncd.column_kind(source, c.name) IS NULL LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'table % has no column %', source, bad USING ERRCODE = 'undefined_column',
            HINT = format('SELECT * FROM syncd.attach(%L, columns => ARRAY[''COLUMN'']); the table has: %s', source,
                          (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute AS a
                           WHERE a.attrelid = source AND a.attnum > 0 AND NOT a.attisdropped));
    END IF;
    SELECT quote_ident(c.name) INTO bad FROM unnest(columns) AS c (name) GROUP BY c.name HAVING count(*) > 1 LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'column % is named twice in columns', bad USING ERRCODE = 'duplicate_column', HINT = 'Name each column once.';
    END IF;
    SELECT quote_ident(c.name) INTO bad FROM unnest(columns) AS c (name) WHERE c.name IN ('and', 'or', 'not') LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'column % cannot be filtered on: in a filter its name means something else', bad
            USING ERRCODE = 'reserved_name', HINT = format('ALTER TABLE %s RENAME COLUMN %s TO ...; or leave it out.', source, bad);
    END IF;
    SELECT format('%I of type %s', a.attname, format_type(a.atttypid, a.atttypmod)) INTO bad
    FROM unnest(columns) AS c (name) JOIN pg_attribute AS a ON a.attrelid = source AND a.attname = c.name
    WHERE syncd.column_kind(source, c.name) = '' LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'column % cannot be filtered on', bad USING ERRCODE = 'datatype_mismatch',
            HINT = 'A column to filter on is a number, text, varchar, char, enum, boolean, uuid, timestamp, timestamptz, date, jsonb, or an array of '
                   'text, varchar, enum or integers, and of a deterministic collation.';
    END IF;
END
$function$;

-- The same for the partitions of a table: they are its rows.
CREATE FUNCTION syncd.check_partitions(source regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    bad regclass;
    partitions bigint;
    locks bigint;
    room bigint := current_setting('max_locks_per_transaction')::bigint
                   * (current_setting('max_connections')::bigint + current_setting('max_prepared_transactions')::bigint);
BEGIN
    SELECT t.relation INTO bad FROM syncd.tables_of(source) AS t WHERE t.kind NOT IN ('r', 'p') LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'partition % of table % is a foreign table, whose rows change on another server', bad, source
            USING ERRCODE = 'feature_not_supported', HINT = 'Attach the table on the server where it is written.';
    END IF;
    SELECT t.relation INTO bad FROM syncd.tables_of(source) AS t JOIN pg_class AS c ON c.oid = t.relation
    WHERE c.relpersistence <> 'p' LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'partition % of table % is unlogged: a crash of the server empties it without a trace', bad, source
            USING ERRCODE = 'wrong_object_type', HINT = format('ALTER TABLE %s SET LOGGED;', bad);
    END IF;
    PERFORM syncd.check_owner(t.relation) FROM syncd.tables_of(source) AS t;
    -- Counting and reading the rows locks every partition and its indexes in one transaction, making the triggers every partition. A full lock
    -- table fails the transactions of others, so half must be left to them.
    SELECT count(*) - 1, sum(1 + (SELECT count(*) FROM pg_index AS i WHERE i.indrelid = t.relation)) INTO partitions, locks
    FROM syncd.tables_of(source) AS t;
    IF locks > room / 2 THEN
        RAISE EXCEPTION 'reading the % partitions of table % takes % locks, and the server has room for %', partitions, source, locks, room
            USING ERRCODE = 'configuration_limit_exceeded',
                  HINT = format('ALTER SYSTEM SET max_locks_per_transaction = %s; and restart the server.',
                                locks * 2 / (room / current_setting('max_locks_per_transaction')::bigint) + 1);
    END IF;
END
$function$;

-- Take the lock that a change of triggers needs, on partitions too, without making the table's writers wait behind us for long: CREATE TRIGGER
-- and DROP TRIGGER queue every later writer while they wait for theirs.
CREATE FUNCTION syncd.lock_source(source regclass, mode text) RETURNS void
LANGUAGE plpgsql
AS $function$
DECLARE
    caller_timeout text := pg_catalog.current_setting('lock_timeout');
BEGIN
    FOR attempt IN 1..60 LOOP
        BEGIN
            PERFORM pg_catalog.set_config('lock_timeout', '100ms', true);
            EXECUTE pg_catalog.format('LOCK TABLE %s IN %s MODE', source, mode);
            PERFORM pg_catalog.set_config('lock_timeout', caller_timeout, true);
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            PERFORM pg_catalog.pg_sleep(0.05 + 0.2 * pg_catalog.random());
        END;
    END LOOP;
    RAISE EXCEPTION 'table % is locked by another transaction', source USING ERRCODE = 'lock_not_available',
        HINT = 'Find it with: SELECT pid, query FROM pg_stat_activity WHERE pid IN (SELECT pid FROM pg_locks WHERE relation = '
               || pg_catalog.quote_literal(source::text) || '::regclass), and attach again when it has ended.';
END
$function$;

-- The same check inside a SECURITY DEFINER function, where the caller is known only by its session.
CREATE FUNCTION syncd.check_session_owner(source regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog
AS $function$
DECLARE
    owner_id oid := (SELECT c.relowner FROM pg_class AS c WHERE c.oid = source);
BEGIN
    IF owner_id IS NOT NULL AND NOT pg_has_role(session_user, owner_id, 'MEMBER') THEN
        RAISE EXCEPTION 'must be owner of table %', source USING ERRCODE = 'insufficient_privilege',
            HINT = format('Connect as %1$I, the owner of the table: SYNCD_DSN="... user=%1$I"', pg_get_userbyid(owner_id));
    END IF;
END
$function$;

-- Note a source in syncd's own tables, and make its trigger functions.
CREATE FUNCTION syncd.register(source regclass, key text[], key_types text[], vector text, vector_type text, dimension integer,
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

CREATE FUNCTION syncd.unregister(source_id integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, syncd
AS $function$
BEGIN
    PERFORM syncd.check_session_owner((SELECT a.source FROM syncd.attachments AS a WHERE a.id = source_id));
    PERFORM syncd.drop_capture(source_id);
    DELETE FROM syncd.attachments AS a WHERE a.id = source_id;
    PERFORM syncd.mark(source_id, 'd');
END
$function$;

-- What a caller who may not read syncd's tables needs of them.
CREATE FUNCTION syncd.attachment(source regclass, OUT id integer, OUT arguments jsonb)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, syncd
AS $function$
    SELECT a.id, a.arguments FROM syncd.attachments AS a WHERE a.source = attachment.source
$function$;

-- Changes may have been missed while a trigger was not what it should be: have the source read again, as of a snapshot that sees it mended.
CREATE FUNCTION syncd.note_missed(source_id integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, syncd
AS $function$
BEGIN
    PERFORM syncd.check_session_owner((SELECT a.source FROM syncd.attachments AS a WHERE a.id = source_id));
    PERFORM syncd.mark(source_id, 'r');
END
$function$;

-- Drop a source's triggers. Those of a table that is no longer its partition go with their functions.
CREATE FUNCTION syncd.drop_triggers(source regclass, source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    found record;
BEGIN
    PERFORM syncd.lock_source(source, 'ACCESS EXCLUSIVE');
    FOR found IN SELECT t.tgname, t.tgrelid::regclass AS relation
                 FROM syncd.tables_of(source) AS s JOIN pg_trigger AS t ON t.tgrelid = s.relation
                 WHERE t.tgname LIKE format('syncd\_%s\_%%', source_id) AND t.tgparentid = 0 LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', found.tgname, found.relation);
    END LOOP;
END
$function$;

-- The one place that makes triggers: bring a source's to what syncd.missing_triggers finds nothing wrong with. Whether anything was changed,
-- and whether writes may have been missed before: not where only a new partition's own trigger, which sees its truncation, was missing.
CREATE FUNCTION syncd.mend_triggers(source regclass, source_id integer, OUT changed boolean, OUT missed boolean)
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    bad record;
    event text;
BEGIN
    changed := false;
    IF EXISTS (SELECT FROM syncd.missing_triggers(source_id) AS m
               WHERE m.problem IN ('missing', 'altered') AND m.trigger = format('syncd_%s_row', source_id)) THEN
        PERFORM syncd.lock_source(source, 'SHARE ROW EXCLUSIVE');  -- the row trigger is made for all partitions at once
    ELSE
        FOR bad IN SELECT DISTINCT m.relation FROM syncd.missing_triggers(source_id) AS m WHERE m.problem <> 'unwanted' ORDER BY 1 LOOP
            PERFORM syncd.lock_source(bad.relation, 'SHARE ROW EXCLUSIVE');
        END LOOP;
    END IF;
    -- Under the locks, since somebody else may have mended them meanwhile.
    missed := EXISTS (SELECT FROM syncd.missing_triggers(source_id) AS m
                      WHERE m.problem NOT IN ('missing', 'unwanted')
                         OR m.problem = 'missing' AND m.trigger <> format('syncd_%s_leaf', source_id));
    FOR bad IN SELECT * FROM syncd.missing_triggers(source_id) AS m WHERE m.problem IN ('missing', 'altered') LOOP
        event := split_part(bad.trigger, '_', 3);
        changed := true;
        CONTINUE WHEN event = 'row' AND bad.relation <> source;  -- made with the root's
        EXECUTE format('CREATE OR REPLACE TRIGGER %I AFTER %s ON %s %s EXECUTE FUNCTION syncd.%I()', bad.trigger,
                       CASE event WHEN 'row' THEN 'INSERT OR UPDATE OR DELETE' WHEN 'leaf' THEN 'TRUNCATE' ELSE event END, bad.relation,
                       CASE event WHEN 'insert' THEN 'REFERENCING NEW TABLE AS syncd_new FOR EACH STATEMENT'
                                  WHEN 'delete' THEN 'REFERENCING OLD TABLE AS syncd_old FOR EACH STATEMENT'
                                  WHEN 'update' THEN 'REFERENCING OLD TABLE AS syncd_old NEW TABLE AS syncd_new FOR EACH STATEMENT'
                                  WHEN 'row' THEN 'FOR EACH ROW' ELSE 'FOR EACH STATEMENT' END,
                       format('capture_%s_%s', source_id, event));
    END LOOP;
    -- ALWAYS: writes under session_replication_role = replica are changes like any other. Each partition is told by itself, since one whose
    -- trigger was disabled is not reached through its root on every version; a partition made later takes after its root.
    FOR bad IN SELECT * FROM syncd.missing_triggers(source_id) AS m WHERE m.problem IN ('disabled', 'not always') LOOP
        BEGIN
            EXECUTE format('ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER %I', bad.relation, bad.trigger);
            changed := true;
        EXCEPTION WHEN insufficient_privilege THEN
            -- PostgreSQL 14 lets only a superuser alter a partition's copy of a row trigger.
            RAISE WARNING 'trigger % of table % is %: %', bad.trigger, bad.relation, bad.problem, SQLERRM
                USING HINT = format('As a superuser: ALTER TABLE ONLY %s ENABLE ALWAYS TRIGGER %I;', bad.relation, bad.trigger);
        END;
    END LOOP;
    FOR bad IN SELECT * FROM syncd.missing_triggers(source_id) AS m WHERE m.problem = 'unwanted' LOOP
        BEGIN
            PERFORM syncd.lock_source(bad.relation, 'ACCESS EXCLUSIVE');
            EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', bad.trigger, bad.relation);
            changed := true;
        EXCEPTION WHEN insufficient_privilege OR lock_not_available THEN
            CONTINUE;  -- a detached partition that is somebody else's, or in use: it does no harm there
        END;
    END LOOP;
END
$function$;

-- Make a source's triggers what they should be, and have it read again where changes may have been missed. Returns whether anything was
-- changed. Runs with its caller's rights; the caller owns the table.
CREATE FUNCTION syncd.mend(source text) RETURNS boolean
LANGUAGE plpgsql
AS $function$
DECLARE
    relation pg_catalog.regclass := source::pg_catalog.regclass;
    source_id integer := (SELECT a.id FROM syncd.attachment(relation) AS a);
    mended record;
BEGIN
    IF source_id IS NULL THEN
        RAISE EXCEPTION 'table % is not attached', relation USING ERRCODE = 'invalid_parameter_value',
            HINT = pg_catalog.format('SELECT * FROM syncd.attach(%L);', relation::text);
    END IF;
    IF NOT EXISTS (SELECT FROM syncd.missing_triggers(source_id)) THEN
        RETURN false;
    END IF;
    PERFORM syncd.check_owner(relation);
    SELECT * INTO mended FROM syncd.mend_triggers(relation, source_id);
    IF mended.changed AND mended.missed THEN
        PERFORM syncd.note_missed(source_id);
    END IF;
    RETURN mended.changed;
END
$function$;

-- The table that a name means; where there is none, the error says which tables have vectors.
CREATE FUNCTION syncd.table_of(source text) RETURNS regclass
LANGUAGE plpgsql
AS $function$
DECLARE
    others text[];
BEGIN
    RETURN source::pg_catalog.regclass;
EXCEPTION WHEN undefined_table OR invalid_schema_name OR invalid_name THEN
    SELECT pg_catalog.array_agg(o.name) INTO others FROM (
        SELECT pg_catalog.format('%I.%I', n.nspname, c.relname) AS name
        FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND c.relpersistence = 'p'
          AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'syncd')
          AND EXISTS (SELECT FROM pg_catalog.pg_attribute AS a JOIN pg_catalog.pg_type AS t ON t.oid = a.atttypid
                      WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
                        AND (t.typname IN ('vector', 'halfvec', '_float4', '_float8') OR a.attname = 'embedding'))
        ORDER BY pg_catalog.strpos(source, c.relname::text) = 0, c.relname, n.nspname LIMIT 5) AS o;
    RAISE EXCEPTION 'there is no table %', source USING ERRCODE = 'undefined_table',
        HINT = coalesce(pg_catalog.format('SELECT * FROM syncd.attach(%L); tables with vectors are: %s', others[1],
                                          pg_catalog.array_to_string(others, ', ')),
                        'See which tables there are: SELECT schemaname, tablename FROM pg_catalog.pg_tables;');
END
$function$;

CREATE FUNCTION syncd.attach(
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

CREATE FUNCTION syncd.detach(source text) RETURNS boolean
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

-- This transaction's token, for a reader who must see what it wrote.
CREATE FUNCTION syncd.token() RETURNS text
LANGUAGE sql VOLATILE
AS $function$ SELECT pg_catalog.pg_current_xact_id()::text $function$;

SELECT syncd.attach('syncd.embeddings', vector => 'embedding', project => 'project', dataset => 'dataset', live => 'deleted_at IS NULL',
                    columns => ARRAY['attributes']);
