"""Cuts: all shards answer at one snapshot, and the answer equals the table's at that snapshot."""

from __future__ import annotations

import json
import os
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
import msgspec
import psycopg
import pytest

from syncd.cluster import verifying
from syncd.cluster.leading import Leader
from syncd.cluster.operating import read_layout
from syncd.cluster.verifying import verify_together
from syncd.errors import NotReady
from syncd.protocol.messages import WirePosition
from syncd.settings import load_settings
from tests.conftest import TEMPLATE, Servers
from tests.daemon import Daemon
from tests.faults.following import until
from tests.integration.commands import run
from tests.scrape import sample

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
    db.execute(f"INSERT INTO numbers SELECT i, ARRAY[i, i], 0 FROM generate_series(1, {IDS}) i")


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
    for each in daemons:  # a busy machine may take longer than a cut is kept
        each.with_constant("syncd.sync.consumer.cuts.KEPT_SECONDS", 600.0)
    daemons[1].settings["readers"] = 1
    daemons.append(Daemon(conninfo, folder / "router", http="127.0.0.1:0"))
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
            assert_equal_positions(answer, shards)
            rows = rows_at(db, answer["position"]["snapshot"])
            found = dict(zip(answer["keys"], answer["distances"], strict=True))
            assert len(found) == len(answer["keys"])
            assert found == pytest.approx(
                {one: (x * x + y * y) ** 0.5 for one, (x, y) in rows.items()}
            )


@pytest.mark.parametrize(
    "times", [25, pytest.param(1000, marks=[pytest.mark.long, pytest.mark.timeout(1200)])]
)
def test_all_shards_answer_at_one_snapshot_as_sql_does(
    cluster: list[Daemon], conninfo: str, times: int
) -> None:
    before = sample(cluster[-1], "syncd_route_cuts_total")
    with writers(conninfo), wire(cluster[-1]) as router:
        answers, seconds = list[dict[str, Any]](), list[float]()
        for _ in range(times):
            begun = time.perf_counter()
            answers.append(
                router("search", **EVERY, at="cut", consistency="strong", timeout_ms=60_000)
            )
            seconds.append(time.perf_counter() - begun)
    print(f"{times} cuts, median {statistics.median(seconds) * 1000:.0f} ms")
    assert len({answer["position"]["snapshot"] for answer in answers}) > times / 2
    assert sample(cluster[-1], "syncd_route_cuts_total") >= before + times
    assert_equal_to_sql(conninfo, answers, [f"{n}/{SHARDS}" for n in range(SHARDS)])


def test_a_syncd_alone_answers_at_a_snapshot_of_its_own(
    cluster: list[Daemon], conninfo: str
) -> None:
    with writers(conninfo, 1), wire(cluster[0]) as alone:
        answers = [alone("search", **EVERY, at="cut", timeout_ms=60_000) for _ in range(10)]
        for answer in answers:
            assert answer["positions"] == {"0/3": answer["position"]}
            assert answer["lag_seconds"] < 60
    with psycopg.connect(conninfo, autocommit=True) as db:
        mine: dict[int, bool] = dict(
            db.execute(
                'SELECT i, (hashtextextended(i::text COLLATE "C", 0) & 65535) * 3 < 65536 '
                f"FROM generate_series(0, {IDS}) i"
            ).fetchall()
        )
        for answer in answers:
            rows = rows_at(db, answer["position"]["snapshot"])
            assert sorted(answer["keys"]) == sorted(one for one in rows if mine[one])


