"""pglogical: a subscriber's table is followed.

Its apply worker fires no statement trigger, and pg_subscription_rel stays empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from syncd.client.client import Client
from tests.conftest import prepare
from tests.daemon import Daemon
from tests.faults.following import until
from tests.integration.sources import ROW_FORM, STATEMENT_FORM, attach, events
from tests.servers import PostgresServer, available

TABLE = "CREATE TABLE items (id int PRIMARY KEY, v real[])"
SETTINGS = {
    "shared_preload_libraries": "pglogical",
    "wal_level": "logical",
    "track_commit_timestamp": "on",
}


class Flow:
    """A provider's table, replicated to a subscriber in another database."""

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self.provider = psycopg.connect(server.create_database("provider"), autocommit=True)
        self.subscriber = psycopg.connect(
            server.create_database("subscriber", "syncd_template"), autocommit=True
        )
        for name, db in (("provider", self.provider), ("subscriber", self.subscriber)):
            db.execute(TABLE)
            db.execute("CREATE EXTENSION pglogical")
            db.execute(
                "SELECT pglogical.create_node(node_name := %s, dsn := %s)",
                [name, server.conninfo(name)],
            )
        self.provider.execute("SELECT pglogical.replication_set_add_table('default', 'items')")
        self.provider.execute(
            "INSERT INTO items SELECT i, ARRAY[i] FROM generate_series(1, 5) AS i"
        )

    def subscribe(self) -> None:
        """Start the apply worker, and return when the table has all previous rows."""
        self.subscriber.execute(
            "SELECT pglogical.create_subscription(subscription_name := 'flow', provider_dsn := %s)",
            [self.server.conninfo("provider")],
        )
        self.caught_up()

    def write(self) -> None:
        """Make changes of every kind, and return when they are applied."""
        self.provider.execute("INSERT INTO items VALUES (6, '{6}'), (7, '{7}')")
        self.provider.execute("UPDATE items SET v = '{0}' WHERE id = 3")
        self.provider.execute("UPDATE items SET id = 8 WHERE id = 2")
        self.provider.execute("DELETE FROM items WHERE id IN (1, 6)")
        self.caught_up()

    def caught_up(self) -> None:
        rows = "SELECT array_agg(items ORDER BY id)::text FROM items"
        until(
            lambda: (
                self.provider.execute(rows).fetchone() == self.subscriber.execute(rows).fetchone()
            ),
            "the apply worker has written all",
        )


def trust_the_plugin(server: PostgresServer) -> None:
    """Allow the output plugin by a setting, which newer minor versions need for a slot."""
    for (names,) in server.execute(
        "SELECT setting FROM pg_settings WHERE name = 'output_plugin_libraries'"
    ):
        allowed = sql.SQL(", ").join(map(sql.Literal, [*names.split(", "), "pglogical_output"]))
        server.execute(sql.SQL("ALTER SYSTEM SET output_plugin_libraries = {}").format(allowed))
        server.execute("SELECT pg_reload_conf()")


@pytest.fixture
def flow(tmp_path: Path) -> Iterator[Flow]:
    """A flow on a server of its own: pglogical's processes make DROP DATABASE wait."""
    if not available(15) or not Path("/usr/lib/postgresql/15/lib/pglogical.so").exists():
        pytest.skip("pglogical is not installed: apt-get install postgresql-15-pglogical")
    with PostgresServer(15, tmp_path, settings=SETTINGS) as server:
        prepare(server, pgvector=False)
        trust_the_plugin(server)
        it = Flow(server)
        yield it
        it.provider.close()
        it.subscriber.close()


@pytest.fixture
def daemon(flow: Flow, tmp_path: Path) -> Iterator[Daemon]:
    """A service that follows the subscriber and never verifies by itself."""
    it = Daemon(flow.server.conninfo("subscriber"), tmp_path / "data", verify_seconds=0)
    yield it
    if it.process is not None:
        it.stop()


def assert_followed(client: Client) -> None:
    """Check that the index has the apply worker's writes, and that verify finds no difference."""
    assert [hit.key for hit in client.search("items", [0], k=100, consistency="strong")] == [
        3,
        8,
        4,
        5,
        7,
    ]
    assert [row.in_sync for row in client.verify().datasets] == [True]


def test_a_table_that_pglogical_fills_is_followed(flow: Flow, daemon: Daemon) -> None:
    flow.subscribe()
    attach(flow.subscriber, "items", metric="l2")
    assert events(flow.subscriber) == ROW_FORM
    daemon.start()
    with daemon.client() as client:
        flow.write()
        assert_followed(client)


def test_a_subscription_made_after_attach_switches_the_triggers_and_has_the_table_compared(
    flow: Flow, daemon: Daemon
) -> None:
    attach(flow.subscriber, "items", metric="l2")
    assert events(flow.subscriber) == STATEMENT_FORM
    daemon.start()
    with daemon.client() as client:
        flow.subscribe()
        until(lambda: events(flow.subscriber) == ROW_FORM, "the triggers are switched")
        flow.write()
        until(lambda: client.search("items", [0], k=100)[0].key == 3, "it is in step")
        assert_followed(client)


def test_a_role_that_may_not_see_subscriptions_attaches_in_the_form_that_is_always_right(
    flow: Flow,
) -> None:
    db = flow.subscriber
    flow.subscribe()
    db.execute("CREATE ROLE blind")
    for part in ("SCHEMA syncd", "FUNCTION syncd.fires_per_row(regclass)"):
        db.execute(sql.SQL("ALTER {} OWNER TO blind").format(sql.SQL(part)))
    db.execute("GRANT SELECT ON syncd.attachments TO blind")
    assert db.execute("SELECT syncd.fires_per_row('items')").fetchone() == (True,)
