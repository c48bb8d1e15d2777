"""verify at work: it waits for a lock a moment and keeps nobody waiting, ends with its client, runs by itself; a command tells what it found."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg

from syncd.client.client import Client
from tests.daemon import Daemon
from tests.faults.following import until
from tests.integration.verifying import assert_equal, counts, of, unseen

# Among others


def test_a_verify_waits_for_whoever_holds_the_table_for_a_moment(followed: Daemon) -> None:
    with (
        psycopg.connect(followed.conninfo) as holder,
        followed.client() as client,
        ThreadPoolExecutor(1) as pool,
    ):
        holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        until(lambda: "source_delayed" in followed.log.read_text(), "it waits for the lock")
        found = pool.submit(client.verify, "items")
        time.sleep(0.5)  # not to wait for anything: the lock is held meanwhile
        holder.rollback()
        assert counts(of(found.result(30))) == (True, 0, 0, 0)


def test_a_table_that_is_locked_for_long_is_said_not_to_be_compared(followed: Daemon) -> None:
    with psycopg.connect(followed.conninfo) as holder, followed.client() as client:
        holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        until(lambda: "source_delayed" in followed.log.read_text(), "it waits for the lock")
        found = client.verify("items")
        (source,) = found.sources
        assert (source.outcome, "lock" in source.reason, of(found).in_sync) == (
            "failed",
            True,
            False,
        )
        holder.rollback()
        assert "drift_found" not in followed.log.read_text()
        until(lambda: of(client.verify("items")).in_sync, "it compares the table again")


def test_rows_that_come_and_go_beside_a_verify_wait_for_nobody(
    db: psycopg.Connection, followed: Daemon
) -> None:
    """An ALTER TABLE behind a verify would make every writer wait behind it."""
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 1, 1, 2, 3, 4, 5, 6]::real[]::vector FROM generate_series(2000, 60000) i"
    )
    followed.stop()
    followed.with_constant(
        "syncd.sync.background.comparison.ROWS_PER_DEEP_FETCH", 5
    ).start()  # a slow one
    stop = threading.Event()

    def verify(client: Client) -> None:
        while not stop.is_set():
            client.verify("items", deep=True)

    with followed.client() as client, ThreadPoolExecutor(1) as pool:
        verifying = pool.submit(verify, client)
        try:
            db.execute("SET lock_timeout = '1s'")
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
            stop.set()
        verifying.result()


def test_a_verify_whose_client_has_gone_is_not_under_way_any_more(
    db: psycopg.Connection, followed: Daemon
) -> None:
    followed.stop()
    followed.with_constant(
        "syncd.sync.background.comparison.ROWS_PER_DEEP_FETCH", 1
    ).start()  # a slow one

    def sessions() -> int:
        return len(
            db.execute(
                "SELECT FROM pg_stat_activity WHERE application_name = 'syncd/default'"
            ).fetchall()
        )

    def compared() -> list[int]:
        return [work.rows for work in client.status().work if work.what == "verifying"]

    with followed.client() as client:
        client.verify("items")
        before = sessions()
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(followed.socket))
            other.sendall(
                b'{"jsonrpc": "2.0", "id": 1, "method": "verify", "params": {"dataset": "items", "deep": true}}\n'
            )
            until(lambda: max(compared(), default=0) > 1, "the verify has compared rows")
        until(lambda: sessions() == before, "the session of the verify is gone")
        assert compared() == []


# By itself and as a command


def test_the_background_verify_mends_what_drifted(db: psycopg.Connection, followed: Daemon) -> None:
    unseen(db, "DELETE FROM items WHERE id <= 10")
    followed.stop()
    followed.settings["verify_seconds"] = 3600
    followed.start()
    with followed.client() as client:
        until(
            lambda: len([*client.keys("items")]) == 990,
            "the rows that are gone have left the index",
        )
    assert_equal(db, followed)
    log = followed.log.read_text()
    assert '"drift_found"' in log
    assert '"drift_repaired"' in log


def run(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line."""
    return subprocess.run(
        [sys.executable, "-m", "syncd.cli.main", *arguments],
        env=daemon.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_says_what_differs_and_exits_1(
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


def test_a_verify_that_compared_nothing_says_so(db: psycopg.Connection, daemon: Daemon) -> None:
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
        until(lambda: client.status().state == "failed", "it has failed")
        result = client.verify()
        assert not of(result).in_sync
        assert [source.outcome for source in result.sources if source.source == "public.items"] == [
            "failed"
        ]
    assert run(followed, "verify").returncode == 1
