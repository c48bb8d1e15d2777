"""Bad requests: each gets the error of its kind.

Its connection goes on if possible, and the service always does.
"""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from tests.conftest import clone
from tests.daemon import Daemon
from tests.servers import PostgresServer

WAIT_SECONDS = 30.0
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture(scope="module")
def shared(
    server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[psycopg.Connection, Daemon]]:
    """A running syncd and its database, for all tests of this file."""
    for conninfo in clone(server):
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute(
                "CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, "
                "'{1,0,0}'), (2, '{0,1,0}')"
            )
            db.execute(
                "CREATE TABLE flat (id int PRIMARY KEY, v real[]); INSERT INTO flat VALUES (1, "
                "'{1,0,0}'), (2, '{0,1,0}')"
            )
            db.execute("SELECT syncd.attach('items'), syncd.attach('flat', metric => 'l2')")
            daemon = Daemon(conninfo, tmp_path_factory.mktemp("bad") / "data").start()
            yield db, daemon
            daemon.stop()


@pytest.fixture
def service(shared: tuple[psycopg.Connection, Daemon]) -> Iterator[Daemon]:
    """The shared service; after a test the same process still answers an older connection."""
    _, daemon = shared
    assert daemon.process is not None
    with daemon.client() as client:
        before = client.status()
        yield daemon
        assert client.status().uptime_seconds > before.uptime_seconds
        assert [hit.key for hit in client.search("items", [1, 0.1, 0])] == [1, 2]
    assert daemon.process.poll() is None


@contextmanager
def lines(daemon: Daemon) -> Iterator[Callable[[bytes], Any]]:
    """A function that sends raw bytes; returns the next answer, or None if the service hangs up."""
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(WAIT_SECONDS)
        raw.connect(str(daemon.socket))
        with raw.makefile("rb") as answers:

            def ask(data: bytes) -> Any:
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    raw.sendall(data)
                line = answers.readline()
                return json.loads(line) if line else None

            yield ask


def base64_of(*numbers: float) -> str:
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()


@pytest.mark.parametrize(
    ("params", "kind"),
    [
        ({"vector": [1, 2]}, "dimension_mismatch"),
        ({"vector": [1, 2, 3, 4]}, "dimension_mismatch"),
        ({"vector": base64_of(1, 2)}, "dimension_mismatch"),
        ({"vectors": [[1, 2, 3], [1]]}, "dimension_mismatch"),
        ({"vector": base64_of(1, NAN, 3)}, "invalid_vector"),
        ({"vector": base64_of(INFINITY, 2, 3)}, "invalid_vector"),
        ({"vector": [1e39, 2, 3]}, "invalid_vector"),
        ({"vector": [0, 0, 0]}, "invalid_vector"),
        ({"vector": []}, "invalid_vector"),
        ({"vector": ""}, "invalid_vector"),
        ({"vector": "AAAA AAAA"}, "invalid_params"),
        ({"vector": "AAA"}, "invalid_params"),
        ({"vector": "\u00e4"}, "invalid_params"),
        ({"vectors": [[1, 2, 3], base64.b64encode(b"12345").decode()]}, "invalid_params"),
        ({"vectors": [[1, 2, 3], []]}, "invalid_vector"),
        ({"dataset": "nosuch", "vector": [1]}, "unknown_dataset"),
        ({"dataset": "", "vector": [1]}, "unknown_dataset"),
        ({"dataset": "../../etc/passwd", "vector": [1]}, "unknown_dataset"),
        ({"dataset": "x" * 100_000, "vector": [1]}, "unknown_dataset"),
        ({"key": 99}, "unknown_key"),
        ({"vector": [1, 2, 3], "filter": {"nosuch": 1}}, "invalid_filter"),
        ({"vector": [1, 2, 3], "after": "99999999999", "timeout_ms": 50}, "timeout"),
    ],
)
def test_a_request_that_cannot_be_answered_gets_the_error_of_its_kind(
    service: Daemon, params: dict[str, Any], kind: str
) -> None:
    with lines(service) as ask:
        request = {
            "jsonrpc": "2.0",
            "id": 7,
            "method": "search",
            "params": {"dataset": "items"} | params,
        }
        answer = ask(json.dumps(request).encode() + b"\n")
        assert answer["id"] == 7
        assert answer["error"]["code"] == (-32602 if kind == "invalid_params" else -32000)
        assert answer["error"]["data"]["kind"] == kind, answer
        assert answer["error"]["data"]["hint"]
        assert len(answer["error"]["message"]) < 1000, "a message does not repeat a long argument"
        assert ask(b'{"jsonrpc":"2.0","id":8,"method":"ping"}\n')["result"] == "pong"


def test_a_zero_vector_is_a_vector_if_the_metric_needs_no_norm(service: Daemon) -> None:
    with service.client() as client:
        assert [hit.key for hit in client.search("flat", [0, 0, 0])] == [1, 2]


SEARCH = b'{"jsonrpc":"2.0","id":1,"method":"search","params":%s}'


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", -32700),
        (b"nonsense", -32700),
        (SEARCH % b'{"dataset":"items","vector":[NaN,1,1]}', -32700),
        (b"\xff\xfe{}", -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping"}\x00', -32700),
        (b"[]", -32600),
        (b"1", -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"nosuch"}', -32601),
        (SEARCH % b'{"dataset":"items","vector":[1,2,3],"nosuch":1}', -32602),
        (SEARCH % b'{"dataset":1,"vector":[1,2,3]}', -32602),
        (SEARCH % b'{"dataset":"items"}', -32602),
        (SEARCH % b'{"dataset":"items","key":"one"}', -32602),
        (SEARCH % b'{"dataset":"items","key":[1]}', -32602),
        (SEARCH % b'{"dataset":"items","key":1e300}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"wait","params":{"after":"not a token"}}', -32602),
        (
            b'{"jsonrpc":"2.0","id":1,"method":"ping","params":%s}' % (b"[" * 5000 + b"]" * 5000),
            None,
        ),
    ],
    ids=lambda value: None if isinstance(value, int | None) else repr(value[:120]),
)
def test_a_line_that_is_not_a_request_is_answered_and_the_connection_goes_on(
    service: Daemon, line: bytes, code: int | None
) -> None:
    with lines(service) as ask:
        answer = ask(line + b"\n")
        assert "error" in answer
        assert code is None or answer["error"]["code"] == code, answer
        assert answer["error"]["message"]
        assert ask(b'{"jsonrpc":"2.0","id":2,"method":"ping"}\n') == {
            "jsonrpc": "2.0",
            "id": 2,
            "result": "pong",
        }


def test_a_line_of_100_mb_is_too_large_and_only_its_own_connection_closes(service: Daemon) -> None:
    with lines(service) as ask:
        answer = ask(b"x" * (100 << 20) + b"\n")
        assert answer is None or (answer["id"], answer["error"]["data"]["kind"]) == (
            None,
            "too_large",
        )


def test_clients_that_vanish_in_the_middle_harm_no_other_client(service: Daemon) -> None:
    search = json.dumps(
        {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "search",
            "params": {"dataset": "items", "vector": [1, 2, 3]},
        }
    ).encode()
    waiting = (
        b'{"jsonrpc":"2.0","id":1,"method":"wait",'
        b'"params":{"after":"99999999999","timeout_ms":60000}}\n'
    )
    for sent in (b"", search[:20], search + b"\n", (search + b"\n") * 500, waiting):
        for _ in range(5):
            raw = socket.socket(socket.AF_UNIX)
            raw.connect(str(service.socket))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.sendall(sent)
            raw.close()
