"""Reader processes: whichever one a connection meets, it gets the service's answers."""

from __future__ import annotations

import json
import os
import random
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from msgspec.json import decode

from syncd.client.calls import Call
from syncd.client.client import Client
from syncd.errors import (
    Overloaded,
    ServiceUnavailable,
    SyncdError,
    TimedOut,
    Unauthorized,
    UnknownDataset,
)
from syncd.protocol.messages import SearchParams, SearchResult, WirePosition
from syncd.protocol.status_messages import ReaderStatus
from syncd.types import Token
from tests.daemon import Daemon
from tests.faults.following import until
from tests.scrape import events, sample, samples, wait_for_event
from tests.servers import free_port

READERS = 2
CONNECTIONS = 20
SECONDS = 30.0
TOKEN = "of a test"  # noqa: S105


@pytest.fixture
def items(db: psycopg.Connection, database: str, tmp_path: Path) -> Iterator[Daemon]:
    """A service with readers that follows a table of ten rows, not yet started."""
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items SELECT i, ARRAY[i, 0] FROM generate_series(1, 10) i")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    daemon = Daemon(database, tmp_path / "data", readers=READERS)
    yield daemon
    if daemon.process is not None:
        daemon.kill()


def running(daemon: Daemon, number: int = READERS) -> list[ReaderStatus]:
    """The readers, as soon as there are ``number`` of them."""
    with daemon.client() as client:
        until(lambda: len(client.status().readers) >= number, "the readers run")
        return client.status().readers


def until_gone(pid: int) -> None:
    """Return when a process has ended: the other end of a pidfd is readable then."""
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            look = select.poll()
            look.register(descriptor, select.POLLIN)
            assert look.poll(SECONDS * 1000), f"{pid} still runs"
        finally:
            os.close(descriptor)


def test_connections_are_spread_over_readers_and_each_reads_its_own_writes(
    items: Daemon, db: psycopg.Connection
) -> None:
    items.start()
    running(items)
    with ExitStack() as stack:
        clients = [stack.enter_context(items.client()) for _ in range(CONNECTIONS)]
        for number, client in enumerate(clients):
            row = db.execute(
                "INSERT INTO items VALUES (%s, ARRAY[%s, 5]) RETURNING syncd.token()",
                (100 + number, number),
            ).fetchone()
            assert row is not None
            (found,) = client.search("items", [number, 5], k=1, after=row[0])
            assert found.key == 100 + number
            assert [each.key for each in client.get("items", [100 + number])] == [100 + number]
        spread = [each.connections for each in clients[0].status().readers]
        assert sum(spread) >= CONNECTIONS
        assert min(spread) >= CONNECTIONS // 4  # a busy machine keeps a reader from accepting
        assert all(each.memory_bytes > 0 for each in clients[0].status().readers)
        assert len(set(clients[0].keys("items"))) == 10 + CONNECTIONS
        assert clients[0].verify("items").datasets[0].in_sync


def test_a_killed_reader_costs_its_own_connections_and_is_started_again(items: Daemon) -> None:
    items.settings["http"] = "127.0.0.1:0"
    items.start()
    before = running(items)
    with ExitStack() as stack:
        clients = [stack.enter_context(items.client()) for _ in range(2 * READERS)]
        for client in clients:
            client.ping()
        os.kill(before[0].pid, signal.SIGKILL)
        until_gone(before[0].pid)
        lost = 0
        for client in clients:
            try:
                client.search("items", [1, 0], k=1)
            except SyncdError:
                lost += 1
        assert 0 <= lost <= 2  # a client that finds its connection closed connects again
    assert wait_for_event(items, "reader_lost")["reason"] == "it was ended by SIGKILL"
    assert before[0].pid not in {each.pid for each in running(items)}
    assert sample(items, "syncd_readers") == READERS
    assert sample(items, "syncd_reader_restarts_total") == 1
    with items.client() as client:
        assert [each.task for each in client.status().failing_tasks] == ["readers"]
    items.stop()


def test_readers_end_with_the_main_process_and_leave_nothing(items: Daemon) -> None:
    items.start()
    readers = running(items)
    items.kill()
    for each in readers:
        until_gone(each.pid)
    items.start()  # neither the socket nor the directory is held
    readers = running(items)
    items.stop()
    for each in readers:
        until_gone(each.pid)


