"""The steps of ``syncd/docs/operations.md``, done to a running service."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from syncd.client.client import Client
from syncd.errors import RequestError
from tests.daemon import Daemon
from tests.faults.following import despite_locks, until
from tests.integration.commands import run
from tests.scrape import events
from tests.servers import PostgresServer

MANUAL = Path(__file__).parents[2] / "syncd" / "docs" / "operations.md"
BY_HAND = (
    "SET lock_timeout = '2s'; DROP SERVER IF EXISTS syncd_search CASCADE; "
    "DROP SCHEMA syncd CASCADE;"
)


@pytest.fixture
def attached(db: psycopg.Connection) -> psycopg.Connection:
    """An attached table of ten rows."""
    db.execute("CREATE TABLE t (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO t SELECT i, ARRAY[i, 1] FROM generate_series(1, 10) AS i")
    db.execute("SELECT syncd.attach('t', metric => 'l2')")
    return db


def nearest(client: Client, number: float, k: int = 3) -> list[object]:
    return [hit.key for hit in client.search("t", [number, 1.0], k=k)]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param("syncd uninstall", id="uninstall", marks=pytest.mark.long),
        pytest.param(BY_HAND, id="by hand"),
    ],
)
def test_without_its_schema_writes_succeed_and_the_service_answers_from_where_it_was(
    attached: psycopg.Connection, database: str, daemon: Daemon, how: str
) -> None:
    daemon.with_constant("syncd.postgres.listener.LAST_DELAY_SECONDS", 0.5).start()
    if how == BY_HAND:
        assert BY_HAND in MANUAL.read_text("utf-8")
        despite_locks(lambda: attached.execute(BY_HAND))
    else:
        assert run("uninstall", "--yes", SYNCD_DSN=database).returncode == 0
    assert attached.execute("SELECT FROM pg_trigger WHERE tgrelid = 't'::regclass").fetchall() == []
    attached.execute("INSERT INTO t VALUES (11, '{11,1}'), (12, '{12,1}')")
    attached.execute("UPDATE t SET v = '{50,1}' WHERE id = 1")
    attached.execute("DELETE FROM t WHERE id = 2")
    until(
        lambda: (
            "the database has no schema syncd"
            in [line["error"] for line in events(daemon, "database_lost")]
        ),
        "the log names the missing schema",
    )
    with daemon.client() as client:
        assert nearest(client, 1) == [1, 2, 3]
        assert client.status().lag_seconds > 0
        with pytest.raises(RequestError):
            client.checkpoint()
        done = run("init", SYNCD_DSN=database)
        assert done.returncode == 0, done.stderr
        attached.execute("SELECT syncd.attach('t', metric => 'l2')")
        until(
            lambda: [row.count for row in client.datasets() if row.state == "ready"] == [11],
            "the table is read again",
        )
        assert nearest(client, 1) == [3, 4, 5]
        assert client.verify("t").datasets[0].in_sync
    daemon.stop()


@pytest.mark.usefixtures("attached")
def test_a_dump_without_the_schema_restores_every_row_and_init_and_attach_make_the_rest(
    database: str, server: PostgresServer, daemon: Daemon, tmp_path: Path
) -> None:
    name = f"without_schema_{os.getpid()}"
    restored = server.create_database(name)
    try:
        dump = tmp_path / "dump"
        subprocess.run(
            [server.bindir / "pg_dump", "-Fc", "-N", "syncd", "-f", dump, "-d", database],
            check=True,
        )
        done = subprocess.run(
            [server.bindir / "pg_restore", "-d", restored, dump], capture_output=True, check=False
        )
        assert done.returncode == 1
        assert done.stderr.count(b"CREATE TRIGGER") == 4
        assert run("init", SYNCD_DSN=restored).returncode == 0
        assert run("attach", "t", "--metric", "l2", SYNCD_DSN=restored).returncode == 0
        daemon.conninfo = restored
        daemon.start()
        with daemon.client() as client:
            assert client.verify("t").datasets[0].rows == 10
        daemon.stop()
    finally:
        server.drop_database(name)


def test_a_data_directory_that_was_moved_or_copied_while_stopped_is_resumed(
    attached: psycopg.Connection, daemon: Daemon, tmp_path: Path
) -> None:
    daemon.start()
    daemon.stop()
    read_before = len(events(daemon, "source_to_be_read"))
    assert read_before
    attached.execute("INSERT INTO t VALUES (11, '{11,1}')")
    transfers: tuple[Callable[[str, str], object], ...] = (shutil.move, shutil.copytree)
    for number, transfer in enumerate(transfers):
        place = tmp_path / f"place{number}" / "data"
        place.parent.mkdir()
        transfer(str(daemon.data_dir), str(place))
        daemon.data_dir = place
        daemon.start()
        with daemon.client() as client:
            assert nearest(client, 11, k=1) == [11]
        daemon.stop()
        assert not events(daemon, "reconciling")
        assert len(events(daemon, "source_to_be_read")) == read_before


def test_two_services_of_two_names_follow_one_database(
    attached: psycopg.Connection, database: str, daemon: Daemon, tmp_path: Path
) -> None:
    daemon.start()
    other = Daemon(database, tmp_path / "other", consumer="second").start()
    try:
        attached.execute("INSERT INTO t VALUES (11, '{11,1}')")
        token = attached.execute("SELECT syncd.token()").fetchone()
        assert token is not None
        for each in (daemon, other):
            with each.client() as client:
                client.wait(token[0])
                assert nearest(client, 11, k=1) == [11]
        names = attached.execute(
            "SELECT DISTINCT name FROM syncd.consumers ORDER BY name"
        ).fetchall()
        assert names == [("default",), ("second",)]
    finally:
        other.stop()
    attached.execute("DELETE FROM syncd.consumers WHERE name = 'second'")
    daemon.stop()


def test_the_queries_of_the_manual_can_be_run(attached: psycopg.Connection, daemon: Daemon) -> None:
    """Each SQL block that only reads runs unchanged."""
    daemon.start()
    blocks = MANUAL.read_text("utf-8").split("```sql\n")[1:]
    queries = [text.partition("```")[0] for text in blocks if text.lstrip().startswith("SELECT")]
    assert queries
    for query in queries:
        assert attached.execute(query.encode()).fetchall()
    daemon.stop()
