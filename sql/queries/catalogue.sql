-- Facts of the catalogue about sources: each change that can change or hide rows without a trigger.

-- name: read_catalogue
-- One line of facts for each source. The ids are a parameter: one plan serves every pass of a
-- session, which saves most of its time. relfilenode changes with each rewrite, also if no value
-- changes (VACUUM FULL). The xmin of a pg_attribute row changes with each change of the column. The
-- xmin of a pg_trigger row also changes when a trigger is disabled and enabled again. An expression
-- uses the columns that PostgreSQL noted when it was compiled, and those whose names occur in its
-- text.
SELECT a.id, json_build_object(
    'kind', c.relkind, 'file', c.relfilenode::bigint, 'persistence', c.relpersistence,
    'row_security', json_build_array(c.relrowsecurity, c.relforcerowsecurity),
    'columns',
    (SELECT json_object_agg(t.attname,
                            json_build_array(t.attnum, t.atttypid::bigint, t.atttypmod,
                                             t.xmin::text::bigint, t.attgenerated)
                            ORDER BY t.attnum)
     FROM pg_attribute AS t
     WHERE t.attrelid = c.oid AND t.attnum > 0 AND NOT t.attisdropped
       AND (t.attname = a.vector OR t.attname = ANY (a.key) OR t.attname = ANY (a.columns)
            OR t.attnum = ANY (r.columns)
            OR strpos(concat(a.project, a.dataset, a.live), quote_ident(t.attname)) > 0)),
    'triggers',
    (SELECT json_object_agg(t.tgname,
                            json_build_array(t.oid::bigint, t.xmin::text::bigint, t.tgenabled)
                            ORDER BY t.tgname)
     FROM pg_trigger AS t
     WHERE t.tgrelid = c.oid AND starts_with(t.tgname::text, format('syncd_%%s_', a.id))))::text
FROM syncd.attachments AS a JOIN pg_class AS c ON c.oid = a.source
LEFT JOIN syncd.rules AS r ON r.source = a.id
WHERE a.id = ANY (%s::integer[]);

-- name: read_partition_facts
-- One line of facts about the partitions of each partitioned source, as digests: they may be many.
SELECT a.id, (
    WITH RECURSIVE tree (relid) AS (
        SELECT i.inhrelid FROM pg_inherits AS i WHERE i.inhparent = c.oid
        UNION ALL
        SELECT i.inhrelid FROM pg_inherits AS i JOIN tree ON i.inhparent = tree.relid
    )
    SELECT json_build_object(
        'count', count(*), 'members', md5(string_agg(tree.relid::text, ',' ORDER BY tree.relid)),
        'files', md5(string_agg(concat(r.relfilenode, r.relpersistence), ',' ORDER BY tree.relid)),
        'row_security',
        md5(string_agg(concat(r.relrowsecurity, r.relforcerowsecurity), ',' ORDER BY tree.relid)),
        'unlogged', coalesce(bool_or(r.relpersistence = 'u'), false),
        'triggers', md5(string_agg(t.facts, ',' ORDER BY tree.relid)),
        'always', coalesce(bool_and(t.always), true))::text
    FROM tree JOIN pg_class AS r ON r.oid = tree.relid
    LEFT JOIN LATERAL (
        SELECT string_agg(concat_ws(':', t.oid, t.xmin, t.tgenabled), ',' ORDER BY t.oid) AS facts,
               bool_and(t.tgenabled = 'A') AS always
        FROM pg_trigger AS t
        WHERE t.tgrelid = tree.relid AND starts_with(t.tgname::text, format('syncd_%%s_', a.id))
    ) AS t ON true)
FROM syncd.attachments AS a JOIN pg_class AS c ON c.oid = a.source
WHERE c.relkind = 'p' AND a.id = ANY (%s::integer[]);

