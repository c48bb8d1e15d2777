-- What is attached.

-- name: read_attachments
SELECT a.id, a.source::oid::bigint, n.nspname, c.relname, a.key, a.key_types, a.vector, a.vector_type, a.dimension, a.project, a.dataset, a.live,
       a.metric, a.columns, md5(a.arguments::text),
       CASE WHEN c.relkind = 'p' THEN (SELECT count(*) - 1 FROM syncd.tables_of(a.source)) END
FROM syncd.attachments AS a
LEFT JOIN pg_class AS c ON c.oid = a.source LEFT JOIN pg_namespace AS n ON n.oid = c.relnamespace
ORDER BY a.id;
