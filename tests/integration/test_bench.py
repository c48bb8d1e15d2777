"""``syncd bench``: every measurement runs and prints the figures of syncd/docs/measurements.md.

It leaves the database unchanged.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from rich.progress import Progress

from syncd.bench.environment import environment, is_building, serving
from syncd.bench.mixed import Writer, write
from syncd.settings import load_settings
from tests.conftest import clone
from tests.daemon import Daemon
from tests.faults.following import until
from tests.integration.commands import BENCH_SECONDS, assert_failed, printed_json, run
from tests.servers import PostgresServer

SMALL = ("--dim", "8", "--json")
SEARCHES = (
    "--rows",
    "2000",
    "--seconds",
    "0.1",
    "--rounds",
    "1",
    "--queries",
    "50",
    "--versus",
    "pgvector",
    *SMALL,
)
CODED = (
    "--rows",
    "21000",  # too many for exact searches
    "--seconds",
    "0.1",
    "--rounds",
    "1",
    "--queries",
    "400",
    "--clients",
    "2",
    "--dim",
    "64",
    "--json",
)
LEFT = """
SELECT 'schema', nspname FROM pg_namespace WHERE nspname !~ '^pg_'
UNION ALL SELECT 'extension', extname FROM pg_extension
UNION ALL SELECT 'table', c.oid::regclass::text
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = relnamespace
    WHERE nspname !~ '^pg_|information_schema' AND relkind = 'r'
