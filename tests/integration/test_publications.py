"""Publications that carry schema syncd: every table can be written.

syncd warns of publications whose subscribers may stop.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from syncd.client.client import Client
from syncd.errors import NotReady, TimedOut
from syncd.postgres import schema
from tests.daemon import Daemon
from tests.faults.following import applied, until
from tests.faults.rotation import value
from tests.integration.checking import about, examine
from tests.integration.commands import run
from tests.integration.replication import Replication
from tests.integration.sources import attach
from tests.servers import VERSIONS, PostgresServer, available

ALL_TABLES: LiteralString = "CREATE PUBLICATION everything FOR ALL TABLES"
SCHEMA: LiteralString = "CREATE PUBLICATION everything FOR TABLES IN SCHEMA syncd"
ITEMS: LiteralString = "CREATE TABLE items (id int PRIMARY KEY, embedding real[])"


def publish(db: psycopg.Connection, how: LiteralString) -> None:
    """Make the publication; skips the test if the server is too old for it."""
    if how == SCHEMA and db.info.server_version < 150_000:
        pytest.skip("PostgreSQL 14 publishes no schema as a whole")
    db.execute(how)


@pytest.mark.parametrize("how", [ALL_TABLES, SCHEMA])
def test_every_table_of_the_schema_can_be_written_under_a_publication(
    any_db: psycopg.Connection, how: LiteralString
) -> None:
    publish(any_db, how)
    tables = any_db.execute(
        "SELECT relname, (SELECT attname FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0"
        " AND NOT attisdropped AND attidentity = '' LIMIT 1)"
        " FROM pg_class AS c WHERE relnamespace = 'syncd'::regnamespace AND relkind IN ('r', 'p')"
        " ORDER BY 1"
    ).fetchall()
    assert {
        "meta",
        "outbox",
        "outbox_0",
        "outbox_limit",
        "dataset_reports",
        "quarantine_reports",
    } <= {name for name, _ in tables}
    for table, column in tables:
        names = {"table": sql.Identifier("syncd", table), "column": sql.Identifier(column)}
        with any_db.transaction(force_rollback=True):
            any_db.execute(sql.SQL("UPDATE {table} SET {column} = {column}").format(**names))
            any_db.execute(sql.SQL("DELETE FROM {table}").format(**names))


def test_under_a_publication_status_quarantine_settings_and_freeing_go_on(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(ITEMS)
    attach(db, "items")
    db.execute(ALL_TABLES)
    daemon.with_constant("syncd.sync.background.reports.REPORT_SECONDS", 0.05)
    daemon.with_constant("syncd.sync.background.rotation.ROTATION_SECONDS", 0.05)
    daemon.with_constant("syncd.postgres.freeing.SLOT_SECONDS", 0.1)
    daemon.settings["outbox_max_rows"] = 1234
    daemon.start()
    assert value(db, "SELECT max_rows FROM syncd.outbox_limit") == 1234
    db.execute("INSERT INTO items VALUES (1, '{1,0}'), (2, '{NaN,0}')")
    applied(daemon, value(db, "SELECT syncd.token()"))
    until(
        lambda: value(db, "SELECT count(*) FROM syncd.quarantine WHERE key = '2'") == 1,
        "the row is listed",
    )
    until(lambda: value(db, "SELECT sum(rows) FROM syncd.status") == 1, "the status is reported")
    db.execute("DELETE FROM items WHERE id = 2")
    until(
        lambda: value(db, "SELECT count(*) FROM syncd.quarantine") == 0,
        "the row is no longer listed",
    )
    with daemon.client() as client:
        client.checkpoint()

        def is_freed() -> bool:
            client.checkpoint()
            return bool(value(db, "SELECT count(*) = 0 FROM syncd.outbox"))

        until(is_freed, "the outbox is freed")


def test_init_and_check_name_a_publication_that_carries_the_schema_and_the_next_step(
    any_server: PostgresServer, tmp_path: Path
) -> None:
    conninfo = any_server.create_database("published")
    try:
        any_server.execute(ALL_TABLES, "published")
        done = run("init", SYNCD_DSN=conninfo)
        assert done.returncode == 0
        lines = done.stderr.splitlines()
        assert lines[0].startswith("warning: publication everything is FOR ALL TABLES"), (
            "said before it is done"
        )
        assert lines[1].startswith("  next: on each subscriber: syncd init"), done.stderr
        assert lines[2].startswith("schema syncd is at"), done.stderr
        with psycopg.connect(conninfo, autocommit=True) as db:
            found = about(examine(db, tmp_path), "publication everything")
            assert found.level == "warn"
            assert "ALTER SUBSCRIPTION" in found.fix
            db.execute(
                "DROP PUBLICATION everything;"
                "CREATE PUBLICATION everything FOR TABLE syncd.outbox_limit"
            )
            assert "DROP TABLE" in about(examine(db, tmp_path), "publication everything").fix
            db.execute(
                "DROP PUBLICATION everything;"
                "CREATE PUBLICATION everything FOR TABLE syncd.embeddings"
            )
            assert about(examine(db, tmp_path), "publications").level == "ok", (
                "the ready table may be carried"
            )
        assert "warning" not in run("init", SYNCD_DSN=conninfo).stderr
    finally:
        any_server.drop_database("published")


def test_an_upgrade_alongside_an_open_writer_keeps_no_other_writer_waiting(
    any_server: PostgresServer,
) -> None:
    conninfo = any_server.create_database("upgraded")
    try:
        with psycopg.connect(conninfo, autocommit=True) as db, psycopg.connect(conninfo) as writer:
            schema.install(conninfo, "0001")
            db.execute(ITEMS)
            attach(db, "items")
            db.execute(ALL_TABLES)
            incarnation = value(db, "SELECT incarnation FROM syncd.meta")
            writer.execute("INSERT INTO items VALUES (1, '{1}')")
            with running_init(conninfo) as upgrading:
                waits = (
                    "SELECT count(*) FROM pg_stat_activity "
                    "WHERE datname = 'upgraded' AND wait_event = 'PgSleep'"
                )
                until(lambda: value(db, waits) == 1, "init waits for the writer")
                db.execute("SET statement_timeout = '20s'; INSERT INTO items VALUES (2, '{2}')")
                writer.commit()
                assert upgrading.wait(60) == 0
            assert (
                value(db, "SELECT version_num FROM syncd.alembic_version")
                == schema.newest_revision()
            )
            assert value(db, "SELECT count(*) FROM syncd.outbox WHERE op = 'k'") == 2
            assert (
                value(db, "SELECT incarnation FROM syncd.meta WHERE xmin::text = xid::text")
                == incarnation
            )
            db.execute("DELETE FROM syncd.outbox")
    finally:
        any_server.drop_database("upgraded")


@contextmanager
def running_init(conninfo: str) -> Iterator[subprocess.Popen[bytes]]:
    """``syncd init`` in a process that ends with the block."""
    environment = {
        name: text for name, text in os.environ.items() if not name.startswith(("SYNCD_", "PG"))
    }
    command = [sys.executable, "-m", "syncd.cli.main", "init"]
    with subprocess.Popen(
        command, env=environment | {"SYNCD_DSN": conninfo}, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.kill()


# A publisher and its subscriber


class Flow(Replication):
    """Two databases of one server; a publication FOR ALL TABLES carries table ``items``."""

    def arrives(self, number: int) -> None:
        """Write a row to the publisher, and wait until it arrives at the subscriber."""
        self.publisher.execute("INSERT INTO items VALUES (%s, '{1,0}')", [number])
        until(lambda: self.has_arrived(number), f"row {number} arrives")

    def has_arrived(self, number: int) -> bool:
        return bool(value(self.subscriber, f"SELECT count(*) FROM items WHERE id = {number}") == 1)


@pytest.fixture(scope="module", params=VERSIONS)
def logical(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    """A server with logical replication."""
    if not available(request.param):
        pytest.skip(f"PostgreSQL {request.param} is not installed")
    settings = {"wal_level": "logical", "wal_retrieve_retry_interval": "100ms"}
    with PostgresServer(
        request.param, tmp_path_factory.mktemp("logical"), settings=settings
    ) as server:
        yield server


@pytest.fixture
def flow(logical: PostgresServer) -> Iterator[Flow]:
    """The two databases, without schema syncd and not subscribed."""
    conninfos = [logical.create_database(name) for name in ("publisher", "subscriber")]
    try:
        with (
            psycopg.connect(conninfos[0], autocommit=True) as here,
            psycopg.connect(conninfos[1], autocommit=True) as there,
        ):
            for each in (here, there):
                each.execute(ITEMS)
            here.execute(ALL_TABLES)
            both = Flow("everything", logical, here, there)
            yield both
            both.close()
    finally:
        for name in ("subscriber", "publisher"):
            logical.drop_database(name)


def test_a_subscriber_that_followed_the_advice_goes_on(flow: Flow, tmp_path: Path) -> None:
    flow.subscribe()
    flow.arrives(1)
    assert run("init", SYNCD_DSN=flow.server.conninfo("subscriber")).returncode == 0
    assert run("init", SYNCD_DSN=flow.server.conninfo("publisher")).returncode == 0
    attach(flow.publisher, "items")
    daemon = Daemon(flow.server.conninfo("publisher"), tmp_path / "data")
    daemon.with_constant("syncd.sync.background.reports.REPORT_SECONDS", 0.05)
    try:
        daemon.start()
        flow.arrives(2)
        with daemon.client() as client:
            client.checkpoint()
        flow.arrives(3)
        assert value(flow.subscriber, "SELECT count(*) FROM syncd.consumers") == 0, (
            "no row of syncd's tables is applied"
        )
        daemon.stop()
    finally:
        if daemon.process is not None:
            daemon.kill()


def test_a_subscriber_that_stopped_goes_on_after_the_advice(flow: Flow) -> None:
    flow.subscribe()
    schema.install(flow.server.conninfo("publisher"))
    flow.publisher.execute("INSERT INTO items VALUES (1, '{1,0}')")
    until(lambda: "syncd.meta" in flow.server.log.read_text(), "the subscriber stops")
    assert not flow.has_arrived(1)
    schema.install(flow.server.conninfo("subscriber"))
    until(lambda: flow.has_arrived(1), "the subscriber goes on")


def test_a_database_that_gets_another_servers_outbox_is_not_followed_until_it_does_not(
    flow: Flow, tmp_path: Path
) -> None:
    here, there = flow.publisher, flow.subscriber
    for conninfo in ("publisher", "subscriber"):
        schema.install(flow.server.conninfo(conninfo))
    attach(there, "items")
    daemon = Daemon(flow.server.conninfo("subscriber"), tmp_path / "data")
    daemon.with_constant("syncd.sync.consumer.consumer.FOREIGN_ROWS_SECONDS", 0.05)
    try:
        daemon.start()
        there.execute("INSERT INTO items VALUES (1, '{1,0}')")
        with daemon.client() as client:
            client.wait(value(there, "SELECT syncd.token()"))
            flow.subscribe()  # to every table of the publication, those of syncd included
            until(
                lambda: "another server's rows" in (client.status().database_error or ""),
                "the service stops following",
            )
            found = about(examine(there, tmp_path), "subscriptions")
            assert found.level == "fail"
            assert "SET PUBLICATION" in found.fix
            here.execute("INSERT INTO items VALUES (2, '{1,0}')")
            until(lambda: flow.has_arrived(2), "the row arrives")
            # As the publisher's syncd does; it removes the subscriber's changes as well.
            here.execute("TRUNCATE syncd.outbox")
            here.execute("INSERT INTO items VALUES (3, '{1,0}')")
            until(lambda: flow.has_arrived(3), "the truncation arrives")
            here.execute("CREATE PUBLICATION chosen FOR TABLE items")
            until(lambda: caught_up(here), "the subscription is behind the new publication")
            there.execute(
                "ALTER SUBSCRIPTION everything SET PUBLICATION chosen WITH (copy_data = false)"
            )
            flow.arrives(4)
            until(lambda: client.status().database_error is None, "the service follows again")
            until(lambda: finds_all(client, 4), "every row was compared")
            assert all(each.in_sync for each in client.verify().datasets)
        daemon.stop()
        assert about(examine(there, tmp_path), "publications").level == "ok"
    finally:
        if daemon.process is not None:
            daemon.kill()


def finds_all(client: Client, rows: int) -> bool:
    """Whether a search finds this many rows; while rows are compared it may not answer."""
    try:
        return len(client.search("items", [1, 0], consistency="strong")) == rows
    except (NotReady, TimedOut):
        return False


def caught_up(publisher: psycopg.Connection) -> bool:
    """Whether the subscriber has confirmed all WAL."""
    return bool(
        value(
            publisher,
            "SELECT bool_and(confirmed_flush_lsn >= pg_current_wal_lsn()) "
            "FROM pg_replication_slots",
        )
    )
