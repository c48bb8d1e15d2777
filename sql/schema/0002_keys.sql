-- Keys: the columns that can be a key, and the text form of a key. A key has the same text in the
-- outbox, in an index and in an answer, under any settings of a session.

-- The base type of a domain; another type is its own base type.
CREATE FUNCTION syncd.base_type(type oid) RETURNS oid
LANGUAGE sql STABLE SET search_path = pg_catalog
AS $function$
    WITH RECURSIVE bases AS (
        SELECT base_type.type AS oid
        UNION ALL
        SELECT t.typbasetype FROM bases AS b JOIN pg_type AS t ON t.oid = b.oid
        WHERE t.typtype = 'd'
    )
    SELECT b.oid FROM bases AS b JOIN pg_type AS t ON t.oid = b.oid WHERE t.typtype <> 'd'
$function$;

-- A time as text in ISO 8601, the same under any DateStyle and TimeZone. A key is looked up by this
-- text, so one value has one text. The planner inlines these functions.
CREATE FUNCTION syncd.key_text(date) RETURNS text
LANGUAGE sql STABLE
AS $function$ SELECT pg_catalog.btrim(pg_catalog.to_json($1)::pg_catalog.text, '"') $function$;

CREATE FUNCTION syncd.key_text(timestamp) RETURNS text
LANGUAGE sql STABLE
AS $function$ SELECT pg_catalog.btrim(pg_catalog.to_json($1)::pg_catalog.text, '"') $function$;

CREATE FUNCTION syncd.key_text(timestamptz) RETURNS text
LANGUAGE sql STABLE
AS $function$
    SELECT CASE WHEN NOT pg_catalog.isfinite($1) THEN $1::pg_catalog.text
                WHEN $1 OPERATOR(pg_catalog.>=) '0001-01-01 00:00:00+00'::pg_catalog.timestamptz
                THEN pg_catalog.btrim(
                    pg_catalog.to_json(pg_catalog.timezone('UTC', $1))::pg_catalog.text, '"')
                    OPERATOR(pg_catalog.||) '+00:00'
                ELSE pg_catalog.replace(
                    pg_catalog.btrim(
                        pg_catalog.to_json(pg_catalog.timezone('UTC', $1))::pg_catalog.text, '"'),
                    ' BC', '+00:00 BC')
           END
$function$;

-- Texts of key_text as times. The functions are declared immutable, which is true for these texts:
-- so the planner knows the values, and skips the partitions without them.
CREATE FUNCTION syncd.key_times(texts text[], kind date) RETURNS date[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$ SELECT texts::date[] $function$;

CREATE FUNCTION syncd.key_times(texts text[], kind timestamp) RETURNS timestamp[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$ SELECT texts::timestamp[] $function$;

CREATE FUNCTION syncd.key_times(texts text[], kind timestamptz) RETURNS timestamptz[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$ SELECT texts::timestamptz[] $function$;

-- SQL text of one element of a key, of a base type, in the outbox's form.
CREATE FUNCTION syncd.key_element(type text, value text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT CASE WHEN type IN ('date', 'timestamp without time zone', 'timestamp with time zone')
                THEN format('syncd.key_text(%s::pg_catalog.%s)', value,
                            CASE type WHEN 'date' THEN 'date'
                                      WHEN 'timestamp without time zone' THEN 'timestamp'
                                      ELSE 'timestamptz' END)
                ELSE value END
$function$;

-- The key's columns: the named ones, else the primary key. They must be unique, not null and of a
-- type that syncd knows; a domain counts as its base type.
CREATE OR REPLACE FUNCTION syncd.key_columns(source regclass, key text[], OUT names text[],
                                             OUT types text[])
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    known constant regtype[] := ARRAY['smallint', 'integer', 'bigint', 'uuid', 'text',
                                      'character varying', 'date', 'timestamp',
                                      'timestamptz']::regtype[];
    advice constant text := format('SELECT * FROM syncd.attach(%L, key => ARRAY[''COLUMN'']);',
                                   source);
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
                      HINT = format('ALTER TABLE %s ADD PRIMARY KEY (COLUMN); '
                                    'or name the columns of a unique key: ', source) || advice;
        END IF;
    END IF;
    SELECT quote_ident(n.name) INTO bad FROM unnest(names) AS n (name)
    WHERE NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = source AND a.attname = n.name
                        AND a.attnum > 0 AND NOT a.attisdropped)
    LIMIT 1;
    IF bad IS NOT NULL OR cardinality(names) = 0 THEN
        RAISE EXCEPTION 'table % has no column %', source, coalesce(bad, 'for an empty key')
            USING ERRCODE = 'undefined_column',
            HINT = 'Name the columns of a unique key: ' || advice;
    END IF;
    SELECT format('%I of type %s', a.attname, format_type(a.atttypid, a.atttypmod)) INTO bad
    FROM unnest(names) AS n (name) JOIN pg_attribute AS a ON a.attname = n.name
    WHERE a.attrelid = source AND NOT syncd.base_type(a.atttypid) = ANY (known) LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'key column % cannot be a key', bad USING ERRCODE = 'datatype_mismatch',
            HINT = 'Key columns are of type smallint, integer, bigint, uuid, text, varchar, date, '
                   'timestamp or timestamptz, or of a domain over one of these.';
    END IF;
    SELECT format('%I', a.attname) INTO bad
    FROM unnest(names) AS n (name) JOIN pg_attribute AS a ON a.attname = n.name
    WHERE a.attrelid = source AND a.attgenerated = 'v' LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'key column % of table % is a virtual generated column, which no unique '
                        'index can hold', bad, source
            USING ERRCODE = 'feature_not_supported',
                  HINT = 'Make it GENERATED ALWAYS AS (...) STORED, or take others: ' || advice;
    END IF;
    SELECT format('%I', a.attname) INTO bad
    FROM unnest(names) AS n (name) JOIN pg_attribute AS a ON a.attname = n.name
    WHERE a.attrelid = source AND NOT a.attnotnull LIMIT 1;
    IF bad IS NOT NULL THEN
        RAISE EXCEPTION 'key column % of table % may be NULL', bad, source
            USING ERRCODE = 'invalid_parameter_value',
            HINT = format('ALTER TABLE %s ALTER COLUMN %s SET NOT NULL;', source, bad);
    END IF;
    IF NOT EXISTS (
        SELECT FROM pg_index AS i
        WHERE i.indrelid = source AND i.indisunique AND i.indisvalid AND i.indpred IS NULL
          AND i.indexprs IS NULL
          AND (SELECT array_agg(a.attname::text ORDER BY k.place)
               FROM unnest(i.indkey::smallint[]) WITH ORDINALITY AS k (attnum, place)
               JOIN pg_attribute AS a ON a.attrelid = source AND a.attnum = k.attnum
               WHERE k.place <= i.indnkeyatts) = names) THEN
        RAISE EXCEPTION 'no unique index of table % has exactly the key columns (%)', source,
            array_to_string(names, ', ')
            USING ERRCODE = 'invalid_parameter_value',
                  HINT = format('CREATE UNIQUE INDEX ON %s (%s);', source,
                                (SELECT string_agg(quote_ident(n.name), ', ' ORDER BY n.place)
                                 FROM unnest(names) WITH ORDINALITY AS n (name, place)));
    END IF;
    SELECT array_agg(format_type(syncd.base_type(a.atttypid), NULL) ORDER BY n.place) INTO types
    FROM unnest(names) WITH ORDINALITY AS n (name, place)
    JOIN pg_attribute AS a ON a.attname = n.name
    WHERE a.attrelid = source;
END
$function$;