def test_what_was_answered_at_a_cut_is_answered_again_whatever_follows(
    cluster: list[Daemon], conninfo: str
) -> None:
    with writers(conninfo, 1), wire(cluster[-1]) as router:
        first = router("search", **EVERY, at="cut", include=["n"], timeout_ms=60_000)
        at = first["position"]
        router("rebuild", dataset="numbers")
        again = router("search", **EVERY, at=at, include=["n"])
        for name in ("keys", "distances", "columns", "positions"):
            assert again[name] == first[name]
        one, *_ = first["keys"]
        kept = dict(zip(first["keys"], first["columns"]["n"], strict=True))
        passing = router("search", **EVERY, at=at, filter={"n": 1})
        assert sorted(passing["keys"]) == sorted(key for key, n in kept.items() if n == 1)
        (row,) = router("get", dataset="numbers", keys=[one, 10**6], vectors=True, at=at)["rows"]
        like = router("search", dataset="numbers", key=one, k=IDS, at=at, exact=True)
        many = router("search", **(EVERY | {"vector": None}), vectors=[row["vector"]] * 2, at=at)
        assert sorted([*like["keys"], one]) == sorted(first["keys"])
        assert [sorted(keys) for keys in many["keys"]] == [sorted(first["keys"])] * 2
        assert like["position"] == many["position"] == at
        assert router("get", dataset="numbers", keys=[one], at="cut")["coverage"] == 1
        kind, message = router.kind("search", **EVERY, at={"snapshot": "5:5:", "outbox_id": 1})
        assert (kind, "5:5:" in message) == ("not_ready", True)
        assert router.kind("search", **EVERY, at="now")[0] == "invalid_params"
    with psycopg.connect(conninfo, autocommit=True) as db:
        assert set(rows_at(db, at["snapshot"])) == set(first["keys"])


def test_a_cut_without_a_shard_is_an_error_or_partial_and_a_locked_table_says_so(
    cluster: list[Daemon], conninfo: str
) -> None:
    shard = {"timeout_ms": 60_000, "at": "cut", "consistency": "strong"} | EVERY
    with (
        wire(cluster[-1]) as router,
        psycopg.connect(conninfo) as db,
        psycopg.connect(conninfo) as lock,
    ):
        cluster[2].kill()
        kind, message = router.kind("search", **shard)
        assert kind == "shards_unavailable"
        assert "1 of 3 shards did not answer: 2/3: no syncd answers" in message
        partial = router("search", **shard, partial="allow")
        assert [each["shard"] for each in partial["missing"]] == ["2/3"]
        assert_equal_positions(partial, ["0/3", "1/3"])
        with cluster[-1].client() as client:
            hits = client.search("numbers", QUERY, k=2 * IDS, partial="allow", at="cut")
            assert [each.shard for each in hits.missing] == ["2/3"]
            assert len(hits) == len(partial["keys"])
        command = ("search", "numbers", "--vector", "[0,0]", "--at", "cut", "--partial")
        printed = run(*command, SYNCD_SOCKET=str(cluster[-1].socket))
        assert printed.returncode == 0, printed.stderr
        assert "shard 2/3 is missing: no syncd answers" in printed.stderr
        assert "67% of the rows could be found" in printed.stderr
        cluster[2].start()
        until(lambda: not router("status")["missing"], "every shard answers")
        whole = router("search", **shard)
        assert_equal_positions(whole, ["0/3", "1/3", "2/3"])
        db.execute("INSERT INTO numbers VALUES (999, '{0,0}', 0) ON CONFLICT DO NOTHING")
        (token,) = db.execute("SELECT syncd.token()").fetchone() or ("",)
        db.commit()
        assert router("search", **shard, after=token)["keys"][0] == 999
        db.execute("DELETE FROM numbers WHERE id = 999")
        with ThreadPoolExecutor(1) as threads:  # no pass comes between the change and the lock
            locked = threads.submit(lock.execute, "LOCK TABLE numbers")
            waits = "SELECT FROM pg_locks WHERE pid = %s AND NOT granted"
            pid = lock.info.backend_pid
            until(lambda: bool(db.execute(waits, [pid]).fetchall()), "the lock is waited for")
            db.commit()
            locked.result()
        for each in cluster[:SHARDS]:
            with each.client() as client:
                until(lambda: client.status().lag_seconds > 0, "the shard lags")
        kind, message = router.kind("search", **(shard | {"partial": "allow"}))
        lock.rollback()
        assert (kind, "holds a lock" in message) == ("not_ready", True), message
        assert 999 not in router("search", **shard)["keys"]


def assert_equal_positions(answer: dict[str, Any], shards: list[str]) -> None:
    """All shards that answered are at the answer's position."""
    assert list(answer["positions"]) == shards
    assert all(each == answer["position"] for each in answer["positions"].values())


