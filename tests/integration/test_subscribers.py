"""Tables that logical replication fills: applied rows are noted.

A table changes its triggers when it becomes a subscriber's table, and when it ceases to be one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from syncd.postgres import schema
from tests.conftest import prepare
from tests.daemon import Daemon
from tests.integration.captured import keys, outbox
from tests.integration.partitions import mend, wrong
from tests.integration.replication import Replication
from tests.integration.sources import ROW_FORM, STATEMENT_FORM, attach, connected_as, events, role
from tests.servers import VERSIONS, PostgresServer, available


class Replicated(Replication):
    """A publisher and a subscriber, and a replicated table."""

    def subscribe(self, options: LiteralString = "copy_data = false") -> None:
        """Subscribe: then a commit of the publisher returns once the subscriber has applied it."""
        super().subscribe(f"{options}, synchronous_commit = 'local'")
        self.publisher.execute("SET synchronous_commit = remote_apply")

    def unsubscribe(self) -> None:
        """End the subscription."""
        self.publisher.execute("SET synchronous_commit = local")
        super().unsubscribe()


@pytest.fixture(scope="module", params=VERSIONS)
def logical_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    """A server on which a commit waits for logical replication."""
    if not available(request.param):
        pytest.skip(f"PostgreSQL {request.param} is not installed")
    settings = {
        "wal_level": "logical",
        "synchronous_standby_names": "flow",
        "synchronous_commit": "local",
    }
    with PostgresServer(
        request.param, tmp_path_factory.mktemp("logical"), settings=settings
    ) as server:
        prepare(server, pgvector=False)
        yield server


@pytest.fixture
def replicated(logical_server: PostgresServer) -> Iterator[Replicated]:
    """A publisher and a subscriber, not subscribed."""
    table: LiteralString = "CREATE TABLE items (id int PRIMARY KEY, n int, v real[])"
    publisher = logical_server.create_database("publisher")
    subscriber = logical_server.create_database("subscriber", "syncd_template")
    try:
        with (
            psycopg.connect(publisher, autocommit=True) as here,
            psycopg.connect(subscriber, autocommit=True) as there,
        ):
            here.execute(table)
            here.execute("CREATE PUBLICATION flow FOR TABLE items")
            there.execute(table)
            both = Replicated("flow", logical_server, here, there)
            yield both
            both.close()
    finally:
        logical_server.drop_database("subscriber")
        logical_server.drop_database("publisher")


def test_rows_that_replication_applies_are_noted(replicated: Replicated) -> None:
    replicated.subscribe()
    there, here = replicated.subscriber, replicated.publisher
    here.execute("INSERT INTO items VALUES (1, 1, '{1}')")
    attach(there, "items")
    assert events(there) == ROW_FORM
    there.execute("TRUNCATE syncd.outbox")
    here.execute("INSERT INTO items VALUES (2, 2, '{2}'), (3, 3, '{3}')")
    here.execute("UPDATE items SET n = 5 WHERE id = 1")
    here.execute("UPDATE items SET id = 4 WHERE id = 2")
    here.execute("DELETE FROM items WHERE id = 3")
    here.execute("TRUNCATE items")
    here.execute("INSERT INTO items VALUES (9, 9, '{9}')")
    assert there.execute("SELECT array_agg(id) FROM items").fetchone() == ([9],)
    assert outbox(there) == [*keys(2, 3), *keys(1), *keys(2, 4), *keys(3), ("t", None), *keys(9)]


def test_mend_switches_a_table_that_becomes_a_subscribers_and_back(
    replicated: Replicated,
) -> None:
    there, here = replicated.subscriber, replicated.publisher
    attach(there, "items")
    assert events(there) == STATEMENT_FORM
    replicated.subscribe()
    assert ("items", "row", "missing") in wrong(there, "items")
    there.execute("TRUNCATE syncd.outbox")
    here.execute("INSERT INTO items VALUES (5, 5, '{5}')")
    assert outbox(there) == []
    assert mend(there, "items")
    assert events(there) == ROW_FORM
    assert outbox(there) == [("r", None)]  # for the rows that were applied before
    here.execute("INSERT INTO items VALUES (6, 6, '{6}')")
    assert outbox(there) == [("r", None), *keys(6)]
    replicated.unsubscribe()
    assert mend(there, "items")
    assert events(there) == STATEMENT_FORM
    assert wrong(there, "items") == []


def test_a_service_follows_a_subscribers_table(replicated: Replicated, tmp_path: Path) -> None:
    replicated.subscribe()
    there, here = replicated.subscriber, replicated.publisher
    here.execute("INSERT INTO items VALUES (1, 1, '{1}')")
    attach(there, "items", metric="l2")
    daemon = Daemon(replicated.server.conninfo("subscriber"), tmp_path / "data").start()
    try:
        with daemon.client() as client:
            here.execute("INSERT INTO items SELECT i, i, ARRAY[i] FROM generate_series(2, 500) i")
            assert len(client.search("items", [0], k=1000, consistency="strong")) == 500
            here.execute("DELETE FROM items WHERE id > 3")
            here.execute("UPDATE items SET v = '{0}' WHERE id = 2")
            assert [hit.key for hit in client.search("items", [0], consistency="strong")] == [
                2,
                1,
                3,
            ]
            here.execute("TRUNCATE items")
            assert client.search("items", [0], consistency="strong") == []
        daemon.stop()
    finally:
        if daemon.process is not None:
            daemon.kill()


def test_if_subscriptions_cannot_be_seen_a_table_gets_row_triggers(
    any_server: PostgresServer,
) -> None:
    with role(any_server, "blind"):
        conninfo = any_server.create_database("sealed")
        try:
            any_server.execute("ALTER DATABASE sealed OWNER TO blind", "sealed")
            any_server.execute("REVOKE SELECT ON pg_subscription_rel FROM PUBLIC", "sealed")
            schema.install(make_conninfo(conninfo, user="blind"))
            with connected_as(conninfo, "blind") as db:
                db.execute(
                    "CREATE SCHEMA mine CREATE TABLE items (id int PRIMARY KEY, embedding real[])"
                )
                attach(db, "mine.items")
                assert events(db, "mine.items") == ROW_FORM
                assert wrong(db, "mine.items") == []
                assert not mend(db, "mine.items")
        finally:
            any_server.drop_database("sealed")