-- name: read_rule_facts
-- One line of facts about each source's rules. Their text has the names of the functions that they
-- call, and the facts have the functions' xmin, which changes when a function is replaced. The
-- values of enum types are there by number: a renamed value changes the values of rows without a
-- write.
SELECT a.id, json_build_object(
    'per_row', syncd.fires_per_row(c.oid),
    'rules', json_build_array(p.project, p.dataset, p.live),
    'functions', (SELECT json_object_agg(f.oid::bigint, f.xmin::text::bigint ORDER BY f.oid)
                  FROM pg_proc AS f WHERE f.oid = ANY (p.functions)),
    'remembered',
    p.kept AND (a.project, a.dataset, a.live, a.schema_name, a.table_name)
               IS NOT DISTINCT FROM
               (p.project, p.dataset, p.live, n.nspname::text, c.relname::text),
    'send', (SELECT format('%%s.%%I', f.pronamespace::regnamespace, f.proname)
             FROM pg_attribute AS v JOIN pg_type AS t ON t.oid = v.atttypid
             JOIN pg_proc AS f ON f.oid = t.typsend
             WHERE v.attrelid = c.oid AND v.attname = a.vector AND NOT v.attisdropped),
    'labels', (WITH RECURSIVE types (id) AS (
                   SELECT t.atttypid FROM pg_attribute AS t
                   -- Types below 16384 are the server's own.
                   WHERE t.attrelid = c.oid AND t.attnum > 0 AND NOT t.attisdropped
                     AND t.atttypid >= 16384
                     AND (t.attname = ANY (a.columns)
                          OR strpos(concat(p.project, p.dataset, p.live),
                                    quote_ident(t.attname)) > 0)
                   UNION
                   SELECT i.id
                   FROM types AS s JOIN pg_type AS t ON t.oid = s.id,
                        LATERAL (VALUES (t.typbasetype), (t.typelem)) AS i (id)
                   WHERE i.id <> 0
               )
               SELECT json_object_agg(e.oid::bigint, e.enumlabel ORDER BY e.oid)
               FROM types AS s JOIN pg_enum AS e ON e.enumtypid = s.id))::text
FROM syncd.attachments AS a JOIN pg_class AS c ON c.oid = a.source
JOIN pg_namespace AS n ON n.oid = c.relnamespace
JOIN syncd.present_rules AS p ON p.id = a.id
WHERE a.id = ANY (%s::integer[]);

-- name: read_column_names
-- The present names of columns that no longer exist under their old names; NULL for a dropped one.
SELECT t.attnum, CASE WHEN NOT t.attisdropped THEN t.attname END FROM pg_attribute AS t
WHERE t.attrelid = %s::oid AND t.attnum = ANY (%s::smallint[]);

-- name: read_layouts
-- The present types of the key's columns and of the vector, and the kinds of the attached columns.
-- NULL for a column that does not exist; a domain counts as its base type.
SELECT a.id,
       (SELECT array_agg(format_type(syncd.base_type(t.atttypid), NULL) ORDER BY k.place)
        FROM unnest(a.key) WITH ORDINALITY AS k (name, place)
        LEFT JOIN pg_attribute AS t ON t.attrelid = a.source AND t.attname = k.name
                                       AND t.attnum > 0 AND NOT t.attisdropped),
       CASE WHEN y.typname IN ('vector', 'halfvec') THEN y.typname
            ELSE format_type(v.atttypid, NULL) END,
       CASE WHEN y.typname IN ('vector', 'halfvec') AND v.atttypmod > 0 THEN v.atttypmod END,
       ARRAY(SELECT syncd.column_kind(a.source, n.name)
             FROM unnest(a.columns) WITH ORDINALITY AS n (name, place) ORDER BY n.place)
FROM syncd.attachments AS a
LEFT JOIN pg_attribute AS v ON v.attrelid = a.source AND v.attname = a.vector AND v.attnum > 0
    AND NOT v.attisdropped
LEFT JOIN pg_type AS y ON y.oid = v.atttypid;

-- name: limit_remember
-- Reports wait for this connection, so another session's lock is waited for only a moment.
SET LOCAL statement_timeout = '10s';
SET LOCAL lock_timeout = '100ms';

-- name: try_lock
-- The size is read under the table's lock. remember() would take a lock that it cannot get for a
-- rule that is not valid.
SELECT pg_relation_size(%s::oid);

-- name: remember
SELECT syncd.remember(%s);

-- name: limit_repair
SET LOCAL statement_timeout = '10s';

-- name: repair
SELECT syncd.mend(format('%%I.%%I', n.nspname, c.relname))
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = %s::oid;
