"""Shards: each has its own rows, and together they have every row once."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import AsyncMock

import psycopg
import pytest
from psycopg import sql

from syncd.client.client import Client
from syncd.cluster import operating, verifying
from syncd.errors import (
    DimensionMismatch,
    InvalidParams,
    SettingsError,
    ShardsUnavailable,
    TimedOut,
    UnknownDataset,
    UnknownKey,
)
from syncd.ops.check import examine
from syncd.postgres.layout import read_sources
from syncd.postgres.outbox import Asked, Changes, Cursor, read_changes
from syncd.postgres.source import Source, condition_of
from syncd.settings import load_settings
from syncd.shard import BUCKETS, Shard
from syncd.types import Position, Snapshot
from tests.conftest import TEMPLATE, Servers
from tests.daemon import Daemon
from tests.faults.following import until
from tests.faults.resharding import Load, reshard_killed
from tests.integration.commands import assert_failed, run
from tests.integration.test_refused_starts import refused_start
from tests.oracle.sharded import start_all, until_layout
from tests.scrape import events, readyz, sample, samples, wait_for_event

SHARDS = 3
TOKEN = "of a test"  # noqa: S105
ROWS = 60
KEYS = {
    "numbers": ("id bigint", "id", "{i}"),
    "texts": ("id text COLLATE caseless", "id", "'Key' || {i}"),
    "uuids": ("id uuid", "id", "md5(({i})::text)::uuid"),
    "moments": (
        "id timestamptz",
        "id",
        "'2020-01-01 00:00:00.5+02'::timestamptz + ({i}) * interval '1h'",
    ),
    "pairs": ("a text, b int", "a, b", "'a''\"ä' || {i}, {i}"),
    "instants": (
        "a date, b timestamptz",
        "a, b",
        "date '2020-01-01', now() + ({i}) * interval '1h'",
    ),
}
"""Columns of each table's key, their names, and the key of row ``i``."""
BUCKET_OF = {
    "": 18029,
    "7": 54329,
    "-9223372036854775808": 15967,
    "a": 28849,
    "ä€": 32647,
    "0d5e2a4b-8a53-4a66-8f0e-5b7d2b9c1a11": 55804,
    '[1, "a"]': 2800,
    '["2020-01-01T00:00:00.5+00:00", 7]': 65248,
}
"""Bucket of some keys, on every version of PostgreSQL."""


