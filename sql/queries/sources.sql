-- What is attached.

-- name: read_attachments
SELECT a.id, a.source::oid::bigint, n.nspname, c.relname, a.key, a.key_types, a.vector, a.vector_type, a.dimension, p.project, p.dataset, p.live,
       a.metric, a.columns, a.column_kinds, md5(a.arguments::text),
       (SELECT format('%s.%I', f.pronamespace::regnamespace, f.proname)
        FROM pg_attribute AS v JOIN pg_type AS t ON t.oid = v.atttypid JOIN pg_proc AS f ON f.oid = t.typsend
        WHERE v.attrelid = a.source AND v.attname = a.vector AND NOT v.attisdropped),
       CASE WHEN c.relkind = 'p' THEN (SELECT count(*) - 1 FROM syncd.tables_of(a.source)) END,
       p.arguments, quote_ident(a.schema_name) || '.' || quote_ident(a.table_name)
FROM syncd.attachments AS a JOIN syncd.present_rules AS p ON p.id = a.id
LEFT JOIN pg_class AS c ON c.oid = a.source LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
ORDER BY a.id;
