-- The table of documents behind the LangChain and LlamaIndex stores. {table} is its name.

-- name: create_documents
CREATE TABLE IF NOT EXISTS {table} (
    collection text NOT NULL,
    id text NOT NULL,
    document_id text,  -- the document of a LlamaIndex node
    content text NOT NULL,
    metadata jsonb NOT NULL DEFAULT '{{}}',
    embedding real[],
    PRIMARY KEY (collection, id)
);

-- name: lock_creation
-- Two sessions that create the same table at once would fail, even with IF NOT EXISTS.
SELECT pg_advisory_xact_lock(hashtext('syncd.apps'));

-- name: lock_first_write
SELECT pg_advisory_xact_lock(hashtext('syncd.apps'), hashtext(%s));

-- name: find_table
SELECT t.oid::bigint, a.arguments ->> 'metric' FROM (SELECT to_regclass(%s) AS oid) AS t
LEFT JOIN LATERAL syncd.attachment(t.oid) AS a ON true;

-- name: dropped_metric
-- A table of this name that was attached and dropped keeps its datasets' names until its detach.
SELECT o.arguments ->> 'metric' FROM syncd.orphans(to_regclass(%s)) AS o LIMIT 1;

-- name: reattach_documents
SELECT syncd.reattach(%(source)s);

-- name: detach_dropped
SELECT syncd.unregister(o.id) FROM syncd.orphans(to_regclass(%(source)s)) AS o;

-- name: attach_documents
-- The project is the table's name: collections of two tables may have the same name.
SELECT syncd.attach(%(source)s, vector => 'embedding', project => quote_literal(%(project)s),
                    dataset => 'collection', metric => %(metric)s,
                    columns => ARRAY['id', 'document_id', 'metadata']);

-- name: write_document
INSERT INTO {table} (collection, id, document_id, content, metadata, embedding)
VALUES (%(collection)s, %(id)s, %(document_id)s, %(content)s, %(metadata)s, %(embedding)s::real[])
ON CONFLICT (collection, id) DO UPDATE
SET document_id = excluded.document_id, content = excluded.content, metadata = excluded.metadata,
    embedding = excluded.embedding;

-- name: vector_lengths
SELECT cardinality(embedding::real[]) FROM {table}
WHERE collection = %(collection)s AND embedding IS NOT NULL AND id <> ALL (%(replaced)s)
ORDER BY id LIMIT 10;

-- name: read_documents
SELECT id, document_id, content, metadata FROM {table}
WHERE collection = %(collection)s AND id = ANY (%(ids)s);

-- name: delete_documents
DELETE FROM {table} WHERE collection = %(collection)s AND id = ANY (%(ids)s);

-- name: delete_of_document
DELETE FROM {table} WHERE collection = %(collection)s AND document_id = %(document_id)s;

-- name: delete_collection
DELETE FROM {table} WHERE collection = %(collection)s;

-- name: has_vectors
SELECT EXISTS (SELECT FROM {table} WHERE collection = %(collection)s AND embedding IS NOT NULL);

-- name: token
SELECT syncd.token();
