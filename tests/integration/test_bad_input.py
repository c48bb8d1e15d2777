"""Bad requests, bad rows, bad names, bad surroundings: each gets its clear error, and the service goes on."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import string
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from syncd.errors import NotReady, UnknownDataset
from syncd.rpc.client import Client
from syncd.types import dataset_name
from tests.conftest import Servers, clone
from tests.daemon import Daemon
from tests.faults.following import until
from tests.servers import PostgresServer

WAIT_SECONDS = 30.0
REPORT_SECONDS = 10.0


# One service, many bad requests


@pytest.fixture(scope="module")
def shared(
    server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[psycopg.Connection, Daemon]]:
    """A running syncd and its database, shared by the tests that leave both as they were."""
    for conninfo in clone(server):
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute(
                "CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1,0,0}'), (2, '{0,1,0}')"
            )
            db.execute(
                "CREATE TABLE flat (id int PRIMARY KEY, v real[]); INSERT INTO flat VALUES (1, '{1,0,0}'), (2, '{0,1,0}')"
            )
            db.execute("SELECT syncd.attach('items'), syncd.attach('flat', metric => 'l2')")
            daemon = Daemon(conninfo, tmp_path_factory.mktemp("bad") / "data").start()
            yield db, daemon
            daemon.stop()


@pytest.fixture
def service(shared: tuple[psycopg.Connection, Daemon]) -> Iterator[Daemon]:
    """The shared service; after every test the same process still answers, also on a connection from before."""
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
    """Send raw bytes, get the next answer; None where the connection was closed instead."""
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


NAN, INFINITY = float("nan"), float("inf")
NOT_FINITE = "nan"  # the reason of NaN and infinity alike


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
)  # fmt: skip
def test_a_request_that_cannot_be_answered_gets_the_error_of_its_kind(
    service: Daemon, params: dict[str, Any], kind: str
) -> None:
    with lines(service) as ask:
        request = {"jsonrpc": "2.0", "id": 7, "method": "search", "params": {"dataset": "items"} | params}
        answer = ask(json.dumps(request).encode() + b"\n")
        assert answer["id"] == 7
        assert answer["error"]["code"] == (-32602 if kind == "invalid_params" else -32000)
        assert answer["error"]["data"]["kind"] == kind, answer
        assert answer["error"]["data"]["hint"]
        assert len(answer["error"]["message"]) < 1000, "a message does not repeat all it was given"
        assert ask(b'{"jsonrpc":"2.0","id":8,"method":"ping"}\n')["result"] == "pong"


def test_a_zero_vector_is_a_vector_where_the_metric_needs_no_norm(service: Daemon) -> None:
    with service.client() as client:
        assert [hit.key for hit in client.search("flat", [0, 0, 0])] == [1, 2]


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"{", -32700),
        (b"nonsense", -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"search","params":{"dataset":"items","vector":[NaN,1,1]}}', -32700),
        (b"\xff\xfe{}", -32700),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping"}\x00', -32700),
        (b"[]", -32600),
        (b"1", -32600),
        (b'{"jsonrpc":"2.0","id":1,"method":"nosuch"}', -32601),
        (b'{"jsonrpc":"2.0","id":1,"method":"search","params":{"dataset":"items","vector":[1,2,3],"nosuch":1}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"search","params":{"dataset":1,"vector":[1,2,3]}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"search","params":{"dataset":"items"}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"search","params":{"dataset":"items","key":"one"}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"search","params":{"dataset":"items","key":[1]}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"search","params":{"dataset":"items","key":1e300}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"wait","params":{"after":"not a token"}}', -32602),
        (b'{"jsonrpc":"2.0","id":1,"method":"ping","params":' + b"[" * 5000 + b"]" * 5000 + b"}", None),
    ],
    ids=lambda value: None if isinstance(value, int | None) else repr(value[:60]),
)  # fmt: skip
def test_a_line_that_is_no_request_is_answered_and_the_connection_goes_on(
    service: Daemon, line: bytes, code: int | None
) -> None:
    with lines(service) as ask:
        answer = ask(line + b"\n")
        assert "error" in answer
        assert code is None or answer["error"]["code"] == code, answer
        assert answer["error"]["message"]
        assert ask(b'{"jsonrpc":"2.0","id":2,"method":"ping"}\n') == {"jsonrpc": "2.0", "id": 2, "result": "pong"}


def test_a_line_of_100_mb_is_too_large_and_only_its_own_connection_closes(service: Daemon) -> None:
    with lines(service) as ask:
        answer = ask(b"x" * (100 << 20) + b"\n")
        assert answer is None or (answer["id"], answer["error"]["data"]["kind"]) == (None, "too_large")


def test_clients_that_vanish_in_the_middle_harm_nobody(service: Daemon) -> None:
    search = json.dumps(
        {"jsonrpc": "2.0", "id": 1, "method": "search", "params": {"dataset": "items", "vector": [1, 2, 3]}}
    ).encode()
    waiting = b'{"jsonrpc":"2.0","id":1,"method":"wait","params":{"after":"99999999999","timeout_ms":60000}}\n'
    for sent in (b"", search[:20], search + b"\n", (search + b"\n") * 500, waiting):
        for _ in range(5):
            raw = socket.socket(socket.AF_UNIX)
            raw.connect(str(service.socket))
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raw.sendall(sent)
            raw.close()


# Bad rows


def reported(db: psycopg.Connection, expected: dict[tuple[str, str], str]) -> None:
    """``syncd.quarantine`` shows this within the time that it may lag."""
    with contextlib.suppress(AssertionError):
        until(lambda: quarantine(db) == expected, "what is in quarantine is reported", REPORT_SECONDS)
    assert quarantine(db) == expected


def quarantine(db: psycopg.Connection) -> dict[tuple[str, str], str]:
    return {
        (dataset, key): reason
        for dataset, key, reason in db.execute("SELECT dataset, key, reason FROM syncd.quarantine").fetchall()
    }


def test_rows_that_cannot_be_indexed_are_quarantined_with_the_reason_and_the_others_go_on(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    good = "(1, '{1,0,0}'), (2, '{0,1,0}'), (3, '{0,0,1}')"
    db.execute(f"INSERT INTO items VALUES {good}, (10, '{{NaN,0,0}}'), (11, '{{1,2}}'), (12, '{{1,NULL,2}}')".encode())
    db.execute("SELECT syncd.attach('items')")
    daemon.start()
    before = {
        ("default/items", "10"): NOT_FINITE,
        ("default/items", "11"): "dimension_mismatch",
        ("default/items", "12"): "null_element",
    }
    with daemon.client() as client:
        assert sorted(client.keys("items")) == [1, 2, 3]
        assert client.status().quarantined == 3
        reported(db, before)
        db.execute(
            "INSERT INTO items VALUES (13, '{0,0,0}'), (14, '{}'), (15, '{Infinity,1,1}'), (16, '{{1,2,3}}'), (17, '{1,2,3,4}'), (4, '{1,1,1}')"
        )
        assert sorted(client.keys("items")) == [1, 2, 3, 4] or client.search("items", [1, 1, 1], consistency="strong")
        assert sorted(client.keys("items")) == [1, 2, 3, 4]
        assert client.status().quarantined == 8
        after = before | {
            ("default/items", "13"): "zero_norm", ("default/items", "14"): "empty", ("default/items", "15"): NOT_FINITE,
            ("default/items", "16"): "not_one_dimensional", ("default/items", "17"): "dimension_mismatch",
        }  # fmt: skip
        reported(db, after)
        # Mended, deleted, no longer live: each leaves the quarantine.
        db.execute("UPDATE items SET v = '{1,2,3}' WHERE id IN (10, 13)")
        db.execute("DELETE FROM items WHERE id IN (11, 14)")
        db.execute("UPDATE items SET v = NULL WHERE id IN (12, 15)")
        # A good row that turns bad leaves the index.
        db.execute("UPDATE items SET v = '{NaN,1,1}' WHERE id = 1")
        client.search("items", [1, 1, 1], consistency="strong")
        assert sorted(client.keys("items")) == [2, 3, 4, 10, 13]
        assert client.status().quarantined == 3
        left = {
            ("default/items", "16"): "not_one_dimensional",
            ("default/items", "17"): "dimension_mismatch",
            ("default/items", "1"): NOT_FINITE,
        }
        reported(db, left)
    daemon.stop()
    daemon.start()
    with daemon.client() as client:
        assert client.status().quarantined == 3
        assert sorted(client.keys("items")) == [2, 3, 4, 10, 13]
        db.execute("TRUNCATE items")
        assert client.search("items", [1, 1, 1], consistency="strong") == []
        assert client.status().quarantined == 0
        reported(db, {})


def test_a_zero_vector_is_indexed_where_the_metric_needs_no_norm(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{0,0}'), (2, '{1,1}')")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    daemon.start()
    with daemon.client() as client:
        assert [hit.key for hit in client.search("items", [0, 0])] == [1, 2]


@pytest.mark.parametrize(
    ("vector_type", "good", "bad"),
    [
        (
            "bytea",
            "'\\x0000803f0000803f'",
            {"'\\x00'": "not_float32", "''": "empty", "'\\x0000807f0000803f'": NOT_FINITE},
        ),
        ("double precision[]", "'{1,1}'", {"'{1e300,1}'": NOT_FINITE, "'{1,NULL}'": "null_element"}),
        ("vector", "'[1,1]'", {"'[0,0]'": "zero_norm", "'[1,1,1]'": "dimension_mismatch"}),
        ("halfvec(2)", "'[1,1]'", {"'[0,0]'": "zero_norm"}),
    ],
)
def test_each_vector_type_has_its_own_ways_to_be_bad(
    db: psycopg.Connection, daemon: Daemon, vector_type: str, good: str, bad: dict[str, str]
) -> None:
    db.execute(f"CREATE TABLE items (id int PRIMARY KEY, v {vector_type})".encode())
    rows = ", ".join(f"({number}, {value})" for number, value in enumerate(bad, start=10))
    db.execute(f"INSERT INTO items VALUES (1, {good}), (2, {good}), (3, {good}), {rows}".encode())
    db.execute("SELECT syncd.attach('items', vector => 'v')")
    daemon.start()
    with daemon.client() as client:
        assert sorted(client.keys("items")) == [1, 2, 3]
    wanted = {("default/items", str(number)): reason for number, reason in enumerate(bad.values(), start=10)}
    reported(db, wanted)


def test_a_dataset_belongs_to_the_source_that_formed_it_and_anothers_rows_are_quarantined(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE first (id int PRIMARY KEY, v real[]); CREATE TABLE second (id int PRIMARY KEY, name text, v real[])"
    )
    db.execute(
        "INSERT INTO first VALUES (1, '{1,1}'); INSERT INTO second VALUES (2, 'same', '{1,1}'), (3, 'other', '{1,1}')"
    )
    db.execute("SELECT syncd.attach('first', dataset => $$'same'$$)")
    db.execute("SELECT syncd.attach('second', dataset => 'name')")
    daemon.start()
    with daemon.client() as client:
        assert list(client.keys("same")) == [1]
        assert list(client.keys("other")) == [3]
        reported(db, {("default/same", "2"): "dataset_taken"})
        db.execute("UPDATE second SET name = 'other'")
        assert {hit.key for hit in client.search("other", [1, 1], consistency="strong")} == {2, 3}
        assert client.status().quarantined == 0


def test_a_row_whose_project_or_dataset_is_null_is_quarantined(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, name text, v real[]); INSERT INTO items VALUES (1, NULL, '{1}'), (2, 'a', '{1}')"
    )
    db.execute("SELECT syncd.attach('items', dataset => 'name')")
    daemon.start()
    with daemon.client() as client:
        assert list(client.keys("a")) == [2]
    until(lambda: set(quarantine(db).values()) == {"null_dataset"}, "the row is reported", REPORT_SECONDS)


def test_a_row_on_which_an_expression_fails_is_quarantined_until_it_is_mended(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, n int, v real[]); INSERT INTO items VALUES (1, 1, '{1}')")
    db.execute("CREATE TABLE others (id int PRIMARY KEY, v real[]); INSERT INTO others VALUES (1, '{1}')")
    db.execute("SELECT syncd.attach('items', live => '10 / n > 1'), syncd.attach('others')")
    daemon.start()
    with daemon.client() as client:
        db.execute("INSERT INTO items VALUES (2, 0, '{1}'); INSERT INTO others VALUES (2, '{1}')")
        assert {hit.key for hit in client.search("others", [1], consistency="strong")} == {1, 2}
        assert {hit.key for hit in client.search("items", [1], consistency="strong")} == {1}
        until(lambda: set(quarantine(db).values()) == {"expression_failed"}, "the row is reported", REPORT_SECONDS)
        db.execute("UPDATE items SET n = 2 WHERE id = 2")
        assert {hit.key for hit in client.search("items", [1], consistency="strong")} == {1, 2}


# Bad names


LONG = "".join(random.Random(1).choices(string.ascii_letters + string.digits, k=10_000))  # nothing compresses it
NAMES = ["../../etc/x", "..", ".", "", "x" * 10_000, LONG, "a\\x00b\\0\\u0000", "nul %00", "new\nline", "/", "//", "%2F", "C:\\x", "~", "-rf", "ü😀",
         " ", "postgres", "postgres.users", "manifest.json", "manifest.json.new", "consumer.lock", "syncd.sock", "MANIFEST.JSON"]  # fmt: skip


def test_rows_are_found_under_any_name_and_files_stay_in_the_data_directory(
    db: psycopg.Connection, tmp_path: Path
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, project text, dataset text, v real[])")
    names = (
        [(name, "d") for name in NAMES]
        + [("p", name) for name in NAMES]
        + [("a", "b/c"), ("a/b", "c"), ("..", ".."), ("", "")]
    )
    with db.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO items VALUES (%s, %s, %s, '{1,2}')", [(number, *name) for number, name in enumerate(names)]
        )
    db.execute("SELECT syncd.attach('items', project => 'project', dataset => 'dataset')")
    outside = tmp_path / "outside"
    daemon = Daemon(db.info.dsn, outside / "data")
    try:
        daemon.start()
        for restarted in (False, True):
            with daemon.client() as client:
                assert {row.dataset for row in client.datasets()} >= {dataset_name(*name) for name in names}
                for number, name in enumerate(names):
                    assert list(client.keys(dataset_name(*name))) == [number], name
                client.checkpoint()
                if restarted:
                    until(
                        lambda: len(set(db.execute("SELECT dataset FROM syncd.status").fetchall())) == len(set(names)),
                        "every dataset is reported",
                        REPORT_SECONDS,
                    )
                else:
                    assert list(client.keys("p/postgres")) == [len(NAMES) + NAMES.index("postgres")]
            assert {path.name for path in outside.iterdir()} == {"data", "data.log"}
            assert {path.name for path in daemon.data_dir.iterdir() if path.is_file()} <= {
                "consumer.lock",
                "manifest.json",
                "manifest.previous.json",
            }
            daemon.stop()
            if not restarted:
                daemon.start()
                assert daemon.log.read_text().count("source_to_be_read") == 2, "the second start read nothing again"
    finally:
        if daemon.process is not None:
            daemon.kill()


@pytest.mark.parametrize("key_type", ["text", "varchar"])
def test_keys_may_be_any_text_also_where_a_page_of_a_scan_ends(
    db: psycopg.Connection, daemon: Daemon, key_type: str
) -> None:
    db.execute(f"CREATE TABLE items (id {key_type} PRIMARY KEY, v real[])".encode())
    db.execute("INSERT INTO items SELECT '%s {x} %(y)s ''\" \\ ' || i, ARRAY[i, 1] FROM generate_series(1, 2500) i")
    db.execute("SELECT syncd.attach('items')")
    daemon.start()
    with daemon.client() as client:
        assert len(list(client.keys("items"))) == 2500
        db.execute("INSERT INTO items VALUES ('', '{1,1}'), ('%d%', '{1,1}'), (E'\\n', '{1,1}')")
        assert len(client.search("items", [1, 1], k=10_000, consistency="strong")) == 2503
        assert client.search("items", key="%d%", k=1)[0].distance == pytest.approx(0, abs=1e-6)


# Bad surroundings


def refused_start(daemon: Daemon, *words: str, status: int = 1, seconds: float = 30.0) -> None:
    """``serve`` ends within so long, says why and what to do, and prints nothing on stdout."""
    begun = time.monotonic()
    process = daemon.spawn()
    assert process.stdout is not None
    try:
        out, _ = process.communicate(timeout=60)
    finally:
        daemon.kill()
    took = time.monotonic() - begun
    log = daemon.log.read_text()
    assert (process.returncode, out) == (status, b""), log
    assert "Traceback" not in log
    assert re.search(r"^error: .*\n  next: ", log, re.MULTILINE), log
    for word in words:
        assert word in log, log
    assert took < seconds
    assert not daemon.socket.exists()


def test_a_socket_path_that_is_too_long_is_refused(database: str, tmp_path: Path) -> None:
    refused_start(Daemon(database, tmp_path / "data", socket=tmp_path / ("s" * 120)), "SYNCD_SOCKET", "107", status=2)


def test_a_server_that_refuses_connections_ends_the_start(tmp_path: Path) -> None:
    refused_start(Daemon("host=127.0.0.1 port=1", tmp_path / "data"), "Connection refused", "SYNCD_DSN")
    refused_start(Daemon("host=/nosuch/folder", tmp_path / "data"), "No such file", "SYNCD_DSN")


def test_a_server_that_never_answers_ends_the_start_within_30_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=10) as silent:
        port = silent.getsockname()[1]
        refused_start(
            Daemon(f"host=127.0.0.1,127.0.0.1,127.0.0.1,127.0.0.1 port={port},{port},{port},{port}", tmp_path / "data"),
            "SYNCD_DSN",
        )


def test_a_server_that_answers_and_then_hangs_ends_the_start_within_30_seconds(
    db: psycopg.Connection, database: str, tmp_path: Path
) -> None:
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE syncd.consumers IN ACCESS EXCLUSIVE MODE")
        refused_start(Daemon(database, tmp_path / "data"), "has not answered")
    assert db.execute("SELECT count(*) FROM syncd.consumers").fetchone() == (0,)


def test_a_database_that_is_missing_or_without_init_ends_the_start(server: PostgresServer, tmp_path: Path) -> None:
    refused_start(Daemon(server.conninfo("nosuch"), tmp_path / "data"), "nosuch", "create the database")
    refused_start(Daemon(server.conninfo("postgres"), tmp_path / "data"), "no schema syncd", "syncd init")


def test_a_database_of_another_schema_version_ends_the_start(
    db: psycopg.Connection, database: str, tmp_path: Path
) -> None:
    db.execute("UPDATE syncd.alembic_version SET version_num = '9999'")
    refused_start(Daemon(database, tmp_path / "data"), "9999", "pip install --upgrade syncd")
    db.execute("UPDATE syncd.alembic_version SET version_num = '0000'")
    refused_start(Daemon(database, tmp_path / "data"), "0000", "syncd init")


def test_a_schema_that_lacks_a_function_is_not_called_missing(
    db: psycopg.Connection, database: str, tmp_path: Path
) -> None:
    db.execute("DROP FUNCTION syncd.rotate_outbox")
    refused_start(Daemon(database, tmp_path / "data"), "is damaged", "rotate_outbox", "syncd uninstall && syncd init")


@pytest.fixture(scope="module")
def scram(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server that wants passwords over TCP."""
    server = PostgresServer(
        16, tmp_path_factory.mktemp("scram"), tcp=True, settings={"password_encryption": "scram-sha-256"}
    )
    with server:
        rules = server.folder / "cluster" / "pg_hba.conf"
        rules.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        server.execute("CREATE ROLE app LOGIN PASSWORD 'right-secret'")
        server.execute("SELECT pg_reload_conf()")
        yield server


