"""The ops endpoints of a real service: their answers, and when they give them."""

from __future__ import annotations

import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest

from syncd.client.client import Client
from tests.conftest import clone
from tests.daemon import Daemon
from tests.faults.following import until
from tests.integration.commands import assert_failed, run
from tests.scrape import events, get, readyz, url_of, wait_for_event
from tests.servers import PostgresServer

HOSTILE = "<script>alert(1)</script>'\"&"


def make_table(database: str, name: str = "t", rows: int = 5) -> None:
    with psycopg.connect(database, autocommit=True) as db:
        db.execute(
            f"CREATE TABLE {name} (id int PRIMARY KEY, kind text DEFAULT 'a', v real[])".encode()
        )
        db.execute(
            f"INSERT INTO {name} (id, v) SELECT i, ARRAY[i, 1] "
            f"FROM generate_series(1, {rows}) AS i".encode()
        )
        db.execute(f"SELECT syncd.attach('{name}', dataset => 'kind', metric => 'l2')".encode())


@pytest.fixture(scope="module")
def followed(server: PostgresServer) -> Iterator[str]:
    """A database with one table, two datasets, one with a hostile name, and a quarantined row."""
    for database in clone(server):
        make_table(database)
        with psycopg.connect(database, autocommit=True) as db:
            db.execute(
                "INSERT INTO t VALUES (100, %s, '{1,1}'), (101, %s, '{2,1}')", [HOSTILE, HOSTILE]
            )
            db.execute("INSERT INTO t VALUES (200, 'a', '{nan,1}')")
        yield database


@pytest.fixture(scope="module")
def service(followed: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(followed, tmp_path_factory.mktemp("http") / "data", http="127.0.0.1:0")
    daemon.with_constant("syncd.ops.history.SAMPLE_SECONDS", 0.05).with_constant(
        "syncd.sync.background.reports.REPORT_SECONDS", 0.1
    )
    yield daemon.start()
    daemon.stop()


# Probes


def is_ready(daemon: Daemon) -> bool:
    return readyz(daemon)[0] == 200


def test_a_service_that_runs_is_live_and_ready(service: Daemon) -> None:
    assert get(service, "/livez") == (200, "ok\n")
    status, body = readyz(service)
    assert (status, body["ready"], body["reasons"]) == (200, True, [])


def test_a_service_is_live_but_not_ready_and_says_why_until_every_dataset_answers(
    database: str, tmp_path: Path
) -> None:
    make_table(database)
    with psycopg.connect(database) as lock:
        lock.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        daemon = Daemon(database, tmp_path / "data", http="127.0.0.1:0")
        process = daemon.spawn()
        try:
            wait_for_event(daemon, "source_delayed")
            assert get(daemon, "/livez")[0] == 200
            status, body = readyz(daemon)
            # Until the end of the first pass the reason is that the service is starting.
            while "public.t" not in body["reasons"][0]:
                assert (status, body["ready"]) == (503, False)
                status, body = readyz(daemon)
            assert (status, body["ready"]) == (503, False)
            lock.rollback()
            assert daemon.wait_for_line(process).startswith(b"ready ")
            until(partial(is_ready, daemon), "the service is ready")
        finally:
            daemon.stop()


def test_a_service_stays_ready_while_postgres_is_down_and_says_how_old_its_answers_are(
    server: PostgresServer, tmp_path: Path
) -> None:
    for database in clone(server):
        make_table(database)
        name = psycopg.conninfo.conninfo_to_dict(database)["dbname"]
        patient = Daemon(database, tmp_path / "patient", http="127.0.0.1:0").start()
        strict = Daemon(
            database,
            tmp_path / "strict",
            http="127.0.0.1:0",
            consumer="b",
            max_staleness_seconds=0.5,
        ).start()
        while readyz(strict)[0] != 200:  # until a heartbeat has arrived in time
            pass
        server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
        server.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )
        for daemon in (patient, strict):
            wait_for_event(daemon, "database_lost")
        _, before = readyz(strict)
        while before["stale_seconds"] <= 0.5:  # the age of the answers has to grow
            _, before = readyz(strict)
        status, body = readyz(strict)
        assert status == 503
        assert "SYNCD_MAX_STALENESS_SECONDS" in body["reasons"][-1]
        status, body = readyz(patient)
        assert status == 200
        assert "cannot be reached" in body["remarks"][0]
        assert body["stale_seconds"] > 0
        with patient.client() as client:
            assert len(client.search("a", key=1, k=2)) == 2
        server.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        until(partial(is_ready, strict), "the service is ready again")
        patient.stop()
        strict.stop()


