-- The attached tables.

-- name: read_attachments
-- The last column is the table that can be attached in place of a dropped one (see syncd.orphans):
-- preferably with the same vector column and the name at attach.
SELECT a.id, a.source::oid::bigint, n.nspname, c.relname, a.key, a.key_types, a.vector,
       a.vector_type, a.dimension, p.project, p.dataset, p.live,
       a.metric, a.columns, a.column_kinds, md5(a.arguments::text),
       (SELECT format('%s.%I', f.pronamespace::regnamespace, f.proname)
        FROM pg_attribute AS v JOIN pg_type AS t ON t.oid = v.atttypid
        JOIN pg_proc AS f ON f.oid = t.typsend
        WHERE v.attrelid = a.source AND v.attname = a.vector AND NOT v.attisdropped),
       CASE WHEN c.relkind = 'p' THEN (SELECT count(*) - 1 FROM syncd.tables_of(a.source)) END,
       p.arguments, quote_ident(a.schema_name) || '.' || quote_ident(a.table_name),
       CASE WHEN c.oid IS NULL THEN (
           SELECT quote_ident(m.nspname) || '.' || quote_ident(o.relname)
           FROM pg_class AS o JOIN pg_namespace AS m ON m.oid = o.relnamespace
           WHERE o.relkind IN ('r', 'p') AND o.relname IN (a.table_name, a.attached_name)
             AND (m.nspname = a.schema_name OR m.nspname = a.attached_schema
                  AND o.relname = a.attached_name)
             AND NOT EXISTS (SELECT FROM syncd.attachments AS r WHERE r.source = o.oid)
           ORDER BY EXISTS (SELECT FROM pg_attribute AS v
                            WHERE v.attrelid = o.oid AND v.attname = a.vector
                              AND NOT v.attisdropped) DESC,
                    o.relname = a.attached_name DESC NULLS LAST,
                    m.nspname = a.attached_schema DESC NULLS LAST LIMIT 1) END
FROM syncd.attachments AS a JOIN syncd.present_rules AS p ON p.id = a.id
LEFT JOIN pg_class AS c ON c.oid = a.source LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
ORDER BY a.id;