def test_a_wrong_password_ends_the_start_and_is_not_shown(scram: PostgresServer, tmp_path: Path) -> None:
    def conninfo(**password: str) -> str:
        return make_conninfo(host="127.0.0.1", port=scram.port, user="app", dbname="postgres", **password)

    for name, password in (("wrong", {"password": "wrong-secret"}), ("none", {})):
        daemon = Daemon(conninfo(**password), tmp_path / name)
        refused_start(daemon, "password", "SYNCD_DSN, PGPASSWORD or ~/.pgpass")
        assert "secret" not in daemon.log.read_text()
    right = {"password": "right-secret"}
    daemon = Daemon(conninfo(**right), tmp_path / "right")
    refused_start(daemon, "no schema syncd")
    assert "secret" not in daemon.log.read_text()


def test_a_data_directory_that_another_syncd_holds_is_refused(database: str, daemon: Daemon) -> None:
    daemon.start()
    assert daemon.process is not None
    refused_start(
        Daemon(database, daemon.data_dir, consumer="second"),
        f"in use by another syncd (process {daemon.process.pid})",
        "SYNCD_DATA_DIR",
    )
    with daemon.client() as client:
        assert client.ping()


def test_a_socket_that_another_syncd_answers_on_is_refused(database: str, daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    second = Daemon(database, tmp_path / "second", consumer="second")
    second.settings["socket"] = daemon.socket
    refused_start(second, "another syncd answers", "SYNCD_SOCKET", status=2)
    with daemon.client() as client:
        assert client.ping()


def test_a_data_directory_that_is_a_file_is_refused(database: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused_start(Daemon(database, tmp_path / "file"), "data directory", "SYNCD_DATA_DIR")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare: a read-only mount binds root too",
)
def test_a_read_only_data_directory_is_refused(database: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    daemon = Daemon(database, data)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    probe = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, str(data), "true"], capture_output=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip("this container may not mount")
    command = ["unshare", "--mount", "sh", "-c", mount, str(data), sys.executable, "-m", "syncd.cli.main", "serve"]
    done = subprocess.run(command, env=daemon.environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Read-only file system" in done.stderr
    assert "SYNCD_DATA_DIR" in done.stderr


def test_files_of_others_in_the_data_directory_are_left_alone(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1}')")
    db.execute("SELECT syncd.attach('items')")
    mine = [
        daemon.data_dir / "notes.txt",
        daemon.data_dir / "lost+found" / "a" / "b" / "c.txt",
        daemon.data_dir / "postgres" / "base" / "1" / "2",
    ]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    daemon.start()
    daemon.stop()
    daemon.start()
    daemon.stop()
    assert [path.exists() for path in mine] == [True] * len(mine)


# Signals and names


def test_sigterm_and_sigint_exit_0_and_leave_a_checkpoint_and_no_socket(db: psycopg.Connection, daemon: Daemon) -> None:
    for how in (signal.SIGTERM, signal.SIGINT):
        daemon.start()
        assert oct(daemon.socket.stat().st_mode & 0o777) == "0o660"
        process = daemon.end(how)
        assert process.returncode == 0, daemon.log.read_text()
        assert not daemon.socket.exists()
        assert (daemon.data_dir / "manifest.json").exists()
    until(lambda: not open_connections(db), "its connections are closed", WAIT_SECONDS)


def test_a_second_signal_stops_at_once(daemon: Daemon) -> None:
    process = daemon.start().process
    assert process is not None
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(daemon.socket))
        raw.sendall(b'{"jsonrpc":"2.0","id":1,"method":"wait","params":{"after":"99999999999","timeout_ms":60000}}\n')
        raw.sendall(b'{"jsonrpc":"2.0","id":2,"method":"ping"}\n')
        assert b"pong" in raw.recv(1000)
        process.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in daemon.log.read_text(), "it is stopping", WAIT_SECONDS)
        process.send_signal(signal.SIGTERM)
        process.wait(5)
    assert "stopped_at_once" in daemon.log.read_text()
    daemon.kill()