def test_a_table_attached_later_does_not_take_a_ready_service_out_of_rotation(
    database: str, tmp_path: Path
) -> None:
    make_table(database)
    daemon = Daemon(database, tmp_path / "data", http="127.0.0.1:0").start()
    assert readyz(daemon)[0] == 200
    with (
        psycopg.connect(database) as db,
        psycopg.connect(database) as lock,
        ThreadPoolExecutor(1) as threads,
    ):
        db.execute("CREATE TABLE later (id int PRIMARY KEY, v real[])")
        db.commit()
        db.execute("SELECT syncd.attach('later')")
        # No pass comes between the attachment and the lock.
        locked = threads.submit(lock.execute, "LOCK TABLE later IN ACCESS EXCLUSIVE MODE")
        waits = "SELECT FROM pg_locks WHERE pid = %s AND NOT granted"
        until(
            lambda: bool(db.execute(waits, [lock.info.backend_pid]).fetchall()),
            "the lock is waited for",
        )
        db.commit()
        locked.result()
        status, body = readyz(daemon)
        while not body["remarks"]:
            status, body = readyz(daemon)
        assert status == 200
    daemon.stop()


def test_a_heartbeat_that_does_not_arrive_makes_answers_stale(
    database: str, tmp_path: Path
) -> None:
    """The database answers every ping, and a pass never ends."""
    make_table(database)
    daemon = Daemon(
        database,
        tmp_path / "data",
        http="127.0.0.1:0",
        max_staleness_seconds=0.2,
        poll_seconds=0.05,
    )
    daemon.with_constant("syncd.sync.background.reports.REPORT_SECONDS", 0.05).start()
    with psycopg.connect(database) as lock:
        lock.execute("LOCK TABLE syncd.consumers IN ACCESS EXCLUSIVE MODE")
        body: dict[str, Any] = {"ready": True}
        while body["ready"]:
            _, body = readyz(daemon)
        assert body["stale_seconds"] > 0.2
    until(partial(is_ready, daemon), "the heartbeat has arrived")
    daemon.stop()


def test_a_locked_table_lags_and_the_others_do_not(database: str, tmp_path: Path) -> None:
    """Passes over the other tables, and attempts at this one, go on meanwhile."""
    for name in ("t", "free"):
        make_table(database, name)
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("SELECT syncd.attach('free', dataset => $$'free'$$, metric => 'l2')")
    daemon = Daemon(
        database, tmp_path / "data", http="127.0.0.1:0", poll_seconds=0.05, max_staleness_seconds=1
    ).start()

    def lags(client: Client) -> tuple[float, float]:
        found = {row.source: row.lag_seconds for row in client.datasets()}
        return found["public.t"], found["public.free"]

    with daemon.client() as client, psycopg.connect(database) as lock:
        until(lambda: lags(client) == (0, 0), "at rest")
        lock.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        until(lambda: lags(client)[0] > 2, "the locked table lags")
        assert lags(client)[1] == 0
        assert client.search("a", [1.0, 1.0], k=1)[0].key == 1
        assert client.status().lag_seconds > 2
        assert readyz(daemon)[0] == 503
        lock.rollback()
        until(lambda: lags(client) == (0, 0), "the table is read again")
        until(lambda: client.status().lag_seconds == 0, "the service does not lag")
        until(partial(is_ready, daemon), "the heartbeat has arrived")
    daemon.stop()


# Status


def test_status_is_the_answer_of_the_rpc(service: Daemon) -> None:
    status, body = get(service, "/status")
    assert status == 200
    found = json.loads(body)
    with service.client() as client:
        assert found["status"]["version"] == client.status().version
        assert [one["dataset"] for one in found["datasets"]] == [
            one.dataset for one in client.datasets()
        ]
        assert {one["dataset"]: one["count"] for one in found["datasets"]} == {
            one.dataset: one.count for one in client.datasets()
        }


# The address


def test_a_default_port_that_is_taken_is_a_warning_and_the_service_goes_on(
    database: str, tmp_path: Path
) -> None:
    for _ in range(10):
        with ExitStack() as stack:
            # If another program has the port, that serves as well, unless the program ends
            # meanwhile.
            with suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", 9464)))
            daemon = Daemon(database, tmp_path / "data", http="").start()
            daemon.stop()
        if events(daemon, "http_not_served"):
            break
    assert events(daemon, "http_not_served")[0]["hint"]