def test_a_stop_finishes_the_requests_that_were_handed_over(
    items: Daemon, db: psycopg.Connection, database: str
) -> None:
    items.start()
    running(items)
    answered: list[object] = []
    with items.client() as client, psycopg.connect(database) as lock:
        client.ping()
        lock.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        verify = threading.Thread(target=lambda: answered.append(client.verify("items")))
        verify.start()
        waits = "SELECT FROM pg_locks WHERE relation = 'items'::regclass AND NOT granted"
        until(lambda: bool(db.execute(waits).fetchall()), "the verify waits for the lock")
        assert items.process is not None
        items.process.terminate()
        lock.rollback()
        verify.join()
        assert items.process.wait(SECONDS) == 0
    assert len(answered) == 1
    assert not events(items, "request_failed")


def test_no_more_connections_than_allowed_over_all_readers(items: Daemon) -> None:
    items.settings["max_connections"] = 5
    items.start()
    running(items)
    with ExitStack() as stack:
        opened = 0
        while opened < 5:
            with suppress(Overloaded):  # a reader may not know yet that another client has left
                stack.enter_context(items.client()).ping()
                opened += 1
        with pytest.raises(Overloaded, match="5 connections"), items.client() as one_too_many:
            one_too_many.ping()
        with items.client() as spare:
            assert len(spare.status().readers) == READERS


def test_tcp_connections_need_the_token_at_every_reader(items: Daemon) -> None:
    items.settings |= {"listen": "127.0.0.1:0", "token": TOKEN}
    items.start()
    running(items)
    address = wait_for_event(items, "listening")["address"]
    with ExitStack() as stack:
        for _ in range(READERS):
            client = stack.enter_context(Client(f"tcp://{address}", token=TOKEN))
            assert client.search("items", [3, 0], k=1)[0].key == 3
            with pytest.raises(Unauthorized), Client(f"tcp://{address}") as stranger:
                stranger.ping()


def test_requests_that_are_handed_over_keep_their_ids_and_end_with_their_client(
    items: Daemon,
) -> None:
    items.start()
    running(items)
    requests = [
        {"jsonrpc": "2.0", "id": "a", "method": "rpc.discover"},
        {"jsonrpc": "2.0", "id": 12345678901234567890, "method": "get", "params": {"dataset": "x"}},
        {"jsonrpc": "2.0", "id": 1, "method": "nothing"},
        {"jsonrpc": "2.0", "id": 2, "method": "reader.ready", "params": {"seat": 1}},
        {"jsonrpc": "2.0", "id": 2.5, "method": "datasets"},
        {"jsonrpc": "2.0", "method": "datasets"},
    ]
    with socket.socket(socket.AF_UNIX) as unix:
        unix.settimeout(SECONDS)
        unix.connect(str(items.socket))
        unix.sendall(b"".join(json.dumps(each).encode() + b"\n" for each in requests))
        unix.shutdown(socket.SHUT_WR)
        with unix.makefile() as lines:
            answers = {str(answer["id"]): answer for answer in map(json.loads, lines)}
    assert sorted(answers) == ["1", "12345678901234567890", "2", "2.5", "a"]
    assert "methods" in answers["a"]["result"]
    assert answers["12345678901234567890"]["error"]["code"] == -32602
    assert answers["1"]["error"]["code"] == answers["2"]["error"]["code"] == -32601
    assert answers["2.5"]["result"][0]["dataset"] == "default/items"


def test_the_main_process_answers_while_no_reader_can_start(items: Daemon) -> None:
    items.with_constant("syncd.readers.pool.FALL_BACK_SECONDS", 0.1)
    items.with_constant("syncd.readers.process.PR_SET_PDEATHSIG", None)  # every reader fails
    port = free_port()
    items.settings |= {"sql_listen": f"127.0.0.1:{port}", "token": TOKEN}
    items.start()
    target = f"host=127.0.0.1 port={port} user=u dbname=d password='{TOKEN}'"
    with items.client() as client, psycopg.connect(target) as sql:
        found = sql.execute("SELECT key FROM search('items', '[3, 0]', k => 1)").fetchall()
        assert found == [("3",)]
        assert client.search("items", [3, 0], k=1)[0].key == 3
        assert client.status().readers == [] or client.status().failing_tasks
    assert events(items, "no_reader")
    items.stop()


@contextmanager
def frozen(daemon: Daemon) -> Iterator[None]:
    """The main process does not run: what is answered is answered by a reader."""
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        daemon.process.send_signal(signal.SIGCONT)


