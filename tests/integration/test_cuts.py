"""Cuts: all shards answer at one snapshot, and the answer equals the table's at that snapshot."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from tests.conftest import TEMPLATE, Servers
from tests.daemon import Daemon

SHARDS = 3
IDS = 300
QUERY = [0.0, 0.0]
EVERY = {"dataset": "numbers", "vector": QUERY, "k": 2 * IDS, "exact": True}
"""A search that finds every row, with its distance."""
SEED = 5


def create(db: psycopg.Connection) -> None:
    """A table, and the log of its rows' versions with their transactions."""
    db.execute("CREATE TABLE numbers (id bigint PRIMARY KEY, v real[], n int)")
    db.execute(
        "CREATE TABLE log (seq bigint GENERATED ALWAYS AS IDENTITY, id bigint, v real[], "
        "xid xid8 DEFAULT pg_current_xact_id())"
    )
    db.execute(
        "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "IF TG_OP = 'DELETE' THEN INSERT INTO log (id) VALUES (OLD.id); "
        "ELSE INSERT INTO log (id, v) VALUES (NEW.id, NEW.v); END IF; RETURN NULL; END $$"
    )
    db.execute(
        "CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON numbers "
        "FOR EACH ROW EXECUTE FUNCTION note()"
    )
    db.execute("SELECT syncd.attach('numbers', metric => 'l2', columns => ARRAY['n'])")


def rows_at(db: psycopg.Connection, snapshot: str) -> dict[int, list[float]]:
    """The table's rows at a snapshot, from the log."""
    found = db.execute(
        "SELECT id, v FROM (SELECT DISTINCT ON (id) id, v FROM log "
        "WHERE pg_visible_in_snapshot(xid, %s::pg_snapshot) ORDER BY id, seq DESC) AS last "
        "WHERE v IS NOT NULL",
        [snapshot],
    )
    return dict(found.fetchall())


def write(conninfo: str, seed: int, done: threading.Event) -> None:
    """Random transactions on random rows until ``done``; some are rolled back."""
    chance = random.Random(seed)
    with psycopg.connect(conninfo) as db:
        while not done.is_set():
            try:
                for _ in range(chance.randrange(1, 6)):
                    one, x = chance.randrange(IDS), chance.randrange(1000)
                    if chance.random() < 0.3:
                        db.execute("DELETE FROM numbers WHERE id = %s", [one])
                    else:
                        db.execute(
                            "INSERT INTO numbers VALUES (%s, ARRAY[%s, %s], %s) "
                            "ON CONFLICT (id) DO UPDATE SET v = excluded.v, n = excluded.n",
                            [one, x, one, x % 3],
                        )
                if chance.random() < 0.2:
                    db.rollback()
                else:
                    db.commit()
            except psycopg.errors.DeadlockDetected:
                db.rollback()


class Wire:
    """Requests as they are on the wire."""

    def __init__(self, daemon: Daemon) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(120)
        self.socket.connect(str(daemon.socket))
        self.lines = self.socket.makefile()

    def answer(self, method: str, **params: object) -> dict[str, Any]:
        """The whole answer to one request."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        self.socket.sendall(json.dumps(request).encode() + b"\n")
        answer: dict[str, Any] = json.loads(self.lines.readline())
        return answer

    def __call__(self, method: str, **params: object) -> dict[str, Any]:
        """The result of one request."""
        answer = self.answer(method, **params)
        assert "result" in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def kind(self, method: str, **params: object) -> tuple[str, str]:
        """The kind and the message of a request's error."""
        error = self.answer(method, **params)["error"]
        return error["data"]["kind"], error["message"]


@contextmanager
def wire(daemon: Daemon) -> Iterator[Wire]:
    one = Wire(daemon)
    try:
        yield one
    finally:
        one.lines.close()
        one.socket.close()


@pytest.fixture(scope="module")
def conninfo(servers: Servers) -> Iterator[str]:
    server, name = servers.of(16), f"cuts_{os.getpid()}"
    conninfo = server.create_database(name, TEMPLATE)
    with psycopg.connect(conninfo, autocommit=True) as db:
        create(db)
    yield conninfo
    server.drop_database(name)


@pytest.fixture(scope="module")
def cluster(conninfo: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Three shards, one of them with readers, and a router: the last one."""
    folder = tmp_path_factory.mktemp("cuts")
    daemons = [Daemon(conninfo, folder / str(n), shard=f"{n}/{SHARDS}") for n in range(SHARDS)]
    daemons[1].settings["readers"] = 1
    daemons.append(Daemon(conninfo, folder / "router"))
    daemons[-1].command = "route"
    try:
        for each in daemons[:-1]:
            each.spawn()
        for each in daemons[:-1]:
            assert each.process is not None
            assert each.wait_for_line(each.process).startswith(b"ready"), each.log.read_text()
        daemons[-1].start()
        yield daemons
    finally:
        for each in daemons:
            if each.process is not None:
                each.kill()


@contextmanager
def writers(conninfo: str, count: int = 2) -> Iterator[None]:
    """Writers at work."""
    done = threading.Event()
    with ThreadPoolExecutor(count) as threads:
        writing = [threads.submit(write, conninfo, SEED + one, done) for one in range(count)]
        try:
            yield
        finally:
            done.set()
            for each in writing:
                each.result()


def assert_equal_to_sql(conninfo: str, answers: list[dict[str, Any]], shards: list[str]) -> None:
    """Each answer has one position for all shards, and the rows of the table at its snapshot."""
    with psycopg.connect(conninfo, autocommit=True) as db:
        for answer in answers:
            assert list(answer["positions"]) == shards
            assert all(each == answer["position"] for each in answer["positions"].values())
            rows = rows_at(db, answer["position"]["snapshot"])
            found = dict(zip(answer["keys"], answer["distances"], strict=True))
            assert len(found) == len(answer["keys"])
            assert found == pytest.approx({one: (x * x + y * y) ** 0.5 for one, (x, y) in rows.items()})


@pytest.mark.parametrize("times", [40, pytest.param(1000, marks=pytest.mark.long)])
def test_all_shards_answer_at_one_snapshot_as_sql_does(
    cluster: list[Daemon], conninfo: str, times: int
) -> None:
    with writers(conninfo), wire(cluster[-1]) as router:
        answers = [
            router("search", **EVERY, at="cut", consistency="strong", timeout_ms=60_000)
            for _ in range(times)
        ]
    assert len({answer["position"]["snapshot"] for answer in answers}) > times / 2
    assert_equal_to_sql(conninfo, answers, [f"{n}/{SHARDS}" for n in range(SHARDS)])
