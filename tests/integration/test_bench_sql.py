"""``python -m tests.bench sql``: each way to search finds the same rows, and prints its figures."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.commands import BENCH_SECONDS, printed_json, run
from tests.integration.searching import PGVECTOR, programs_with_dblink

pytestmark = [
    pytest.mark.server,
    pytest.mark.timeout(2 * BENCH_SECONDS),
    pytest.mark.skipif(
        PGVECTOR not in programs_with_dblink(),
        reason=f"no PostgreSQL {PGVECTOR} with dblink is installed",
    ),
]


def bench(*arguments: str) -> Any:
    return printed_json(run(*arguments, "--dim", "8", "--json", program="tests.bench"))


def test_searches_in_sql_are_measured_alongside_pgvector_and_the_rpc() -> None:
    few = ("--rows", "500", "--queries", "20", "--clients", "1", "--rounds", "1")
    found = bench("sql", *few, "--seconds", "0.1", "--recall", "0.95", "--versus", "pgvector")
    points = {point["engine"]: point for point in found["points"]}
    sql = {"psycopg", "syncd.search", "syncd.search, no limit"}
    assert set(points) == {"syncd", "syncd client", "pgvector"} | sql
    ours = [point for engine, point in points.items() if engine != "pgvector"]
    assert all(point["recall"] == 1 for point in ours)
    assert all(0 < point["p50_ms"] <= point["p99_ms"] for point in points.values())
    assert found["comparisons"][0]["ratio"] > 0


@pytest.mark.long
def test_rows_are_found_right_after_their_commit_by_sql_and_by_rpc() -> None:
    found = bench("sql-fresh", "--tries", "200")
    assert [(each["tries"], each["missing"]) for each in found] == [(200, 0), (200, 0)]