def until_answered_here(daemon: Daemon, client: Client, dataset: str) -> None:
    """Return when the client's reader answers for a dataset itself."""
    while True:
        client.search(dataset, key=1, k=1)  # has it shared
        client.verify(dataset)
        with frozen(daemon), suppress(SyncdError):
            client.search(dataset, key=1, k=1, timeout_ms=200)
            return


def test_a_reader_answers_searches_gets_keys_and_filters_without_the_main_process(
    db: psycopg.Connection, items: Daemon
) -> None:
    db.execute("ALTER TABLE items ADD lang text DEFAULT 'en'")
    db.execute("SELECT syncd.attach('items', metric => 'l2', columns => ARRAY['lang'])")
    db.execute("UPDATE items SET lang = 'de' WHERE id > 5")
    items.start()
    running(items)
    with Client(items.socket, timeout=SECONDS) as client:
        token = db.execute("DELETE FROM items WHERE id = 3 RETURNING syncd.token()").fetchone()
        assert token is not None
        until_answered_here(items, client, "items")
        client.search("items", [3, 0], after=token[0])
        with frozen(items):
            assert [hit.key for hit in client.search("items", [3, 0], k=2)] == [2, 4]
            found = client.search("items", [3, 0], k=1, filter={"lang": "de"}, include=["lang"])
            assert [(hit.key, hit.columns) for hit in found] == [(6, {"lang": "de"})]
            assert [hit.key for hit in client.search("items", key=4, k=2)] == [5, 2]
            assert [row.key for row in client.get("items", [3, 4])] == [4]
            assert sorted(client.keys("items")) == [1, 2, 4, 5, 6, 7, 8, 9, 10]


def asked(unix: socket.socket, method: str, **params: object) -> dict[str, Any]:
    """The result of one request, as it is on the wire."""
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    unix.sendall(json.dumps(request).encode() + b"\n")
    with unix.makefile() as lines:
        result: dict[str, Any] = json.loads(lines.readline())["result"]
        return result


def test_the_position_of_an_answer_has_reached_the_token_that_it_was_asked_with(
    items: Daemon, db: psycopg.Connection
) -> None:
    items.start()
    running(items)
    with items.client() as client:
        until_answered_here(items, client, "items")
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(4)]
        for unix in connections:
            unix.settimeout(SECONDS)
            unix.connect(str(items.socket))
        for number, unix in enumerate(connections * 5):
            (token,) = db.execute(
                "INSERT INTO items VALUES (%s, '{0,9}') RETURNING syncd.token()", (500 + number,)
            ).fetchone() or ("",)
            found = asked(unix, "search", dataset="items", vector=[0, 9], after=token)
            position = WirePosition(**found["position"]).position()
            assert position.snapshot.sees(Token.parse(token).xid)
            assert found["lag_seconds"] == 0


@pytest.mark.parametrize("writes", [200, pytest.param(10_000, marks=pytest.mark.long)])
def test_every_connection_reads_its_own_writes_while_readers_are_killed(
    items: Daemon, db: psycopg.Connection, writes: int
) -> None:
    """Another writer keeps passes under way; each answer must hold the token's row."""
    items.start()
    generator = random.Random(writes)
    over = threading.Event()

    def write_on() -> None:
        with psycopg.connect(items.conninfo, autocommit=True) as other:
            while not over.wait(0.002):  # without a pause, a busy service would fall behind
                other.execute("UPDATE items SET v = ARRAY[v[1], v[2]] WHERE id <= 10")

    with ExitStack() as stack:
        clients = [stack.enter_context(items.client()) for _ in range(CONNECTIONS)]
        writer = threading.Thread(target=write_on)
        writer.start()
        try:
            for number in range(writes):
                row = db.execute(
                    "INSERT INTO items VALUES (%s, ARRAY[%s, 7]) RETURNING syncd.token()",
                    (1000 + number, number),
                ).fetchone()
                assert row is not None
                client = generator.choice(clients)
                if number % 50 == 25:
                    with suppress(IndexError, ProcessLookupError, SyncdError):
                        reader = generator.choice(client.status().readers)
                        os.kill(reader.pid, signal.SIGKILL)
                while True:
                    with suppress(ServiceUnavailable):
                        found = client.search("items", [number, 7], k=1, after=row[0])
                        break
                assert found[0].key == 1000 + number
        finally:
            over.set()
            writer.join()
        assert clients[0].verify("items").datasets[0].in_sync


