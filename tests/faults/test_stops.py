"""SIGTERM ends a service in about ten seconds, also if its database is frozen, gone or without
schema syncd."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from syncd.errors import NotReady, SyncdError
from syncd.postgres import schema
from tests.daemon import Daemon
from tests.faults.following import takes_requests, until
from tests.servers import PostgresServer

STOP_SECONDS = 40.0
"""Longest time until a service has stopped: ten seconds are promised to an idle machine."""


@contextmanager
def frozen(server: PostgresServer) -> Iterator[None]:
    """Freeze the server and all its sessions: they neither close a connection nor answer."""
    processes = server.processes()
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@pytest.fixture
def followed(own_server: PostgresServer, tmp_path: Path) -> Iterator[Daemon]:
    """A service that follows a table; the server serves this test alone."""
    own_server.execute("CREATE TABLE chunks (id int PRIMARY KEY, v real[])", "syncd_template")
    own_server.execute(
        "INSERT INTO chunks SELECT i, ARRAY[i, 1] FROM generate_series(1, 100) AS i",
        "syncd_template",
    )
    own_server.execute("SELECT syncd.attach('chunks')", "syncd_template")
    daemon = Daemon(own_server.conninfo("syncd_template"), tmp_path / "data").start()
    yield daemon
    if daemon.process is not None:
        daemon.kill()


def assert_stops(daemon: Daemon) -> None:
    """SIGTERM ends the service in order and in time."""
    process = daemon.process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    try:
        status = process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # with the stacks of all threads
        process.wait()
        pytest.fail(f"syncd has not stopped within {STOP_SECONDS:g} s\n{daemon.log.read_text()}")
    daemon.process = None
    assert process.stdout is not None
    process.stdout.close()
    assert status == 0, daemon.log.read_text()
    assert not daemon.socket.exists()


def assert_in_sync_again(daemon: Daemon) -> None:
    """The next start replays the changes since the last checkpoint."""
    with daemon.start().client() as client:
        assert client.verify(deep=True).datasets[0].in_sync


def test_a_server_that_hangs_is_a_lag_long_before_it_is_given_up(
    own_server: PostgresServer, followed: Daemon
) -> None:
    with followed.client() as client:
        until(lambda: client.status().lag_seconds == 0, "all is well")
        with frozen(own_server):
            until(lambda: client.status().lag_seconds > 5, "the server does not answer")
            assert all(dataset.lag_seconds > 5 for dataset in client.datasets())
            assert len(client.search("chunks", [1, 1], k=3)) == 3
            assert "database_lost" not in followed.log.read_text()
        until(lambda: client.status().lag_seconds == 0, "the server answers again")


def test_a_stop_does_not_wait_for_a_server_that_hangs(
    own_server: PostgresServer, followed: Daemon
) -> None:
    with frozen(own_server):
        assert_stops(followed)
        assert "checkpoint_failed" in followed.log.read_text()
    assert_in_sync_again(followed)


def test_a_stop_does_not_wait_for_requests_that_wait_for_a_server_that_hangs(
    own_server: PostgresServer, followed: Daemon
) -> None:
    connected = threading.Barrier(5)

    def ask(method: str) -> None:
        with suppress(SyncdError), followed.client() as client:
            connected.wait()
            methods: dict[str, Callable[[], object]] = {
                "verify": client.verify,
                "checkpoint": client.checkpoint,
                "rebuild": lambda: client.rebuild("chunks"),
                "wait": lambda: client.wait(str(2**40), timeout_ms=60_000),
            }
            methods[method]()

    with frozen(own_server):
        asking = [
            threading.Thread(target=ask, args=[each])
            for each in ("verify", "checkpoint", "rebuild", "wait")
        ]
        for each in asking:
            each.start()
        connected.wait()
        assert_stops(followed)
        for each in asking:
            each.join()
    assert_in_sync_again(followed)


def test_a_stop_does_not_wait_for_a_server_that_was_killed(
    own_server: PostgresServer, followed: Daemon
) -> None:
    own_server.kill()
    assert_stops(followed)
    own_server.start()
    assert_in_sync_again(followed)


def test_a_stop_does_not_wait_if_the_schema_is_gone_and_then_the_server(
    own_server: PostgresServer, followed: Daemon
) -> None:
    assert schema.uninstall(followed.conninfo)
    with psycopg.connect(followed.conninfo) as db:
        assert db.execute("SELECT to_regnamespace('syncd')").fetchone() == (None,)
    own_server.stop("immediate")
    assert_stops(followed)


def test_a_start_that_waits_for_a_server_that_hangs_can_be_stopped(
    own_server: PostgresServer, followed: Daemon
) -> None:
    followed.stop()
    with frozen(own_server):
        followed.spawn()
        until(lambda: takes_requests(followed), "syncd serves")
        with followed.client() as client:
            assert client.status().database_error is not None
            with pytest.raises(NotReady):  # an empty result would mean: no differences
                client.verify()
        assert_stops(followed)
    assert_in_sync_again(followed)
