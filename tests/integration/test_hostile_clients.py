"""Clients that send noise, hold connections or ask for too much: no other client notices them."""

from __future__ import annotations

import json
import random
import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import psycopg
import pytest

from syncd.errors import InvalidParams, Overloaded, TimedOut, TooLarge
from syncd.protocol.messages import MAX_PAGE_KEYS, MAX_RESULTS
from tests.conftest import clone
from tests.daemon import Daemon
from tests.integration.commands import run
from tests.scrape import events
from tests.servers import PostgresServer

SEED = 20_261_121
CONNECTIONS = 1000
ROWS = 3000
SECONDS = 60
REQUESTS = [
    b'{"jsonrpc":"2.0","id":1,"method":"search","params":{"dataset":"t","key":7,"k":3}}',
    b'{"jsonrpc":"2.0","id":2,"method":"search","params":'
    b'{"dataset":"t","vectors":[[1,2],[3,4]],"timeout_ms":50,"consistency":"strong"}}',
    b'{"jsonrpc":"2.0","id":3,"method":"get","params":'
    b'{"dataset":"t","keys":[1,2,"3"],"vectors":true}}',
    b'{"jsonrpc":"2.0","id":4,"method":"keys","params":{"dataset":"t","after_key":null,"limit":5}}',
    b'{"jsonrpc":"2.0","id":5,"method":"wait","params":{"after":"1","timeout_ms":10}}',
    b'{"jsonrpc":"2.0","id":6,"method":"status"}',
    b'{"jsonrpc":"2.0","id":7,"method":"why","params":{"dataset":"t"}}',
]
PIECES = [
    *(b"\0", b"\xff\xfe", b"null", b"[" * 2000, b"1e999", b"-0", b"99999999999999999999"),
    *(b'"\\ud800"', b"{}", b'"id":', b"\r", b"\xe2\x80\xa8", b"NaN"),
]


@pytest.fixture(scope="module")
def service(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    for conninfo in clone(server):
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute("CREATE TABLE t (id int PRIMARY KEY, v real[])")
            db.execute(
                f"INSERT INTO t SELECT i, ARRAY[i, 1] FROM generate_series(1, {ROWS}) AS i".encode()
            )
            db.execute("SELECT syncd.attach('t', metric => 'l2')")
        directory = tmp_path_factory.mktemp("hostile")
        daemon = Daemon(conninfo, directory / "data", max_connections=CONNECTIONS)
        daemon.with_constant("syncd.rpc.prepared_search.ELEMENTS_AT_ONCE", 1)
        daemon.with_constant("syncd.protocol.messages.MAX_GET_BYTES", 80_000).start()
        yield daemon
        assert not events(daemon, "request_failed")
        daemon.stop()


@contextmanager
def raw(daemon: Daemon) -> Iterator[socket.socket]:
    """A connection without a client."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as unix:
        unix.settimeout(SECONDS)
        unix.connect(str(daemon.socket))
        yield unix


def answers(unix: socket.socket) -> Iterator[dict[str, Any]]:
    """Answers until the end of the connection."""
    with unix.makefile("rb") as lines:
        for line in lines:
            yield json.loads(line)


def mutated(rng: random.Random) -> bytes:
    """A request, in one line, with changed bytes and with pieces that were inserted or cut out."""
    line = bytearray(rng.choice(REQUESTS))
    for _ in range(rng.randint(0, 4)):
        place = rng.randrange(len(line) + 1)
        match rng.randrange(4):
            case 0:
                line[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                line[place:place] = rng.choice(PIECES)
            case 2:
                del line[place : place + rng.randint(1, 20)]
            case _:
                line[place:place] = line[:place]
    return bytes(line).replace(b"\n", b" ")


def test_each_of_many_fuzzed_lines_is_answered_at_most_once_and_disturbs_no_other_client(
    service: Daemon,
) -> None:
    rng = random.Random(SEED)
    with service.client() as other:
        for _ in range(20):
            lines = [mutated(rng) for _ in range(100)]
            with raw(service) as unix:
                unix.sendall(b"\n".join(lines) + b"\n")
                unix.shutdown(socket.SHUT_WR)
                found = list(answers(unix))
            assert 0 < len(found) <= len(lines)
            assert all(
                one["jsonrpc"] == "2.0" and ("result" in one) != ("error" in one) for one in found
            )
            kinds = {one["error"].get("data", {}).get("kind") for one in found if "error" in one}
            assert "internal_error" not in kinds
            assert other.search("t", key=7, k=2, exact=True)[0].distance == 1
    with service.client() as again:
        assert again.status().state == "ready"


def test_a_thousand_connections_with_half_requests_cost_others_nothing_and_are_answered_when_whole(
    service: Daemon,
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4 * CONNECTIONS), hard))
    half, rest = REQUESTS[0][:40], REQUESTS[0][40:] + b"\n"
    with ExitStack() as stack, service.client() as other:
        assert other.ping() == "pong"
        waiting = [stack.enter_context(raw(service)) for _ in range(CONNECTIONS - 1)]
        for unix in waiting:
            unix.sendall(half)
        assert [hit.distance for hit in other.search("t", key=7, k=2)] == [1, 1]
        assert len(list(other.keys("t"))) == ROWS
        with (
            pytest.raises(Overloaded, match="connections are already open"),
            service.client() as one_too_many,
        ):
            one_too_many.ping()
        for command in ("status", "datasets", "healthcheck"):
            done = run(command, "--socket", str(service.socket))
            assert done.returncode == 0, done.stderr
        for unix in waiting:
            unix.sendall(rest)
        for unix in waiting:
            unix.shutdown(socket.SHUT_WR)
            (one,) = answers(unix)
            assert len(one["result"]["keys"]) == 3
    with service.client() as client:
        while True:  # the service learns of the closed ones one by one
            try:
                assert client.ping() == "pong"
                break
            except Overloaded:
                pass


def test_too_large_a_request_is_refused_with_the_limit(service: Daemon) -> None:
    with service.client() as client:
        with pytest.raises(InvalidParams):
            client.search("t", key=1, k=MAX_RESULTS + 1)
        with pytest.raises(TooLarge, match=str(MAX_RESULTS)):
            client.search("t", vectors=[[1.0, 2.0]] * 101, k=MAX_RESULTS)
        with pytest.raises(TooLarge, match=str(MAX_PAGE_KEYS)):
            client.get("t", list(range(MAX_PAGE_KEYS + 1)))
        with pytest.raises(TooLarge, match="more than 80000 bytes"):
            client.get("t", list(range(10_001)), vectors=True)
        assert len(client.get("t", list(range(10_000)), vectors=True)) == ROWS
        assert len(client.get("t", list(range(MAX_PAGE_KEYS)))) == ROWS
        assert len(client.search("t", key=1, k=MAX_RESULTS)) == ROWS - 1


def test_a_batch_that_takes_longer_than_its_time_is_a_timeout_and_others_are_answered(
    service: Daemon,
) -> None:
    with service.client() as client, service.client() as other:
        with pytest.raises(TimedOut, match="of 100 vectors"):
            client.search("t", vectors=[[1.0, 2.0]] * 100, timeout_ms=0)
        assert len(client.search("t", vectors=[[1.0, 2.0]] * 100)) == 100
        assert other.ping() == "pong"