def test_a_key_has_the_same_bucket_on_every_version(any_db: psycopg.Connection) -> None:
    for key, bucket in BUCKET_OF.items():
        for shard in (Shard(BUCKETS, bucket), Shard(2, bucket * 2 // BUCKETS)):
            mine = condition_of(shard, sql.Literal(key))
            assert any_db.execute(sql.SQL("SELECT {}").format(mine)).fetchone() == (True,), key


def create(db: psycopg.Connection) -> None:
    """Tables with keys of each kind, and ``odd``, whose rule fails on some rows."""
    db.execute(
        "CREATE COLLATION caseless "
        "(provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    )
    for table, (columns, key, _) in KEYS.items():
        db.execute(f"CREATE TABLE {table} ({columns}, v real[], PRIMARY KEY ({key}))")
        db.execute(f"SELECT syncd.attach('{table}', metric => 'l2')")
    db.execute("CREATE TABLE odd (id int PRIMARY KEY, v real[], n int)")
    db.execute("CREATE TABLE single (id int PRIMARY KEY, v real[])")
    db.execute(
        "SELECT syncd.attach('odd', metric => 'l2', dataset => '''odd'' || n', "
        "live => '10 / n > 0')"
    )
    db.execute("SELECT syncd.attach('single', metric => 'l2')")
    db.execute("INSERT INTO single VALUES (1, '{1,2}')")


def write(db: psycopg.Connection, first: int, last: int) -> None:
    """Insert rows, change some, give some another key, delete some; in a session's own zone."""
    db.execute("SET timezone = 'Asia/Kolkata'")
    rows = f"generate_series({first}, {last}) i"
    for table, (_, key, value) in KEYS.items():
        inserted = f"SELECT {value.format(i='i')}, ARRAY[i, 1]::real[] FROM {rows}"
        db.execute(f"INSERT INTO {table} {inserted}")
        db.execute(f"UPDATE {table} SET v = ARRAY[v[1], 2] WHERE v[1]::int % 3 = 0")
        db.execute(f"DELETE FROM {table} WHERE v[1]::int % 7 = 0")
        db.execute(
            f"UPDATE {table} SET ({key}) = (SELECT {value.format(i='v[1]::int + 5000')}), "
            "v = ARRAY[v[1] + 5000, 3] "
            f"WHERE v[1] BETWEEN {first} AND {last} AND v[1]::int % 5 = 0"
        )
    db.execute(f"INSERT INTO odd SELECT i, ARRAY[i, 1], i % 4 FROM {rows}")


@pytest.fixture(scope="module")
def conninfo(servers: Servers) -> Iterator[str]:
    """A database of the tests of this file, on a server with ICU collations."""
    server, name = servers.of(15), f"shards_{os.getpid()}"
    yield server.create_database(name, TEMPLATE)
    server.drop_database(name)


@pytest.fixture(scope="module")
def cluster(conninfo: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Three shards that follow the tables; some rows were written before they started."""
    with psycopg.connect(conninfo, autocommit=True) as db:
        create(db)
        write(db, 1, ROWS)
    folder = tmp_path_factory.mktemp("shards")
    shards = [Daemon(conninfo, folder / str(number)) for number in range(SHARDS)]
    try:
        for number, shard in enumerate(shards):
            shard.settings["shard"] = f"{number}/{SHARDS}"
            shard.spawn()
        for shard in shards:
            assert shard.process is not None
            assert shard.wait_for_line(shard.process).startswith(b"ready"), shard.log.read_text()
        yield shards
    finally:
        for shard in shards:
            if shard.process is not None:
                shard.kill()


def assert_each_row_once(cluster: Sequence[Daemon], db: psycopg.Connection) -> None:
    """The shards' keys are the table's, none is in two of them, and each verifies its own."""
    (token,) = db.execute("SELECT syncd.token()").fetchone() or ("",)
    with ExitStack() as stack:
        clients = [stack.enter_context(each.client()) for each in cluster]
        for client in clients:
            client.wait(token, timeout_ms=30_000)
        for table in KEYS:
            keys = [list(client.keys(table)) for client in clients]
            assert min(map(len, keys)) > ROWS / 10
            counted = Counter(key for each in keys for key in each)
            assert set(counted.values()) == {1}, (table, counted.most_common(3))
            assert (len(counted),) == db.execute(f"SELECT count(*) FROM {table}").fetchone()
        quarantined = [client.status().quarantined for client in clients]
        bad = db.execute("SELECT count(*) FROM odd WHERE n = 0").fetchone()
        assert (sum(quarantined),) == bad
        found = [client.verify() for client in clients]
        assert all(row.in_sync for each in found for row in each.datasets)
        outcomes = [(each.source, each.outcome) for one in found for each in one.sources]
        assert "none_live" not in {outcome for _, outcome in outcomes}
        assert Counter(outcomes)["public.single", "compared"] == 1


def test_every_row_is_in_exactly_one_shard_through_writes_kills_and_restarts(
    cluster: list[Daemon], conninfo: str
) -> None:
    with psycopg.connect(conninfo, autocommit=True) as db:
        assert_each_row_once(cluster, db)
        write(db, ROWS + 1, 2 * ROWS)
        assert_each_row_once(cluster, db)
        with cluster[1].client() as client:
            client.checkpoint()
        cluster[1].kill()
        write(db, 2 * ROWS + 1, 3 * ROWS)
        cluster[1].start()
        assert not [line for line in cluster[1].log.read_text().splitlines() if "doubt" in line]
        assert_each_row_once(cluster, db)


def test_a_directory_of_another_shard_is_refused_and_both_are_named(
    cluster: list[Daemon], conninfo: str
) -> None:
    for shard in cluster:
        with shard.client() as client:
            client.checkpoint()
    other = Daemon(conninfo, cluster[2].data_dir)
    cluster[2].stop()
    for settings, named in (({"shard": "2/4"}, "shard 2/4"), ({}, "without --shard")):
        other.settings = dict(settings)
        refused_start(other, "shard 2/3", named, "--shard 2/3", "SYNCD_DATA_DIR")
    cluster[2].start()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"shard": "3/3"}, "2/3"),
        ({"replica": "b"}, "SYNCD_SHARD"),
        ({"shard": "0/3", "advertise": "nowhere"}, "host:port"),
        ({"shard": "0/3", "replica": "b/c"}, "replica"),
    ],
)
def test_a_shard_that_is_none_is_a_wrong_setting(flags: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError) as raised:
        load_settings(**flags)
    assert words in raised.value.message + raised.value.hint


def test_a_malformed_shard_is_wrong_usage() -> None:
    assert_failed(run("serve", "--shard", "x"), 2, "i/n", "SYNCD_SHARD")


def test_a_shard_registers_and_check_names_it_when_it_is_gone(
    cluster: list[Daemon], conninfo: str
) -> None:
    with psycopg.connect(conninfo, autocommit=True) as db:
        rows = db.execute(
            "SELECT name, shard, layout, replica, address FROM syncd.consumers ORDER BY shard"
        ).fetchall()
        assert rows == [
            (f"shard-{number}-of-3", number, 3, "", str(shard.socket))
            for number, shard in enumerate(cluster)
        ]
        (address,) = (shard.socket for shard in cluster[:1])
        with cluster[1].client() as client:
            assert client.status().shard == "1/3"
        cluster[0].stop()
        db.execute("UPDATE syncd.consumers SET reported_at = now() - interval '1h' WHERE shard = 0")
        settings = load_settings(dsn=conninfo, data_dir=cluster[0].data_dir)
        (found,) = [
            each for each in examine(settings, address) if each.what == "consumer shard-0-of-3"
        ]
        assert f"(shard 0/3 at {address})" in found.detail
        assert "syncd serve --shard 0/3; or, if it is gone for good: DELETE" in found.fix
        assert db.execute("SELECT shards FROM syncd.layout").fetchall() == [(3,)]
        other = Daemon(conninfo, cluster[0].data_dir.parent / "other", shard="1/2", replica="b")
        other.start("--once").end(signal.SIGTERM)
        assert db.execute("SELECT shards FROM syncd.layout").fetchall() == [(3,)]
        db.execute(
            "UPDATE syncd.consumers SET reported_at = now() - interval '1h' WHERE replica = 'b'"
        )
        (found,) = [
            each for each in examine(settings, address) if each.what == "consumer shard-1-of-2-b"
        ]
        assert "the layout that answers has 3 shards" in found.detail
        assert "--shard 1/2 --replica b" in found.fix
        db.execute("DELETE FROM syncd.consumers WHERE replica = 'b'")
        cluster[0].start()


def test_only_two_shards_verify_at_a_time(cluster: list[Daemon], conninfo: str) -> None:
    waits = len(events(cluster[0], "verify_waits"))
    with (
        ThreadPoolExecutor(1) as pool,
        cluster[0].client() as client,
        psycopg.connect(conninfo) as first,
        psycopg.connect(conninfo) as second,
    ):
        for each in (first, second):
            each.execute("SET lock_timeout = '60s'")
            lock = "8317708088" if each is first else "8317708089"
            each.execute(f"SELECT pg_advisory_xact_lock({lock})".encode())
        found = pool.submit(client.verify, "numbers")
        until(
            lambda: len(events(cluster[0], "verify_waits")) > waits or found.done(),
            "the third verify waits",
        )
        assert not found.done()
        second.rollback()
        assert [row.in_sync for row in found.result().datasets] == [True]


def test_a_verify_of_each_shard_and_one_of_all_do_not_wait_for_each_other(
    cluster: list[Daemon], conninfo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first ones are asked for while passes are held for the snapshot of the other one."""
    ask_each, alone = verifying.ask_each, list[Future[Any]]()

    def verify(shard: Daemon) -> bool:
        with shard.client() as client:
            return all(row.in_sync for row in client.verify().datasets)

    def sessions() -> int:
        with psycopg.connect(conninfo) as db:
            name = "syncd/shard-%-of-3"
            query = "SELECT FROM pg_stat_activity WHERE application_name LIKE %s"
            return len(db.execute(query, [name]).fetchall())

    with ThreadPoolExecutor(SHARDS) as pool:

        async def ask(replicas: Any, asked: Any, seconds: float | None) -> list[Any]:
            answers = await ask_each(replicas, asked, seconds)
            if asked.method == "hold" and not alone:
                before = sessions()
                alone.extend(pool.submit(verify, shard) for shard in cluster)
                until(
                    lambda: sessions() >= before + SHARDS or all(one.done() for one in alone),
                    "each verify has its session, or passes went on before",
                )
            return answers

        monkeypatch.setattr(verifying, "ask_each", ask)
        found = operating.verify(load_settings(dsn=conninfo))
        assert all(row.in_sync for row in found.datasets)
        assert [each.result() for each in alone] == [True] * SHARDS


def test_passes_of_a_shard_keep_a_distance_that_grows_with_the_number_of_shards(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE numbers (id bigint PRIMARY KEY, v real[])")
    db.execute("SELECT syncd.attach('numbers')")
    daemon.settings["shard"] = "0/4"
    daemon.with_constant("syncd.sync.consumer.pace.FLOOR_SECONDS_PER_SHARD", 0.05).start()
    with daemon.client() as client:
        begun = time.monotonic()
        for number in range(5):  # each of these is answered by a pass of its own
            (token,) = db.execute(
                "INSERT INTO numbers VALUES (%s, '{1}') RETURNING syncd.token()", [number]
            ).fetchone() or ("",)
            client.wait(token, timeout_ms=60_000)
        assert time.monotonic() - begun >= 4 * 4 * 0.05


def changes_of(
    db: psycopg.Connection, cursor: Cursor, source: Source, shard: Shard, page_rows: int = 1000
) -> Changes:
    """One page of changed keys, as a pass reads it."""
    with db.transaction():
        db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        now = Snapshot.parse(str((db.execute("SELECT pg_current_snapshot()").fetchone() or [0])[0]))
        return read_changes(db, Asked(cursor, [source.id], page_rows, shard=shard), now)


def test_the_server_sends_a_shard_only_its_own_keys_and_counts_all(db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE numbers (id bigint PRIMARY KEY, v real[])")
    db.execute("SELECT syncd.attach('numbers')")
    source = read_sources(db)[-1]
    now = Snapshot.parse(str((db.execute("SELECT pg_current_snapshot()").fetchone() or [0])[0]))
    start = Cursor(Position(now, 0))
    for first in range(0, 400, 100):
        rows = f"generate_series({first}, {first + 99}) i"
        db.execute(f"INSERT INTO numbers SELECT i, '{{1}}' FROM {rows}")
    seen: list[str] = []
    for shard in (Shard(3, 0), Shard(3, 1), Shard(3, 2)):
        whole, of_shard = (changes_of(db, start, source, each) for each in (Shard(), shard))
        assert (of_shard.rows, of_shard.newer_rows, of_shard.cursor) == (
            whole.rows,
            whole.newer_rows,
            whole.cursor,
        )
        cursor = start
        pages: list[Changes] = []
        while not pages or cursor.window is not None:
            pages.append(changes_of(db, cursor, source, shard, 70))
            cursor = pages[-1].cursor
        assert [page.rows for page in pages] == [70, 70, 70, 70, 70, 50]
        keys = [key for page in pages for key in page.keys.get(source.id, [])]
        assert sorted(keys) == sorted(of_shard.keys[source.id])
        assert 100 < len(keys) < 170
        seen += keys
    assert sorted(map(int, seen)) == list(range(400))


@pytest.fixture(scope="module")
def router(cluster: list[Daemon], conninfo: str) -> Iterator[Daemon]:
    """A router of the three shards."""
    settings = {"http": "127.0.0.1:0", "sql_listen": "127.0.0.1:0", "token": TOKEN}
    router = Daemon(conninfo, cluster[0].data_dir.parent / "router", **settings)
    router.command = "route"
    router.start()
    yield router
    router.stop()


@contextmanager
def connected(conninfo: str, router: Daemon) -> Iterator[tuple[psycopg.Connection, Client]]:
    """The database, and a client of the router."""
    with psycopg.connect(conninfo, autocommit=True) as db, router.client() as client:
        yield db, client


def test_a_router_answers_what_one_syncd_would(router: Daemon, conninfo: str) -> None:
    with connected(conninfo, router) as (db, client):
        (token,) = db.execute(
            "INSERT INTO numbers VALUES (70000, '{20.25,1}') RETURNING syncd.token()"
        ).fetchone() or ("",)
        assert client.search("numbers", [20.25, 1], k=1, after=token)[0].key == 70000
        table = dict(db.execute("SELECT id, v FROM numbers").fetchall())
        queries: list[list[float]] = [[20.25, 1.5], [5000.25, 3], [-4, 0]]
        expected = [
            sorted((math.dist(row, query), key) for key, row in table.items())[:15]
            for query in queries
        ]
        for query, nearest in zip(queries, expected, strict=True):
            hits = client.search("numbers", query, k=15, consistency="strong")
            assert [hit.distance for hit in hits] == pytest.approx([one for one, _ in nearest])
            assert all(
                math.dist(table[hit.key], query) == pytest.approx(hit.distance) for hit in hits
            )
            assert len({hit.key for hit in hits}) == 15
        many = client.search("numbers", vectors=queries, k=15)
        assert [[hit.distance for hit in hits] for hits in many] == [
            pytest.approx([one for one, _ in nearest]) for nearest in expected
        ]
        like = client.search("numbers", key=70000, k=2)
        assert [hit.key for hit in like] == [19, 22]
        near = client.search("numbers", key=70000, k=3, max_distance=1.5)
        assert [hit.key for hit in near] == [19]
        wanted = [70000, 19, 10**9, 2, 4]
        assert [row.key for row in client.get("numbers", wanted)] == [70000, 19, 2, 4]
        paged = list(client.keys("numbers", limit=7))
        assert len(paged) == len(table)
        assert set(paged) == set(table)
        assert [hit.key for hit in client.search("single", [1, 2])] == [1]
        with pytest.raises(UnknownKey):
            client.search("numbers", key=10**9)
        with pytest.raises(UnknownDataset):
            client.search("nothing", [1, 2])
        with pytest.raises(DimensionMismatch):
            client.search("numbers", [1, 2, 3])
        with pytest.raises(InvalidParams, match="after_key"):
            client.keys_page("numbers", after_key=3)
        counts = {each.dataset: each.count for each in client.datasets()}
        assert counts["default/numbers"] == len(table)
        assert client.verify("numbers", deep=True).datasets[0].rows == len(table)
        status = client.status()
        assert (status.coverage, status.state, status.missing) == (1.0, "ready", [])
        assert list(status.positions) == ["0/3", "1/3", "2/3"]
    host, _, port = wait_for_event(router, "listening_sql")["address"].rpartition(":")
    with psycopg.connect(host=host, port=port, password=TOKEN, user="anyone") as sql_client:
        found = sql_client.execute("SELECT * FROM search('numbers', '[20.25,1]', k => 2)")
        assert found.fetchall() == [("70000", 0.0), ("19", 1.25)]


def asked(router: Daemon, method: str, **params: object) -> dict[str, Any]:
    """The result of one request, as it is on the wire."""
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    with socket.socket(socket.AF_UNIX) as unix:
        unix.settimeout(60)
        unix.connect(str(router.socket))
        unix.sendall(json.dumps(request).encode() + b"\n")
        with unix.makefile() as lines:
            result: dict[str, Any] = json.loads(lines.readline())["result"]
    return result


NEAREST: dict[str, Any] = {"dataset": "numbers", "vector": [20, 1], "k": 50}


def until_whole(client: Client) -> None:
    """Return when every shard answers."""
    until(lambda: not client.status().missing, "every shard answers")
    client.search("numbers", [20, 1])


def refusal(client: Client) -> str:
    """The error of a search while a shard does not answer."""
    with pytest.raises(ShardsUnavailable) as raised:
        client.search("numbers", [20, 1], timeout_ms=600)
    return raised.value.message


@pytest.mark.parametrize("how", ["dead", "frozen"])
def test_a_missing_shard_is_an_error_that_names_it_or_a_partial_answer_that_says_so(
    cluster: list[Daemon],
    router: Daemon,
    conninfo: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with connected(conninfo, router) as (_, client):
        until_whole(client)
        whole = asked(router, "search", **NEAREST)
        assert (whole["coverage"], whole["missing"]) == (1.0, [])
        if how == "dead":
            cluster[1].kill()
        else:
            assert cluster[1].process is not None
            cluster[1].process.send_signal(signal.SIGSTOP)
            monkeypatch.setattr(operating, "FROZEN_SECONDS", 0.5)
            monkeypatch.setattr(operating, "verify_together", AsyncMock(return_value=None))
            with pytest.raises(TimedOut, match="has not answered status"):
                operating.verify(load_settings(dsn=conninfo))
        # On a busy machine another shard may answer too late as well.
        until(lambda: "1 of 3 shards did not answer: 1/3: " in refusal(client), "one is named")
        partial: dict[str, Any] = {"missing": []}
        while [each["shard"] for each in partial["missing"]] != ["1/3"]:
            partial = asked(router, "search", **NEAREST, partial="allow", timeout_ms=600)
        assert partial["coverage"] == pytest.approx(2 / 3, abs=1e-4)
        assert partial["missing"][0]["reason"]
        assert list(partial["positions"]) == ["0/3", "2/3"]
        assert set(partial["keys"]) < {*whole["keys"], *range(100_000)}
        assert 0 < len(partial["keys"]) <= 50
        status = asked(router, "status")
        assert (status["state"], status["missing"][0]["shard"]) == ("failed", "1/3")
        for method, params in (("get", {"keys": [20]}), ("keys", {})):
            answer = asked(router, method, dataset="numbers", partial="allow", **params)
            assert [each["shard"] for each in answer["missing"]] == ["1/3"]
        with pytest.raises(ShardsUnavailable, match="1/3"):
            client.get("numbers", [20])
        with pytest.raises(ShardsUnavailable, match="1/3"):
            client.keys_page("numbers")
        assert readyz(router)[0] == 503
        if how == "dead":
            cluster[1].start()
        else:
            cluster[1].process.send_signal(signal.SIGCONT)  # type: ignore[union-attr]
        until_whole(client)
        assert asked(router, "search", **NEAREST)["keys"] == whole["keys"]
    assert sample(router, "syncd_route_searches_total", outcome="shards_unavailable") >= 1
    assert sample(router, "syncd_route_searches_total", outcome="partial") >= 1


def test_a_router_goes_on_while_the_schema_is_newer_than_its_program(
    router: Daemon, conninfo: str
) -> None:
    """So that routers may be upgraded after the schema, one by one."""
    with connected(conninfo, router) as (db, client):
        until_whole(client)
        (before,) = db.execute("SELECT version_num FROM syncd.alembic_version").fetchone() or ("",)
        try:
            db.execute("UPDATE syncd.alembic_version SET version_num = '9999'")
            db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'syncd/router'"
            )
            until(lambda: "9999" in (client.status().database_error or ""), "it has noticed")
            assert len(client.search("numbers", [20, 1])) == 10
        finally:
            db.execute("UPDATE syncd.alembic_version SET version_num = %s", [before])
        until(lambda: client.status().database_error is None, "it reads the layout again")


def test_with_a_replica_searches_stay_whole_when_a_shard_dies(
    cluster: list[Daemon], router: Daemon, conninfo: str
) -> None:
    replica = Daemon(conninfo, cluster[1].data_dir.parent / "b", shard="1/3", replica="b").start()
    try:
        with connected(conninfo, router) as (db, client):
            until_whole(client)
            until(lambda: sample_or_none(router, "1/3", "shard-1-of-3-b") == 1, "the replica is up")
            whole = asked(router, "search", **NEAREST)
            cluster[1].kill()
            for number in range(10):
                assert asked(router, "search", **NEAREST)["keys"] == whole["keys"]
                (token,) = db.execute(
                    "INSERT INTO texts VALUES (%s, '{-9,-9}') RETURNING syncd.token()",
                    [f"new{number}"],
                ).fetchone() or ("",)
                found = client.search("texts", [-9, -9], k=20, after=token)
                assert f"new{number}" in {hit.key for hit in found}
            cluster[1].start()
            db.execute("DELETE FROM texts WHERE id LIKE 'new%' COLLATE \"C\"")
    finally:
        replica.stop()
    with psycopg.connect(conninfo, autocommit=True) as db:
        db.execute("DELETE FROM syncd.consumers WHERE replica = 'b'")


def sample_or_none(router: Daemon, shard: str, replica: str) -> float | None:
    """Whether a replica is up, as the router's metrics say; None if it is unknown."""
    labels = frozenset({("shard", shard), ("replica", replica)})
    return samples(router).get(("syncd_route_replica_up", labels))


def test_status_and_verify_of_a_cluster_exit_1_if_a_shard_is_dead(
    cluster: list[Daemon], conninfo: str
) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return run("cluster", *arguments, SYNCD_DSN=conninfo)

    found = command("status")
    assert found.returncode == 0, found.stderr
    for number, shard in enumerate(cluster):
        assert re.search(rf"^{number}/3 .*{shard.socket} +ready ", found.stdout, re.MULTILINE)
    assert command("verify").returncode == 0
    cluster[2].kill()
    found = command("status")
    assert found.returncode == 1
    assert re.search("^2/3 .*does not answer.*no syncd answers", found.stdout, re.MULTILINE)
    assert_failed(command("verify"), 1, str(cluster[2].socket))
    cluster[2].start()


KILLED_AT = {
    2: ("while the shards verify", "before the swap is committed"),
    3: ("after the swap",),
}
"""Some of the steps of a reshard; the test marked long has all of them."""


def test_a_reshard_that_is_killed_at_any_step_and_run_again_loses_no_answer_and_no_write(
    cluster: list[Daemon], router: Daemon, conninfo: str
) -> None:
    folder = cluster[0].data_dir.parent
    pair = [Daemon(conninfo, folder / f"of-2-{n}", shard=f"{n}/2") for n in range(2)]
    load = Load(conninfo, router, rate=100)
    try:
        with router.client() as client:
            until_whole(client)
            with load.running():
                start_all(pair)
                for shards, steps in KILLED_AT.items():
                    reshard_killed(conninfo, shards, folder / f"steps-{shards}", *steps)
                    until_layout(client, shards)
            assert load.wrong == []
            with psycopg.connect(conninfo, autocommit=True) as db:
                (token,) = db.execute("SELECT syncd.token()").fetchone() or ("",)
                client.wait(token, timeout_ms=60_000)
                keys = [key for (key,) in db.execute("SELECT id FROM numbers").fetchall()]
            assert sorted(client.keys("numbers")) == sorted(keys)
    finally:
        for each in pair:
            if each.process is not None:
                each.kill()
    with psycopg.connect(conninfo, autocommit=True) as db:
        db.execute("DELETE FROM syncd.consumers WHERE layout = 2")
