"""Logical replication between two databases of one server."""

from __future__ import annotations

from typing import LiteralString

import psycopg
from psycopg import sql

from tests.servers import PostgresServer


class Replication:
    """A publisher and a subscriber, with a publication and later a subscription of one name."""

    def __init__(
        self,
        name: LiteralString,
        server: PostgresServer,
        publisher: psycopg.Connection,
        subscriber: psycopg.Connection,
    ) -> None:
        self.name = name
        self.server = server
        self.publisher = publisher
        self.subscriber = subscriber

    def subscribe(self, options: LiteralString = "copy_data = false") -> None:
        """Subscribe with a slot made by hand.

        With both databases on one server, a subscription that makes its slot waits for itself.
        """
        name = sql.Identifier(self.name)
        self.publisher.execute(
            "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [self.name]
        )
        self.subscriber.execute(
            sql.SQL(
                "CREATE SUBSCRIPTION {} CONNECTION {} PUBLICATION {} "
                "WITH (create_slot = false, slot_name = {}, {})"
            ).format(
                name,
                sql.Literal(self.server.conninfo("publisher")),
                name,
                sql.Literal(self.name),
                sql.SQL(options),
            )
        )

    def unsubscribe(self) -> None:
        """End the subscription, if there is one."""
        if self.subscriber.execute("SELECT FROM pg_subscription").fetchone() is None:
            return
        for command in (
            "ALTER SUBSCRIPTION {} DISABLE",
            "ALTER SUBSCRIPTION {} SET (slot_name = NONE)",
            "DROP SUBSCRIPTION {}",
        ):
            self.subscriber.execute(sql.SQL(command).format(sql.Identifier(self.name)))

    def close(self) -> None:
        """End the subscription, and drop the publisher's slots."""
        self.unsubscribe()
        self.publisher.execute(
            "SELECT pg_terminate_backend(active_pid, 10000) FROM pg_replication_slots "
            "WHERE active_pid IS NOT NULL"
        )
        self.publisher.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots"
        )
