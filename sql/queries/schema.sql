-- Install, check and remove schema syncd. These statements run under the user's search_path,
-- because attach finds the user's table and the rules' functions by it. So each name has its schema
-- here.

-- name: has_version_table
SELECT pg_catalog.to_regclass('syncd.alembic_version') IS NOT NULL;

-- name: read_revision
SELECT version_num FROM syncd.alembic_version;

-- name: may_read_revision
SELECT pg_catalog.has_table_privilege('syncd.alembic_version', 'SELECT');

-- name: list_sources
SELECT CASE WHEN c.oid IS NULL THEN a.source::pg_catalog.oid::pg_catalog.text
    ELSE a.source::pg_catalog.text END
FROM syncd.attachments AS a LEFT JOIN pg_catalog.pg_class AS c ON c.oid = a.source;

-- name: detach
SELECT syncd.detach(%(source)s);

-- name: read_event_triggers
SELECT pg_catalog.quote_ident(e.evtname), pg_catalog.quote_ident(p.proname)
FROM pg_catalog.pg_event_trigger AS e JOIN pg_catalog.pg_proc AS p ON p.oid = e.evtfoid
WHERE e.evtenabled <> 'D' ORDER BY 1;

-- name: list_dependents
-- What users made with functions and views of schema syncd, which goes if the schema is dropped.
SELECT DISTINCT coalesce(pg_catalog.pg_describe_object('pg_catalog.pg_class'::regclass,
                                                       r.ev_class, 0),
                         pg_catalog.pg_describe_object(d.classid, d.objid, d.objsubid))
FROM (SELECT 'pg_catalog.pg_proc'::regclass AS class, oid FROM pg_catalog.pg_proc
      WHERE pronamespace = 'syncd'::regnamespace
      UNION ALL
      SELECT 'pg_catalog.pg_class'::regclass, oid FROM pg_catalog.pg_class
      WHERE relnamespace = 'syncd'::regnamespace) AS ours
JOIN pg_catalog.pg_depend AS d ON d.refclassid = ours.class AND d.refobjid = ours.oid
LEFT JOIN pg_catalog.pg_rewrite AS r
       ON d.classid = 'pg_catalog.pg_rewrite'::regclass AND r.oid = d.objid
LEFT JOIN pg_catalog.pg_attrdef AS a
       ON d.classid = 'pg_catalog.pg_attrdef'::regclass AND a.oid = d.objid
LEFT JOIN pg_catalog.pg_policy AS p
       ON d.classid = 'pg_catalog.pg_policy'::regclass AND p.oid = d.objid
LEFT JOIN pg_catalog.pg_proc AS f
       ON d.classid = 'pg_catalog.pg_proc'::regclass AND f.oid = d.objid
LEFT JOIN pg_catalog.pg_class AS c ON c.oid = coalesce(r.ev_class, a.adrelid, p.polrelid)
WHERE coalesce(c.relnamespace, f.pronamespace) <> 'syncd'::regnamespace
ORDER BY 1;

-- name: lock_init
-- Several services may begin with init at once; the others find what the first one has made.
SELECT pg_catalog.pg_advisory_xact_lock(8317708091);

-- name: uninstall_limits
-- Writers wait behind each lock that uninstall waits for, and for the triggers that it has dropped.
-- The limit is shorter than deadlock_timeout: a deadlock ends this transaction and no other one.
SET LOCAL lock_timeout = '500ms';

-- name: list_tables
-- The tables that are attached; an error if one belongs to another role.
SELECT a.source::pg_catalog.text, syncd.check_owner(a.source)
FROM syncd.attachments AS a JOIN pg_catalog.pg_class AS c ON c.oid = a.source ORDER BY a.id;

-- name: lock_tables
-- Before any trigger is dropped. detach waits much longer for a table that is in use, and writers
-- would wait as long for the tables whose triggers are dropped already.
LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE;

-- name: drop_search_server
-- With its user mapping: what syncd.connect_search made outside schema syncd.
DROP SERVER IF EXISTS syncd_search CASCADE;

-- name: drop_schema
DROP SCHEMA syncd CASCADE;

-- name: attach
SELECT rows, live_rows, datasets
FROM syncd.attach(%(source)s, key => %(key)s, vector => %(vector)s,
                  project => coalesce(%(project)s, $$'default'$$),
                  dataset => %(dataset)s, live => coalesce(%(live)s, 'true'),
                  metric => coalesce(%(metric)s, 'cosine'),
                  columns => coalesce(CAST(%(columns)s AS pg_catalog.text[]), '{}'),
                  row_triggers => %(row_triggers)s);

-- name: reattach
SELECT rows, live_rows, datasets FROM syncd.reattach(%(source)s);

-- name: read_publications
-- The publications that carry a table of schema syncd, or will: FOR ALL TABLES, or by the name of
-- the schema or of a table. The table of embeddings may be carried.
SELECT p.pubname::pg_catalog.text, p.puballtables FROM pg_catalog.pg_publication AS p
WHERE p.puballtables
   OR EXISTS (SELECT FROM pg_catalog.pg_publication_tables AS t
              WHERE t.pubname = p.pubname AND t.schemaname = 'syncd'
                AND t.tablename <> 'embeddings')
ORDER BY 1;

-- name: read_subscriptions
SELECT syncd.subscriptions_to_syncd();
