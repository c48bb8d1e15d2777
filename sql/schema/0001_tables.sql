-- The tables of schema syncd. The schema itself is made before this file runs, since Alembic keeps its version in it.

REVOKE ALL ON SCHEMA syncd FROM PUBLIC;

-- Which database this is. The row is written once: where its xmin is not the transaction it names, the database was restored from a
-- dump, and the outbox holds another cluster's transaction ids.
CREATE TABLE syncd.meta (
    incarnation uuid NOT NULL DEFAULT gen_random_uuid(),
    xid xid8 NOT NULL DEFAULT pg_current_xact_id()
);
CREATE UNIQUE INDEX meta_one_row ON syncd.meta ((true));
INSERT INTO syncd.meta DEFAULT VALUES;

-- Read by every trigger, so they are sequences: one page each, no snapshot, and setval is seen by everybody at once.
CREATE SEQUENCE syncd.outbox_slot MINVALUE 0 MAXVALUE 2 START 0;
SELECT setval('syncd.outbox_slot', 0);
-- 0: off; 1: guarded, off where max_prepared_transactions > 0; 2: guarded everywhere.
CREATE SEQUENCE syncd.notify_mode MINVALUE 0 MAXVALUE 2 START 1;
SELECT setval('syncd.notify_mode', 1);

-- Which keys changed, in which transaction; never vectors. op: k a key, t truncated, r read the source again, a attached, d detached.
-- CACHE 1 makes the order of ids the order of commits for any one key, because the row lock is held while the id is taken.
CREATE SEQUENCE syncd.outbox_id CACHE 1;
CREATE TABLE syncd.outbox (
    slot smallint NOT NULL DEFAULT 0,
    id bigint NOT NULL DEFAULT nextval('syncd.outbox_id'),
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    source integer NOT NULL,
    op "char" NOT NULL,
    key text COLLATE "C"
) PARTITION BY LIST (slot);
ALTER SEQUENCE syncd.outbox_id OWNED BY syncd.outbox.id;
CREATE TABLE syncd.outbox_0 PARTITION OF syncd.outbox FOR VALUES IN (0);
CREATE TABLE syncd.outbox_1 PARTITION OF syncd.outbox FOR VALUES IN (1);
CREATE TABLE syncd.outbox_2 PARTITION OF syncd.outbox FOR VALUES IN (2);
CREATE INDEX outbox_xid_id ON syncd.outbox (xid, id);
CREATE INDEX outbox_marker ON syncd.outbox (xid) WHERE op <> 'k';

CREATE TABLE syncd.outbox_limit (
    max_rows bigint NOT NULL DEFAULT 10000000 CHECK (max_rows > 0),
    freed pg_snapshot,  -- every row that was freed is visible in it: who does not see all that it sees may have lost changes
    switched_at timestamptz NOT NULL DEFAULT now(),  -- to the current slot
    marked_at timestamptz NOT NULL DEFAULT '-infinity'  -- when a consumer was last told to rebuild
);
CREATE UNIQUE INDEX outbox_limit_one_row ON syncd.outbox_limit ((true));
INSERT INTO syncd.outbox_limit DEFAULT VALUES;

-- What is attached. The expressions are stored as Postgres prints them back, each name in them with its schema.
CREATE TABLE syncd.attachments (
    id integer GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    source regclass NOT NULL UNIQUE,
    key text[] NOT NULL,
    key_types text[] NOT NULL,
    vector text NOT NULL,
    vector_type text NOT NULL,
    dimension integer,  -- as declared, NULL where the type has none
    project text NOT NULL,
    dataset text NOT NULL,
    live text NOT NULL,
    metric text NOT NULL CHECK (metric IN ('cosine', 'l2', 'ip')),
    columns text[] NOT NULL,
    column_kinds text[] NOT NULL,  -- how their values are compared: see syncd.column_kind
    arguments jsonb NOT NULL,  -- as they were given, to see whether a second attach changes anything
    attached_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE syncd.consumers (
    name text PRIMARY KEY,
    run_id uuid NOT NULL,
    started_at timestamptz NOT NULL DEFAULT now(),
    state text NOT NULL DEFAULT 'catching_up',
    position text,  -- JSON: {"snapshot": "10:20:11", "outbox_id": 5}
    lag_rows bigint NOT NULL DEFAULT 0,
    lag_seconds double precision NOT NULL DEFAULT 0,
    checkpoint_at timestamptz,
    reported_at timestamptz NOT NULL DEFAULT now(),
    needs pg_snapshot NOT NULL DEFAULT pg_current_snapshot(),  -- the oldest snapshot that it may still start from: no newer change is freed
    must_rebuild boolean NOT NULL DEFAULT false  -- it was too slow for the outbox' cap: what it needs is no longer kept
) WITH (fillfactor = 50);

-- One row a checkpoint, written once and committed durably before the checkpoint's manifest. A checkpoint may be resumed only where its
-- row is still there, in the transaction that the manifest names.
CREATE TABLE syncd.checkpoints (
    nonce uuid PRIMARY KEY,
    consumer text NOT NULL REFERENCES syncd.consumers ON DELETE CASCADE,
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    snapshot pg_snapshot NOT NULL,  -- the oldest position in it
    created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

CREATE TABLE syncd.dataset_reports (
    consumer text NOT NULL REFERENCES syncd.consumers ON DELETE CASCADE,
    dataset text NOT NULL,
    state text NOT NULL,
    rows bigint NOT NULL
) WITH (fillfactor = 50);
CREATE UNIQUE INDEX dataset_reports_name ON syncd.dataset_reports (consumer, md5(dataset));  -- a name may be too long for an index

CREATE TABLE syncd.quarantine_reports (
    consumer text NOT NULL REFERENCES syncd.consumers ON DELETE CASCADE,
    source integer NOT NULL,
    dataset text NOT NULL,
    key text NOT NULL,
    reason text NOT NULL,
    since timestamptz NOT NULL
);
CREATE UNIQUE INDEX quarantine_reports_key ON syncd.quarantine_reports (consumer, source, md5(key));

CREATE VIEW syncd.sources AS
SELECT id, source, key, vector, arguments ->> 'project' AS project, arguments ->> 'dataset' AS dataset,
       arguments ->> 'live' AS live, metric, columns, attached_at
FROM syncd.attachments;

CREATE VIEW syncd.status AS
SELECT c.name AS consumer, d.dataset, CASE WHEN c.must_rebuild THEN 'must_rebuild' ELSE coalesce(d.state, c.state) END AS state,
       coalesce(d.rows, 0) AS rows, c.lag_rows, c.lag_seconds, c.checkpoint_at, c.position::jsonb AS position, c.reported_at
FROM syncd.consumers AS c LEFT JOIN syncd.dataset_reports AS d ON d.consumer = c.name;

CREATE VIEW syncd.quarantine AS
SELECT q.consumer, q.dataset, q.key, q.reason, q.since, c.reported_at
FROM syncd.quarantine_reports AS q JOIN syncd.consumers AS c ON c.name = q.consumer;

-- The ready table, for who has none. It is attached by the revision that makes it.
CREATE TABLE syncd.embeddings (
    id text PRIMARY KEY,
    project text NOT NULL DEFAULT 'default',
    dataset text NOT NULL DEFAULT 'embeddings',
    embedding real[],
    attributes jsonb NOT NULL DEFAULT '{}',
    deleted_at timestamptz
);
