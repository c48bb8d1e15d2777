-- What the ops page and the metrics ask of the server.

-- name: read_heartbeat_xid
-- In the transaction of a report: an index whose position sees this id has everything that was committed before it.
SELECT pg_current_xact_id()::text;

-- name: read_outbox_rows
-- At most this many: from the oldest row that is kept to the last id given out, ids of transactions that rolled back included. Three index look-ups.
SELECT CASE WHEN o.oldest IS NULL THEN 0 ELSE greatest(s.last_value - o.oldest + 1, 0) END
FROM syncd.outbox_id AS s, (
    SELECT least((SELECT id FROM syncd.outbox_0 ORDER BY xid, id LIMIT 1), (SELECT id FROM syncd.outbox_1 ORDER BY xid, id LIMIT 1),
                 (SELECT id FROM syncd.outbox_2 ORDER BY xid, id LIMIT 1)) AS oldest) AS o;