def test_a_rebuild_an_attach_and_a_detach_reach_every_reader(
    items: Daemon, db: psycopg.Connection
) -> None:
    items.start()
    running(items)
    with ExitStack() as stack:
        clients = [stack.enter_context(items.client()) for _ in range(2 * READERS)]
        for client in clients:
            until_answered_here(items, client, "items")
        assert clients[0].rebuild("items").rows == 10
        for client in clients:
            assert [hit.key for hit in client.search("items", [3, 0], k=1)] == [3]
        db.execute("TRUNCATE items")
        token = db.execute("INSERT INTO items VALUES (77, '{1,2,3}') RETURNING syncd.token()")
        (after,) = token.fetchone() or ("",)
        for client in clients:
            assert [hit.key for hit in client.search("items", [1, 2, 3], after=after)] == [77]
        db.execute("SELECT syncd.detach('items')")
        (after,) = db.execute("SELECT syncd.token()").fetchone() or ("",)
        clients[0].wait(after)
        for client in clients:
            with pytest.raises(UnknownDataset):
                client.search("items", [1, 2, 3])


def test_searches_of_all_readers_are_counted_in_one_scrape(items: Daemon) -> None:
    items.settings["http"] = "127.0.0.1:0"
    items.start()
    running(items)
    with ExitStack() as stack:
        clients = [stack.enter_context(items.client()) for _ in range(2 * READERS)]
        for client in clients:
            until_answered_here(items, client, "items")
        before = sample(items, "syncd_searches_total", dataset="default/items", outcome="ok")
        for client in clients:
            client.search("items", [1, 0])
        after = sample(items, "syncd_searches_total", dataset="default/items", outcome="ok")
        assert after == before + len(clients)
        seconds = sample(items, "syncd_search_seconds_count", dataset="default/items")
        assert seconds == after
        labels = {"dataset": "default/items", "outcome": "timeout"}
        timeouts = ("syncd_searches_total", frozenset(labels.items()))
        late = samples(items).get(timeouts, 0)  # on a busy machine an earlier search may be late
        with psycopg.connect(items.conninfo) as other:  # it does not commit
            (token,) = other.execute("SELECT syncd.token()").fetchone() or ("",)
            with pytest.raises(TimedOut):
                clients[0].search("items", [1, 0], after=token, timeout_ms=1)
        assert samples(items)[timeouts] == late + 1


def test_a_frozen_reader_is_ended_and_its_clients_find_another(items: Daemon) -> None:
    items.with_constant("syncd.readers.seats.LOOK_SECONDS", 0.1)
    items.with_constant("syncd.readers.process.BEAT_SECONDS", 0.1)
    items.start()
    before = running(items)
    with ExitStack() as stack:
        clients = [stack.enter_context(items.client()) for _ in range(2 * READERS)]
        for client in clients:
            client.ping()
        os.kill(before[0].pid, signal.SIGSTOP)  # while it is idle
        for client in clients:
            with suppress(ServiceUnavailable):  # its connection was closed
                assert client.search("items", [1, 0], k=1)[0].key == 1
        until_gone(before[0].pid)
    assert wait_for_event(items, "reader_frozen")
    assert before[0].pid in [each["pid"] for each in events(items, "reader_frozen")]
    assert before[0].pid not in {each.pid for each in running(items)}
    with items.client() as client:
        assert client.search("items", [1, 0], k=1)[0].key == 1


def test_while_the_main_process_does_not_run_answers_have_a_lag_and_waits_end(
    items: Daemon,
) -> None:
    items.with_constant("syncd.sync.consumer.consumer.HANGS_SECONDS", 0.2)
    items.with_constant("syncd.readers.handing_over.LATE_SECONDS", 0.1)
    items.start()
    running(items)
    near = SearchParams(dataset="items", vector=[3.0, 0.0])
    lag = Call("search", near, lambda found: decode(found, type=SearchResult).lag_seconds)
    with Client(items.socket, timeout=5.0) as client:
        until_answered_here(items, client, "items")
        deadline = time.monotonic() + SECONDS
        with frozen(items):
            with pytest.raises(TimedOut, match="main process has not answered"):
                client.search("items", [3, 0], consistency="strong", timeout_ms=100)
            while client.run(lag) < 1:
                assert time.monotonic() < deadline
        while client.run(lag):
            assert time.monotonic() < deadline
        assert client.search("items", [3, 0], k=1, consistency="strong")[0].key == 3