def test_a_process_whose_consumer_name_was_taken_exits_1_and_says_so(
    db: psycopg.Connection, database: str, daemon: Daemon, tmp_path: Path
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1}')")
    db.execute("SELECT syncd.attach('items')")
    first = daemon.start().process
    assert first is not None
    second = Daemon(database, tmp_path / "second").start()
    try:
        assert first.wait(WAIT_SECONDS) == 1
        daemon.kill()
        log = daemon.log.read_text()
        assert "error: another process has taken the consumer name 'default'" in log
        assert "  next: stop one of them, or give each its own SYNCD_CONSUMER" in log
        assert "Traceback" not in log
        with second.client() as client:
            assert list(client.keys("items")) == [1]
        third = Daemon(database, tmp_path / "third", consumer="third").start()
        with third.client() as client:
            assert list(client.keys("items")) == [1]
        third.stop()
        assert sorted(db.execute("SELECT DISTINCT consumer FROM syncd.status").fetchall()) == [("default",), ("third",)]
    finally:
        second.stop()


def test_at_most_four_connections_are_open_and_each_is_named(db: psycopg.Connection, daemon: Daemon) -> None:
    daemon.start()
    with daemon.client() as client:
        client.checkpoint()
        names = open_connections(db)
    assert 1 <= len(names) <= 4
    assert set(names) == {"syncd/default"}


