"""Verify: the time to compare an index with its table.

It is compared with the time in which PostgreSQL alone hashes the same rows, in one query: with as
many processes as PostgreSQL plans, and in one. A verify takes one process of the server.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

from syncd.bench.environment import Environment, serving
from syncd.errors import SyncdError

TABLE = "verify"
DATASET = f"default/{TABLE}"
DRIFTED_ROWS = 100


@dataclass(frozen=True, slots=True)
class Verify:
    """Median seconds of each, the median ratios, and the seconds that a repair of rows adds."""

    rows: int
    dimension: int
    hash_seconds: float
    hash_in_one_process_seconds: float
    verify_seconds: float
    verify_to_hash: float
    verify_to_hash_in_one_process: float
    repaired: int
    repair_seconds: float


def measure(where: Environment, *, rows: int, dimension: int, rounds: int) -> Verify:
    """Measure query and verify in turn, then a repair of rows that changed without triggers."""
    where.create(TABLE, dimension)
    where.fill(TABLE, rows, dimension)
    where.run("vacuum", table=TABLE)
    where.run("attach", [f"syncd_bench.{TABLE}", "cosine"])
    send = "vector_send" if where.vector_type == "vector" else "array_send"
    hashes, alone, verifies = [], [], []
    with serving(where) as service, service.client() as client:
        for _ in range(rounds):
            hashes.append(hash_seconds(where, send))
            with where.connection.transaction():
                where.run("no_parallel_workers")
                alone.append(hash_seconds(where, send))
            verifies.append(client.verify(TABLE).seconds)
        with where.connection.transaction():
            where.run("drift", [DRIFTED_ROWS], table=TABLE)
            where.run("forget_changes")
        begun = time.perf_counter()
        found = client.verify(TABLE, repair=True)
        repair_seconds = time.perf_counter() - begun - statistics.median(verifies)
        repaired = sum(row.repaired for row in found.datasets)
        if not client.verify(TABLE).datasets[0].in_sync:
            raise SyncdError(
                "the index differs after the repair",
                hint="this is a bug of syncd: please report it",
            )
    return Verify(
        rows,
        dimension,
        round(statistics.median(hashes), 2),
        round(statistics.median(alone), 2),
        round(statistics.median(verifies), 2),
        median_ratio(verifies, hashes),
        median_ratio(verifies, alone),
        repaired,
        round(repair_seconds, 2),
    )


def median_ratio(ones: list[float], others: list[float]) -> float:
    """Median of the ratios of the same rounds."""
    return round(statistics.median(a / b for a, b in zip(ones, others, strict=True)), 2)


def hash_seconds(where: Environment, send: str) -> float:
    """Seconds of the query that hashes all rows."""
    begun = time.perf_counter()
    where.run("hash_rows", table=TABLE, send=send)
    return time.perf_counter() - begun
