"""Backfill: how fast a full table becomes searchable, and how much memory the first reading takes.

The vectors themselves are counted apart.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from syncd.bench.environment import Environment, serving

TABLE = "backfill"
POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Backfill:
    """Rows per second from the attach on, and bytes of memory.

    ``beside_vectors_bytes`` is anonymous memory that was added since the attach.
    """

    rows: int
    dimension: int
    seconds: float
    rows_per_second: int
    vector_bytes: int
    peak_anonymous_bytes: int
    beside_vectors_bytes: int


def measure(where: Environment, *, rows: int, dimension: int) -> Backfill:
    """Fill a table, attach it under a running syncd, and wait until all of it is indexed."""
    where.create(TABLE, dimension)
    where.fill(TABLE, rows, dimension)
    where.run("vacuum", table=TABLE)
    with serving(where) as service, service.client() as client:
        before = service.memory_bytes("RssAnon")
        begun = time.perf_counter()
        where.run("attach", [f"syncd_bench.{TABLE}", "cosine"])
        peak = before
        while True:
            found = {row.dataset: row for row in client.datasets()}.get(f"default/{TABLE}")
            peak = max(peak, service.memory_bytes("RssAnon"))
            if found is not None and found.state == "ready" and found.count == rows:
                break
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - begun
    vector_bytes = rows * dimension * 4
    return Backfill(
        rows, dimension, round(seconds, 2), round(rows / seconds), vector_bytes, peak, peak - before
    )
