"""PostgreSQL crashes, loses commits that syncd has seen, and assigns their transaction ids again.

The oracle found these races. Here the time between the crash and its notice is made long.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from syncd.client.client import Client
from tests.conftest import clone
from tests.daemon import Daemon
from tests.servers import PostgresServer

NOTICED_AFTER_SECONDS = 2.0
LOST_COMMITS = 20


@pytest.fixture
def crashable(own_server: PostgresServer) -> Iterator[str]:
    """A database on the server that tests crash."""
    yield from clone(own_server)


@pytest.fixture(params=["waits before it connects again"])
def follower(request: pytest.FixtureRequest, crashable: str, tmp_path: Path) -> Iterator[Daemon]:
    """A syncd that is slow to reconnect, or slow to notice that it lost the database."""
    with psycopg.connect(crashable, autocommit=True) as db:
        db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
        db.execute("INSERT INTO items VALUES (1, '{1,1}')")
        db.execute("SELECT syncd.attach('items', metric => 'l2')")
    if request.param == "is asleep":
        daemon = Daemon(crashable, tmp_path / "data", poll_seconds=30)
        daemon.with_constant("syncd.sync.consumer.pace.PEEK_SECONDS", (0.1, 0.1))
    else:
        daemon = Daemon(crashable, tmp_path / "data")
        daemon.with_constant("syncd.postgres.listener.FIRST_DELAY_SECONDS", NOTICED_AFTER_SECONDS)
    yield daemon.start()
    if daemon.process is not None:
        daemon.kill()


def lose_commits(server: PostgresServer, conninfo: str, client: Client) -> None:
    """Have syncd apply commits that are lost in a crash afterwards.

    The WAL writer may write them just before the crash. Then the crash proves nothing, and another
    one follows.
    """
    for last in range(1000 + LOST_COMMITS, 1000 + 10 * LOST_COMMITS, LOST_COMMITS):
        # It includes the checkpoint that syncd makes when it is ready. Later, that checkpoint's
        # commit would save commits that are to be lost.
        client.checkpoint()
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute("SET synchronous_commit = off")
            for key in range(last - LOST_COMMITS + 1, last + 1):
                db.execute("INSERT INTO items VALUES (%s, '{2,2}')", [key])
            row = db.execute("SELECT syncd.token()").fetchone()
            assert row is not None
            client.wait(row[0])
        assert last in set(client.keys("items"))
        server.crash()
        server.start()
        if last not in table_keys(conninfo):
            return
    pytest.fail("no crash has lost a commit")


def table_keys(conninfo: str) -> list[int]:
    """Keys of the table."""
    with psycopg.connect(conninfo) as db:
        return [key for (key,) in db.execute("SELECT id FROM items ORDER BY id").fetchall()]


def insert(conninfo: str, key: int) -> str:
    """Insert a row, and return its token."""
    with psycopg.connect(conninfo, autocommit=True) as db, db.transaction():
        db.execute("INSERT INTO items VALUES (%s, '{3,3}')", [key])
        row = db.execute("SELECT syncd.token()").fetchone()
        assert row is not None
        return str(row[0])


@pytest.mark.parametrize("follower", ["waits before it connects again", "is asleep"], indirect=True)
def test_a_token_from_after_a_crash_waits_for_a_position_from_after_it(
    own_server: PostgresServer, crashable: str, follower: Daemon
) -> None:
    with follower.client() as client:
        lose_commits(own_server, crashable, client)
        token = insert(crashable, 2)
        client.wait(token, timeout_ms=20_000)
        assert sorted(client.keys("items")) == table_keys(crashable)


def test_a_checkpoint_after_a_crash_does_not_vouch_for_lost_commits(
    own_server: PostgresServer, crashable: str, follower: Daemon
) -> None:
    with follower.client() as client:
        client.checkpoint()
        lose_commits(own_server, crashable, client)
        insert(crashable, 2)
        client.checkpoint()
    follower.kill()
    follower.start()
    with follower.client() as client:
        assert sorted(client.keys("items")) == table_keys(crashable)
    follower.stop()


def test_a_checkpoint_after_a_lost_connection_is_saved(crashable: str, follower: Daemon) -> None:
    with follower.client() as client, psycopg.connect(crashable, autocommit=True) as db:
        client.checkpoint()
        db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name LIKE 'syncd/%'"
        )
        client.checkpoint()