def open_connections(db: psycopg.Connection) -> list[str]:
    rows = db.execute(
        "SELECT application_name FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    return [name for (name,) in rows.fetchall()]


def test_a_role_that_may_not_read_a_source_fails_that_source_alone_and_says_which_grant(
    servers: Servers, tmp_path: Path
) -> None:
    server = servers.of(18)
    for conninfo in clone(server):
        server.execute("CREATE ROLE reader LOGIN")
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute(
                "GRANT USAGE ON SCHEMA syncd TO reader; GRANT ALL ON ALL TABLES IN SCHEMA syncd TO reader;"
                " GRANT ALL ON ALL SEQUENCES IN SCHEMA syncd TO reader"
            )
            db.execute(
                "CREATE TABLE open (id int PRIMARY KEY, v real[]); CREATE TABLE closed (LIKE open INCLUDING ALL); GRANT SELECT ON open TO reader"
            )
            db.execute("INSERT INTO open VALUES (1, '{1}'); INSERT INTO closed VALUES (1, '{1}')")
            db.execute("SELECT syncd.attach('open'), syncd.attach('closed')")
            daemon = Daemon(make_conninfo(conninfo, user="reader"), tmp_path / "data").start()
            try:
                assert r"GRANT SELECT ON \"public\".\"closed\"" in daemon.log.read_text()
                with daemon.client() as client:
                    assert list(client.keys("open")) == [1]
                    db.execute("GRANT SELECT ON closed TO reader")
                    until(lambda: has_keys(client, "closed", [1]), "the rows it may read now are found", WAIT_SECONDS)
                daemon.stop()
            finally:
                if daemon.process is not None:
                    daemon.kill()
            db.execute("DROP OWNED BY reader")
        server.execute("DROP ROLE reader")


def has_keys(client: Client, dataset: str, keys: list[object]) -> bool:
    try:
        return list(client.keys(dataset)) == keys
    except (NotReady, UnknownDataset):
        return False