def test_a_chosen_port_that_is_taken_ends_the_start_with_exit_1(
    database: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        http = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run(
            "serve",
            SYNCD_DSN=database,
            SYNCD_DATA_DIR=str(tmp_path / "data"),
            SYNCD_SOCKET=str(tmp_path / "s"),
            SYNCD_HTTP=http,
        )
    assert_failed(done, 1, f"cannot listen on {http}", "SYNCD_HTTP")


def test_sigterm_still_saves_a_checkpoint_and_a_client_that_stays_connected_does_not_hold_it_up(
    database: str, tmp_path: Path
) -> None:
    make_table(database)
    daemon = Daemon(database, tmp_path / "data", http="127.0.0.1:0").start()
    host, _, port = events(daemon, "http_listening")[0]["address"].rpartition(":")
    with (
        socket.create_connection((host, int(port))) as idle,
        socket.create_connection((host, int(port))) as half,
    ):
        half.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n")
        idle.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle.recv(15) == b"HTTP/1.1 200 OK"
        daemon.stop()
    assert (daemon.data_dir / "manifest.json").is_file()


def test_after_noise_the_service_answers_on(service: Daemon) -> None:
    host, _, port = events(service, "http_listening")[0]["address"].rpartition(":")
    for noise in (
        b"",
        b"\0" * 1000,
        b"GET / HTTP/9\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab",
        b"GET /" + b"x" * 100_000,
    ):
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(noise)
    for path in (
        "/nosuch",
        "/metrics/../../etc/passwd",
        "/?dataset=%00&key=%ff",
        "/?dataset=a&key=" + "9" * 5000,
    ):
        assert get(service, path)[0] in (200, 404)
    assert get(service, "/livez")[0] == 200


# The page


def test_the_page_says_in_sync_and_shows_every_dataset_escaped(service: Daemon) -> None:
    until(lambda: "In sync" in get(service, "/")[1], "no change waits")
    status, page = get(service, "/")
    assert status == 200
    assert "default/a" in page
    assert HOSTILE not in page
    assert f"default/{HOSTILE}" in unescape(page)
    assert page.count("<script>") == 1
    assert not re.search(r"(?:src|href)=.?(?:https?:)?//", page)


def test_the_page_finds_rows_like_a_given_one_and_explains_a_wrong_key(
    service: Daemon,
) -> None:
    page = get(service, "/?" + urlencode({"dataset": "a", "key": "1"}))[1]
    found = page.partition('<table id="found">')[2].partition("</table>")[0]
    assert re.findall(r'<td class="name">(\d+)</td>', found) == ["2", "3", "4", "5"]
    page = get(service, "/?" + urlencode({"dataset": f"default/{HOSTILE}", "key": "100"}))[1]
    assert (
        re.findall(r'<td class="name">(\d+)</td>', page.partition('<table id="found">')[2])[0]
        == "101"
    )
    assert HOSTILE not in page
    for dataset, key, words in (
        ("a", "99", "no row with the key"),
        ("a", "x", "the key is an integer"),
        ("nosuch", "1", "there is no dataset"),
        (f"default/{HOSTILE}", HOSTILE, "not a key of this dataset"),
    ):
        page = get(service, "/?" + urlencode({"dataset": dataset, "key": key}))[1]
        assert words in unescape(page).partition('role="alert"')[2]
        assert HOSTILE not in page


def test_the_page_shows_quarantine_events_and_charts_of_the_last_hour(service: Daemon) -> None:
    page = get(service, "/live")[1]
    while "<svg" not in page or "<td>nan</td>" not in page:  # the first sample, the first report
        page = get(service, "/live")[1]
    assert page.count("<svg") == 4
    assert "default/a: 1 rows" in page
    assert "source_ready" in page


def test_the_pages_policy_lets_its_own_style_and_script_run_and_nothing_else(
    service: Daemon,
) -> None:
    with urllib.request.urlopen(url_of(service)) as answer:  # noqa: S310
        policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


def test_a_dataset_says_how_old_its_checkpoint_is_and_when_it_was_last_compared(
    service: Daemon, followed: str
) -> None:
    with service.client() as client, psycopg.connect(followed, autocommit=True) as db:
        client.checkpoint()
        client.verify()
        db.execute("INSERT INTO t VALUES (500, 'unsaved', '{1,1}')")
        row = db.execute("SELECT syncd.token()").fetchone()
        assert row is not None
        client.wait(row[0])
    page = get(service, "/live")[1].partition("Last hour</h2>")[0]
    lines = {
        name: line
        for line in page.split("<tr>")
        for name in ("default/a<", "default/unsaved<")
        if name in line
    }
    assert re.search(r" s ago</td><td>in sync, [0-9.]+ s ago<", lines["default/a<"])
    assert "<td>not yet</td><td>not yet</td>" in lines["default/unsaved<"]
