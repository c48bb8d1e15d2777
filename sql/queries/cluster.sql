-- The statements of shards and of what asks them.

-- name: register_shard
-- With the consumer's name: an operator may give a name to another shard, or to none.
UPDATE syncd.consumers SET shard = %s, layout = %s, replica = %s, address = %s WHERE name = %s;

-- name: set_first_layout
-- The first shard's layout answers. A later one does only if no consumer of the first one is left.
INSERT INTO syncd.layout AS l (shards) VALUES (%s)
ON CONFLICT (one_row) DO UPDATE SET shards = excluded.shards, changed_at = now()
WHERE NOT EXISTS (SELECT FROM syncd.consumers AS c WHERE c.layout = l.shards);

-- name: notify
-- Routers look at once. A full queue would fail the transaction: then they look a little later.
SELECT pg_notify('syncd_cluster', '') WHERE pg_notification_queue_usage() < 0.5;

-- name: listen
LISTEN syncd_cluster;

-- name: read_layout
-- The number of shards that answer, and each consumer that is a shard of any layout.
SELECT (SELECT l.shards FROM syncd.layout AS l), c.name, c.shard, c.layout, c.replica, c.address,
       extract(epoch FROM clock_timestamp() - c.reported_at)::double precision, c.state,
       c.lag_seconds
FROM (SELECT) AS one LEFT JOIN syncd.consumers AS c ON c.shard IS NOT NULL
ORDER BY c.layout, c.shard, c.replica;

-- name: swap_layout
-- The layout of another size answers from now on.
INSERT INTO syncd.layout AS l (shards) VALUES (%s)
ON CONFLICT (one_row) DO UPDATE SET shards = excluded.shards, changed_at = now();

-- name: lead
-- One leader at a time takes a snapshot for all shards; until its transaction ends.
SELECT pg_advisory_xact_lock(8317708090);

-- name: lead_limits
-- They follow the settings. A table that is locked elsewhere is left out of the cut.
SET LOCAL lock_timeout = '100ms';
SET LOCAL statement_timeout = '5s';
SET LOCAL idle_in_transaction_session_timeout = '10s';

-- name: export_snapshot
-- The snapshot of this statement, with the sources that changed since the oldest position of a
-- shard. Parameters: the transactions in progress at that position, and its xmax.
SELECT pg_export_snapshot(), pg_current_snapshot()::text, (SELECT last_value FROM syncd.outbox_id),
       ARRAY(SELECT o.source FROM syncd.outbox AS o WHERE o.xid = ANY (%s::xid8[])
             UNION SELECT o.source FROM syncd.outbox AS o WHERE o.xid >= %s::xid8);

-- name: read_token
SELECT syncd.token();

-- name: take_names
-- The processes of these consumers end by themselves: another run has their names.
UPDATE syncd.consumers SET run_id = gen_random_uuid(), started_at = now() WHERE name = ANY(%s);
