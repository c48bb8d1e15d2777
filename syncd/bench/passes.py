"""Passes: what following a transaction costs, beside tables of different sizes. It should depend on what changed alone."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from syncd.bench.environment import SAMPLES, Environment, serving

IN_A_ROW = 5
"""Transactions on one table before the next has its turn: processor time is counted in hundredths of a second."""


@dataclass(frozen=True, slots=True)
class Pass:
    """From a commit until the index has it, and the processor time of syncd: means and medians a transaction."""

    rows: int
    dimension: int
    changes: int
    passes: int
    p50_ms: float
    p99_ms: float
    cpu_ms: float


def measure(
    where: Environment, *, sizes: list[int], dimension: int, changes: int, rounds: int, seed: int = 0
) -> list[Pass]:
    """Tables of all sizes under one syncd, changed in turn."""
    generator = np.random.default_rng(seed)
    tables = {f"passes_{rows}": rows for rows in sizes}
    where.create_tables(*tables, dimension=dimension)
    for table, rows in tables.items():
        where.fill(table, rows, dimension, seed)
        where.run("vacuum", table=table)
        where.run("attach", [f"syncd_bench.{table}", "cosine"])
    seconds: dict[str, list[float]] = {table: [] for table in tables}
    cpu = dict.fromkeys(tables, 0.0)
    with serving(where) as service, service.client() as client:
        for _ in where.track(range(rounds), "passes"):
            for table, rows in tables.items():
                used = service.cpu_seconds()
                for _ in range(IN_A_ROW):
                    keys = (generator.choice(rows, changes, replace=False) + 1).tolist()
                    token = where.change(table, keys, generator.integers(1, SAMPLES + 1, changes).tolist())
                    committed = time.perf_counter()
                    client.wait(token, timeout_ms=60_000)
                    seconds[table].append(time.perf_counter() - committed)
                cpu[table] += service.cpu_seconds() - used
    return [
        Pass(
            rows,
            dimension,
            changes,
            len(seconds[table]),
            round(statistics.median(seconds[table]) * 1000, 2),
            round(float(np.percentile(seconds[table], 99)) * 1000, 2),
            round(cpu[table] / len(seconds[table]) * 1000, 2),
        )
        for table, rows in tables.items()
    ]
