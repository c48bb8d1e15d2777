"""verify at work: it waits for a lock for a moment, makes no session wait, and ends with its
client.

It also runs by itself; a command prints the result.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psycopg
import pytest

from syncd.client.client import Client
from syncd.errors import ServiceUnavailable
from tests.daemon import Daemon
from tests.faults.following import logged, until
from tests.integration.verifying import HELD_UP_SOON, assert_equal, counts, of, unseen

# Among others


def test_a_verify_waits_for_a_lock_that_is_held_for_a_moment(followed: Daemon) -> None:
    with (
        psycopg.connect(followed.conninfo) as holder,
        followed.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        until(lambda: "source_delayed" in followed.log.read_text(), "a pass waits for the lock")
        found = pool.submit(client.verify, "items")
        time.sleep(0.5)  # the lock is held for this long
        holder.rollback()
        assert counts(of(found.result(60))) == (True, 0, 0, 0)


def test_a_table_that_is_locked_for_long_is_reported_as_not_compared(
    daemon: Daemon, request: pytest.FixtureRequest
) -> None:
    daemon.constants.update(HELD_UP_SOON)
    followed: Daemon = request.getfixturevalue("followed")
    with psycopg.connect(followed.conninfo) as holder, followed.client() as client:
        holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        until(lambda: "source_delayed" in followed.log.read_text(), "a pass waits for the lock")
        found = client.verify("items")
        (source,) = found.sources
        assert (source.outcome, "lock" in source.reason, of(found).in_sync) == (
            "failed",
            True,
            False,
        )
        holder.rollback()
        assert "drift_found" not in followed.log.read_text()
        until(lambda: of(client.verify("items")).in_sync, "the table is compared again")
    assert logged(followed, "rules_not_kept") == 0, "reports do not wait for the lock"


def test_an_alter_table_does_not_wait_for_a_verify(
    db: psycopg.Connection, daemon: Daemon, request: pytest.FixtureRequest
) -> None:
    """Every writer would wait behind an ALTER TABLE that waits. The verify fetches single rows."""
    daemon.with_constant("syncd.sync.background.comparison.ROWS_PER_DEEP_FETCH", 1)
    followed: Daemon = request.getfixturevalue("followed")
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 1, 1, 2, 3, 4, 5, 6]::real[]::vector "
        "FROM generate_series(2000, 60000) i"
    )

    def verify(client: Client) -> None:
        with suppress(ServiceUnavailable):  # the service is killed in the end
            while True:
                client.verify("items", deep=True)

    with followed.client() as client, ThreadPoolExecutor(1) as pool:
        verifying = pool.submit(verify, client)
        try:
            db.execute("SET lock_timeout = '10s'")
            until(
                lambda: (
                    db.execute(
                        "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'FETCH %syncd_verify%'"
                    ).fetchone()
                    is not None
                ),
                "a verify reads the table",
            )
            db.execute("ALTER TABLE items ADD COLUMN more int")
        finally:
            followed.kill()
        verifying.result()


def test_a_verify_ends_with_its_client(
    db: psycopg.Connection, daemon: Daemon, request: pytest.FixtureRequest
) -> None:
    daemon.with_constant("syncd.sync.background.comparison.ROWS_PER_DEEP_FETCH", 1)
    followed: Daemon = request.getfixturevalue("followed")
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 1, 1, 2, 3, 4, 5, 6]::real[]::vector "
        "FROM generate_series(2000, 30000) i"
    )

    session: list[tuple[int]] = []

    def reads() -> bool:
        query = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'FETCH %syncd_verify%'"
        session[:] = db.execute(query).fetchall()
        return len(session) == 1 and max(compared(), default=0) > 1

    def is_open() -> bool:
        query = "SELECT FROM pg_stat_activity WHERE pid = %s"
        return db.execute(query, session[0]).fetchone() is not None

    def compared() -> list[int]:
        return [work.rows for work in client.status().work if work.what == "verifying"]

    with followed.client() as client:
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(followed.socket))
            other.sendall(
                b'{"jsonrpc": "2.0", "id": 1, "method": "verify",'
                b' "params": {"dataset": "items", "deep": true}}\n'
            )
            until(reads, "the verify has compared rows")
        until(lambda: not is_open(), "the session of the verify is gone")
        until(lambda: not compared(), "the verify has ended")


# By itself and as a command


def test_the_background_verify_repairs_drift(db: psycopg.Connection, followed: Daemon) -> None:
    unseen(db, "DELETE FROM items WHERE id <= 10")
    followed.stop()
    followed.settings["verify_seconds"] = 3600
    followed.start()
    with followed.client() as client:
        until(
            lambda: len([*client.keys("items")]) == 990,
            "the deleted rows have left the index",
        )
    assert_equal(db, followed)
    assert logged(followed, '"drift_found"')
    until(lambda: logged(followed, '"drift_repaired"') > 0, "the repair is logged")


def run(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line."""
    return subprocess.run(
        [sys.executable, "-m", "syncd.cli.main", *arguments],
        env=daemon.environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_names_differences_and_exits_1(
    db: psycopg.Connection, followed: Daemon
) -> None:
    done = run(followed, "verify", "items")
    assert done.returncode == 0
    assert "in sync" in done.stdout
    unseen(db, "DELETE FROM items WHERE id = 3")
    done = run(followed, "verify")
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout
    done = run(followed, "verify", "--repair", "--json")
    assert done.returncode == 0
    assert '"repaired":1' in done.stdout
    assert run(followed, "verify", "--deep").returncode == 0
    assert run(followed, "verify", "nothing").returncode == 1
    assert run(followed, "rebuild", "items").returncode == 0
    followed.stop()
    done = run(followed, "verify")
    assert done.returncode == 1
    assert "syncd serve" in done.stderr


def test_a_verify_without_rows_to_compare_says_so(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("SELECT syncd.attach('items', live => 'id < 0')")
    daemon.settings["verify_seconds"] = 0
    daemon.start()
    done = run(daemon, "verify")
    assert done.returncode == 0
    assert "public.items: empty" in done.stderr
    assert "in sync" not in done.stdout
    db.execute("INSERT INTO items VALUES (1, '{1}')")
    done = run(daemon, "verify")
    assert done.returncode == 1
    assert "none of its rows is live" in done.stderr


def test_a_source_that_cannot_be_read_is_not_in_sync(
    db: psycopg.Connection, followed: Daemon
) -> None:
    db.execute("ALTER TABLE items RENAME COLUMN v TO w")
    db.execute("UPDATE items SET w = w WHERE id = 1")
    with followed.client() as client:
        until(lambda: client.status().state == "failed", "the source fails")
        result = client.verify()
        assert not of(result).in_sync
        assert [source.outcome for source in result.sources if source.source == "public.items"] == [
            "failed"
        ]
    assert run(followed, "verify").returncode == 1