def test_a_leader_that_names_another_snapshot_or_none_leaves_passes_as_they_were(
    cluster: list[Daemon], conninfo: str
) -> None:
    wrong = {"position": {"snapshot": "5:5:", "outbox_id": 1}, "snapshot": "0000-1"}
    with wire(cluster[0]) as shard, psycopg.connect(conninfo, autocommit=True) as db:
        assert shard.kind("cut", **wrong)[0] == "not_ready"  # it does not hold
        kind, message = hold_and_cut(shard, **wrong)
        assert (kind, "cannot be imported" in message) == ("not_ready", True), message
        db.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        exported = db.execute("SELECT pg_export_snapshot()").fetchone() or ("",)
        kind, message = hold_and_cut(shard, **(wrong | {"snapshot": exported[0]}))
        assert (kind, "not the leader's" in message) == ("not_ready", True), message
        db.execute("COMMIT")
        shard("hold", timeout_ms=60_000)  # this leader does not come back
        (token,) = db.execute("SELECT syncd.token()").fetchone() or ("",)
        shard("wait", after=token, timeout_ms=60_000)


def hold_and_cut(shard: Wire, **params: object) -> tuple[str, str]:
    """The error of a snapshot that a shard is to import while it holds."""
    while True:
        shard("hold", timeout_ms=60_000)
        kind, message = shard.kind("cut", **params)
        if "took too long" not in message:
            return kind, message


def test_a_table_that_is_detached_answers_at_the_cut_before(
    cluster: list[Daemon], conninfo: str
) -> None:
    search = {"dataset": "other", "vector": [1.0], "timeout_ms": 60_000}
    with wire(cluster[-1]) as router, psycopg.connect(conninfo, autocommit=True) as db:
        db.execute("CREATE TABLE other (id int PRIMARY KEY, v real[])")
        db.execute("INSERT INTO other SELECT i, '{1}' FROM generate_series(1, 5) i")
        db.execute("SELECT syncd.attach('other', metric => 'l2')")
        (token,) = db.execute("SELECT syncd.token()").fetchone() or ("",)
        router("wait", after=token, timeout_ms=60_000)
        found = router("search", **search, at="cut")
        assert sorted(found["keys"]) == [1, 2, 3, 4, 5]
        db.execute("SELECT syncd.detach('other')")
        until(lambda: "error" in router.answer("search", **search), "the dataset is gone")
        assert sorted(router("search", **search, at=found["position"])["keys"]) == [1, 2, 3, 4, 5]
        strong = search | {"consistency": "strong", "at": "cut"}
        assert router.kind("search", **strong)[0] == "unknown_dataset"


@pytest.mark.anyio
async def test_a_leader_holds_its_locks_while_shards_import(conninfo: str) -> None:
    with psycopg.connect(conninfo, autocommit=True) as db:
        row = db.execute("SELECT pg_current_snapshot()::text").fetchone()
        assert row is not None
        db.execute("UPDATE numbers SET n = 1 - n")
        db.execute("SET lock_timeout = '50ms'")
        leader = Leader(conninfo, "router")
        async with leader.lead() as connection:
            exported = await leader.export(connection, WirePosition(row[0], 0))
            assert len(exported.tables) == 1
            for change in ("TRUNCATE numbers", "ALTER TABLE numbers ALTER n TYPE bigint"):
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    db.execute(change)
            second = Leader(conninfo, "router")
            with pytest.raises(NotReady, match="another router"):
                async with second.lead():
                    pass
        await leader.close()


def test_a_cluster_is_verified_at_one_snapshot_while_writers_write(
    cluster: list[Daemon], conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "TRY_SECONDS", 100.0)
    settings = load_settings(dsn=conninfo)
    replicas = [each for some in read_layout(settings).replicas.values() for each in some]
    with psycopg.connect(conninfo, autocommit=True) as db:
        before = db.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text").fetchone()
    with writers(conninfo, 1):
        found = anyio.run(partial(verify_together, settings, replicas, deep=True))
        assert found is not None
    at = {each.position.snapshot for each in found}
    assert len(found) == SHARDS
    assert len(at) == 1
    assert int(at.pop().split(":")[1]) >= int((before or ["0"])[0])
    assert all(row.in_sync for each in found for row in each.datasets)
    with psycopg.connect(conninfo, autocommit=True) as db:
        rows = rows_at(db, found[0].position.snapshot)
    assert sum(row.rows for each in found for row in each.datasets) == len(rows)
    with wire(cluster[0]) as shard:
        assert shard.kind("verify", at=msgspec.to_builtins(found[0].position))[0] == "not_ready"
    printed = run("cluster", "verify", SYNCD_DSN=conninfo)
    assert printed.returncode == 0, printed.stderr
