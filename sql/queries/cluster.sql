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