ORDER BY 1, 2"""

pytestmark = pytest.mark.timeout(2 * BENCH_SECONDS)


@pytest.fixture(scope="module")
def followed(server: PostgresServer) -> Iterator[str]:
    """One database for the module, with schema syncd."""
    yield from clone(server)


@pytest.fixture
def bare(server: PostgresServer) -> Iterator[str]:
    """A database without schema syncd and pgvector."""
    yield server.create_database("bare")
    server.drop_database("bare")


def left(dsn: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn) as db:
        found = db.execute(LEFT.encode()).fetchall()
        if ("schema", "syncd") in found:
            found += db.execute(
                "SELECT 'source', source::text FROM syncd.sources ORDER BY 2"
            ).fetchall()
            found += db.execute(
                "SELECT 'consumer', name FROM syncd.consumers ORDER BY 2"
            ).fetchall()
        return found


def bench(dsn: str, *arguments: str, program: str = "syncd.cli.main") -> Any:
    """The result of a benchmark with ``--json``; the database is unchanged afterwards."""
    before = left(dsn)
    command = ["bench", *arguments] if program == "syncd.cli.main" else arguments
    printed = printed_json(run(*command, "--dsn", dsn, program=program))
    assert left(dsn) == before
    return printed


def developers_bench(dsn: str, *arguments: str) -> Any:
    """The result of ``python -m tests.bench``."""
    return bench(dsn, *arguments, program="tests.bench")


# The result of each command


def test_search_measures_recall_and_compares_at_equal_recall(followed: str, tmp_path: Path) -> None:
    vectors = (
        np.random.default_rng(0).integers(0, 9, (2050, 6)).astype(np.float32)
    )  # many are as far as others
    np.save(tmp_path / "own.npy", vectors)
    own = ("--vectors", str(tmp_path / "own.npy"), "--metric", "cosine")
    found = bench(followed, "search", *SEARCHES, *own, "--clients", "1", "--clients", "2")
    assert (found["vectors"], found["metric"], found["k"]) == ("own.npy", "cosine", 10)
    assert (found["rows"], found["dimension"]) == (2000, 6), "without the fifty queries"
    assert 2 < found["intrinsic_dimension"] < 6.5
    assert [(build["engine"], build["index"], build["rows"]) for build in found["builds"]] == [
        ("syncd", "exact", 2000),
        ("pgvector", "hnsw", 2000),
    ]
    assert all(build["seconds"] > 0 and build["index_bytes"] > 0 for build in found["builds"])
    assert (found["recall_of"], found["held_back"], found["reported"]) == (None, False, [])
    by_engine: dict[str, list[dict[str, Any]]] = {"syncd": [], "pgvector": []}
    for point in found["points"]:
        by_engine[point["engine"]].append(point)
        assert point["recall_queries"] == 50
        assert point["qps"] > 0
        assert 0 < point["p50_ms"] <= point["p99_ms"]
    assert [
        (point["setting"], point["clients"], point["recall"]) for point in by_engine["syncd"]
    ] == [
        ("exact", 1, 1.0),
        ("exact", 2, 1.0),
    ]
    assert any(point["recall"] == 1.0 for point in by_engine["pgvector"]), (
        "pgvector does not reach the recall of syncd"
    )
    assert [row["clients"] for row in found["comparisons"]] == [1, 2]
    for row in found["comparisons"]:
        assert row["recall"] == 1.0
        assert row["ratio"] == pytest.approx(row["syncd_qps"] / row["pgvector_qps"], abs=0.01)


def test_search_measures_recall_before_and_after_queries_were_asked_and_holds_half_back(
    followed: str,
) -> None:
    found = bench(followed, "search", *CODED, "--recall", "0.95", "--recall", "0.8")
    assert (found["recall_of"], found["held_back"]) == ("queries", True)
    reported = [
        (row["asked"], row["target"], row["queries"], row["by"], row["recall_of"])
        for row in found["reported"]
    ]
    assert reported == [
        (0, 0.95, 199, "datasets", "rows"),
        (0, 0.95, 199, "recall", "rows"),
        (0, 0.8, 199, None, None),
        (200, 0.95, 200, "datasets", "queries"),
        (200, 0.95, 200, "recall", "queries"),
        (200, 0.8, 200, None, None),
    ]
    for row in found["reported"]:
        assert 0.8 < row["recall"] <= 1.0
        assert 0.3 < row["recall_p5"] <= 1.0
        if row["by"] is not None:
            assert row["reported"] == pytest.approx(row["recall"], abs=0.05)
            assert 0.3 < row["reported_p5"] <= 1.0
    for point in found["points"]:
        assert point["recall_queries"] == 200
        assert 0.3 < point["recall_p5"] <= 1.0
        assert 0 < point["client_us"] < point["p99_ms"] * 1000
        assert 0 < point["client_share"] < 1


def test_filtered_searches_are_measured_once_syncd_knows_its_queries(followed: str) -> None:
    found = bench(followed, "filter", *CODED, "--selectivity", "0.5")
    assert (found["recall_of"], found["held_back"]) == ("queries", True)
    assert [point["recall_queries"] for point in found["points"]] == [200, 50, 50]


def test_filtered_searches_are_measured_by_selectivity_and_by_the_place_of_passing_rows(
    followed: str,
) -> None:
    found = bench(
        followed,
        "filter",
        *SEARCHES,
        "--selectivity",
        "0.5",
        "--selectivity",
        "0.004",
        "--clients",
        "1",
    )
    filters = [
        (kind, selectivity)
        for kinds in (("independent",), ("near", "far"))
        for selectivity in (0.5, 0.004)
        for kind in kinds
    ]
    mine = [point for point in found["points"] if point["engine"] == "syncd"]
    assert [(point["kind"], point["selectivity"]) for point in mine] == filters
    for point in mine:
        assert point["recall"] == 1.0, "also if fewer rows pass than a search asks for"
        assert point["recall_queries"] == (50 if point["kind"] == "independent" else 13)
        assert 0 < point["p50_ms"] <= point["p99_ms"]
    assert [(row["kind"], row["selectivity"]) for row in found["comparisons"]] == filters
    for row in found["comparisons"]:
        assert row["ratio"] == pytest.approx(row["syncd_qps"] / row["pgvector_qps"], abs=0.01)
    plans = {
        one: [row["plan"] for row in found["plans"] if (row["kind"], row["selectivity"]) == one]
        for one in filters
    }
    assert any("hnsw_embedding_idx" in plan for plan in plans["independent", 0.5])
    assert all("Sort" in plan for plan in plans["independent", 0.004]), (
        "eight rows are found by their column, and sorted"
    )


def test_churn_measures_before_and_after_and_alongside_a_fresh_build(followed: str) -> None:
    found = developers_bench(followed, "churn", *SEARCHES, "--recall", "0.9")
    for change in found["changes"]:
        assert (change["updated"], change["deleted"]) == (1000, 600)
        assert change["rows_per_second"] > 0
    assert [change["engine"] for change in found["changes"]] == ["syncd", "pgvector"]
    # Until VACUUM, dead rows take places among pgvector's candidates.
    for when, least in {"before": 0.9, "at_once": 0.2, "settled": 0.9}.items():
        points = found[when]
        assert [point["engine"] for point in points] == ["syncd", "pgvector"]
        assert points[0]["recall"] == 1.0
        assert points[1]["recall"] > least, when
    settings = [
        [point["setting"] for point in found[when]] for when in ("before", "at_once", "settled")
    ]
    assert settings == [settings[0]] * 3
    (fresh,) = found["fresh"]
    (loss,) = found["losses"]
    assert fresh["recall"] == 1.0, "the copy has the same rows under the same keys"
    assert (loss["setting"], loss["lost_recall"], loss["fresh_p99_ms"]) == (
        "exact",
        0.0,
        fresh["p99_ms"],
    )


def test_mixed_measures_searches_and_freshness_while_writers_write(followed: str) -> None:
    syncd, pgvector = bench(
        followed,
        "mixed",
        *SEARCHES,
        "--rate",
        "1000",
        "--batch",
        "20",
        "--writers",
        "2",
        "--clients",
        "1",
        "--seconds",
        "0.5",
    )
    assert (syncd["engine"], syncd["recall"], pgvector["engine"], pgvector["recall"]) == (
        "syncd",
        1.0,
        "pgvector",
        1.0,
    )
    for row in (syncd, pgvector):
        assert row["qps"] > 0
        assert (row["wanted_writes_per_second"], row["rows_per_write"]) == (1000, 20)
        assert 0 < row["writes_per_second"] < 1200
        assert 0 < row["fresh_p50_ms"] <= row["fresh_p99_ms"]


def test_restart_measures_stops_starts_and_checkpoints(followed: str) -> None:
    (found,) = developers_bench(
        followed, "restart", "--rows", "20000", "--changes", "100", "--rounds", "1", *SMALL
    )
    assert found["checkpoint_bytes"] > 100 * 8 * 4, "the changed vectors at least"
    assert found["index"] == "exact"
    assert 0 != found["memory_bytes_per_row"] < 1000
    for name in (
        "checkpoint_seconds",
        "stop_seconds",
        "start_seconds",
        "start_after_changes_seconds",
    ):
        assert found[name] > 0


def test_passes_are_measured_by_the_size_of_the_table(followed: str) -> None:
    found = developers_bench(
        followed,
        "passes",
        "--rows",
        "200",
        "--rows",
        "2000",
        "--changes",
        "100",
        "--rounds",
        "1",
        *SMALL,
    )
    assert [(row["rows"], row["changes"], row["passes"]) for row in found] == [
        (200, 100, 5),
        (2000, 100, 5),
    ]
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in found)
    small, large = found
    assert (small["times_the_first"], large["times_the_first"]) == (
        1.0,
        pytest.approx(large["p50_ms"] / small["p50_ms"], rel=0.1),
    )


@pytest.mark.long
def test_shards_are_measured_by_their_number(followed: str) -> None:
    few = ("--rows", "300", "--rest", "0", "--seconds", "1", "--rate", "200", *SMALL)
    one, three = developers_bench(followed, "shards", "--shards", "1", "--shards", "3", *few)
    assert (one["shards"], three["shards"]) == (1, 3)
    assert one["rows_indexed"] == three["rows_indexed"] == 300  # each row is in one shard
    assert three["rows_scanned"] > 2 * one["rows_scanned"] > 0  # each shard scans the table
    assert three["connections"] == 3 * one["connections"]
    assert all(each["rows_per_second"] > 0 < each["server_share"] for each in (one, three))


def test_datasets_are_measured_by_their_number(followed: str) -> None:
    found = developers_bench(
        followed,
        "datasets",
        "--datasets",
        "1",
        "--datasets",
        "30",
        "--rows",
        "20",
        "--searches",
        "100",
        *SMALL,
    )
    assert [(row["datasets"], row["rows_each"]) for row in found] == [(1, 20), (30, 20)]
    assert all(0 < row["first_p50_us"] <= row["first_p99_us"] for row in found)
    assert all(
        row["p50_us"] > 0 and row["memory_bytes"] > 0 and row["start_seconds"] > 0 for row in found
    )


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        (
            ("fresh", "--commits", "5", "--writers", "2"),
            {"writers", "commits", "p50_ms", "p99_ms", "worst_ms"},
        ),
        (
            ("backfill", "--rows", "2000"),
            {"rows", "rows_per_second", "seconds", "beside_vectors_bytes"},
        ),
        (
            ("verify", "--rows", "2000", "--rounds", "1"),
            {"verify_seconds", "hash_seconds", "hash_in_one_process_seconds", "repaired"},
        ),
        (
            ("ingest", "--clients", "2", "--seconds", "1", "--rounds", "1"),
            {"bare", "attached", "captured", "hnsw"},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_the_other_measurements_print_their_figures(
    followed: str, command: tuple[str, ...], fields: set[str]
) -> None:
    for row in bench(followed, *command, *SMALL):
        assert fields <= set(row)
        assert all(
            isinstance(row[name], int | float) and row[name] >= 0
            for name in fields - {"beside_vectors_bytes"}
        )


def test_a_round_trip_is_measured_alongside_faiss_alone(followed: str) -> None:
    (found,) = developers_bench(followed, "rpc", "--rows", "100", *SMALL)
    assert found["rows"] == 100
    assert 0 < found["rpc_p50_us"] <= found["rpc_p99_us"]
    assert found["faiss_p50_us"] > 0


# Parts of the measurements


def test_a_service_has_settled_once_its_index_is_built(followed: str) -> None:
    settings = load_settings(dsn=followed)
    with environment(settings, Progress(disable=True), print) as where, serving(where) as service:
        where.create("many", 8)
        where.fill("many", 21_000, 8, seed=0)  # too many for exact searches
        where.run("attach", ["syncd_bench.many", "l2"])
        with service.client() as client:
            until(lambda: is_building(client), "the service says that it builds")
            until(
                lambda: (
                    [row.count for row in client.datasets() if row.dataset == "default/many"]
                    == [21_000]
                ),
                "rows",
            )
            service.settle()
            assert [
                row.index != "building"
                for row in client.datasets()
                if row.dataset == "default/many"
            ] == [True]
            assert not is_building(client)
        assert 0 < service.building_cpu_seconds() < service.cpu_seconds()


def test_a_writer_changes_as_many_rows_as_it_says_and_only_its_own(
    database: str, db: psycopg.Connection
) -> None:
    db.execute("""
        CREATE SCHEMA syncd_bench;
        CREATE TABLE syncd_bench.t (id bigint PRIMARY KEY, embedding int, changes int DEFAULT 0);
        CREATE TABLE syncd_bench.samples (id bigint PRIMARY KEY, embedding int);
        INSERT INTO syncd_bench.t SELECT generate_series(1, 100);
        INSERT INTO syncd_bench.samples SELECT n, n FROM generate_series(1, 5) AS n;
        CREATE FUNCTION count_change() RETURNS trigger LANGUAGE plpgsql
            AS 'BEGIN NEW.changes := OLD.changes + 1; RETURN NEW; END';
        CREATE TRIGGER counts BEFORE UPDATE ON syncd_bench.t
            FOR EACH ROW EXECUTE FUNCTION count_change()""")
    begun = time.perf_counter()
    rate = write(
        Writer(database, "t", range(2, 101, 2), samples=5, rows_per_second=500, batch=10, seed=0),
        0.2,
    )
    longer = time.perf_counter() - begun
    found = db.execute(
        "SELECT sum(changes), count(*) FILTER (WHERE changes > 0 AND id % 2 = 1) FROM syncd_bench.t"
    ).fetchone()
    assert found is not None
    assert 0.2 * rate <= found[0] <= longer * rate
    assert found[0] % 10 == found[1] == 0


# After a benchmark


def test_the_database_is_left_as_it_was_found(bare: str) -> None:
    (found,) = bench(bare, "backfill", "--rows", "100", *SMALL)
    assert found["rows"] == 100
    assert left(bare) == [
        ("extension", "plpgsql"),
        ("schema", "information_schema"),
        ("schema", "public"),
    ]


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="ctrl-c"),
        pytest.param(signal.SIGTERM, id="sigterm", marks=pytest.mark.long),
    ],
)
def test_an_interrupted_benchmark_cleans_up(bare: str, number: signal.Signals) -> None:
    before = left(bare)
    command = [
        sys.executable,
        "-m",
        "syncd.cli.main",
        "bench",
        "fresh",
        "--commits",
        "100000",
        "--dim",
        "8",
        "--dsn",
        bare,
    ]
    with (
        psycopg.connect(bare, autocommit=True) as db,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        ) as process,
    ):

        def writing() -> bool:
            assert process.poll() is None, process.communicate()
            found = db.execute("SELECT to_regclass('syncd_bench.fresh') IS NOT NULL").fetchone()
            return found == (True,) and db.execute(
                "SELECT max(id) > 2 FROM syncd_bench.fresh"
            ).fetchone() == (True,)

        until(writing, "the benchmark writes")
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal sends it to every process
        else:
            process.send_signal(number)
        output, errors = process.communicate(timeout=BENCH_SECONDS)
    assert (process.returncode, output) == (130, b""), errors
    assert b"Traceback" not in errors, errors.decode()
    assert left(bare) == before


def test_two_benchmarks_in_one_database_are_refused(followed: str) -> None:
    with psycopg.connect(followed, autocommit=True) as db:
        db.execute("SELECT pg_advisory_lock(hashtext('syncd_bench'))")
        assert_failed(run("bench", "backfill", "--dsn", followed), 1, "another benchmark")


def test_a_schema_of_another_version_is_left_to_its_owner(
    database: str, db: psycopg.Connection
) -> None:
    db.execute("UPDATE syncd.alembic_version SET version_num = '0000'")
    assert_failed(run("bench", "backfill", "--dsn", database), 1, "revision 0000", "syncd init")
    assert db.execute("SELECT version_num FROM syncd.alembic_version").fetchone() == ("0000",)


def test_a_benchmark_warns_of_other_work_and_removes_the_rest_of_a_killed_one(
    database: str, db: psycopg.Connection, tmp_path: Path
) -> None:
    db.execute(
        "CREATE TABLE mine (id int PRIMARY KEY, embedding real[]); SELECT syncd.attach('mine')"
    )
    db.execute(
        "CREATE SCHEMA syncd_bench; CREATE TABLE syncd_bench.killed (id int PRIMARY KEY, embedding "
        "real[])"
    )
    # The rest of a benchmark that was killed:
    db.execute("SELECT syncd.attach('syncd_bench.killed')")
    daemon = Daemon(database, tmp_path / "data").start()
    done = run("bench", "backfill", "--rows", "100", "--dim", "8", "--dsn", database)
    daemon.stop()
    assert done.returncode == 0, done.stderr
    assert "mine is attached too" in done.stderr
    assert "a syncd runs here as consumer default" in done.stderr
    assert "killed" not in done.stderr
    assert db.execute(
        "SELECT count(*) FROM syncd.sources WHERE source::text ~ 'bench'"
    ).fetchone() == (0,)


def test_without_pgvector_a_comparison_is_refused(followed: str, servers: Any) -> None:
    del followed
    old = servers.of(15)
    dsn = old.create_database("no_pgvector")
    try:
        refused = run("bench", "search", *SEARCHES, "--dsn", dsn)
        assert_failed(refused, 2, "pgvector", "--embedded")
    finally:
        old.drop_database("no_pgvector")
