"""Passes: the cost of following a transaction, in tables of different sizes.

It should depend only on the number of changes.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np

from syncd.bench.environment import SAMPLES, Environment, serving

IN_A_ROW = 5
"""Transactions on one table in a row: processor time is counted in hundredths of a second."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Time from a commit until the index has it, and syncd's mean processor time for it.

    Processor time of builds is counted apart.

    ``times_the_first``: the median divided by that of the first table.
    """

    rows: int
    dimension: int
    changes: int
    passes: int
    p50_ms: float
    p99_ms: float
    times_the_first: float
    cpu_ms: float
    building_cpu_ms: float


def measure(
    where: Environment, *, sizes: list[int], dimension: int, changes: int, rounds: int
) -> list[Pass]:
    """Change tables of all sizes in turn, under one syncd."""
    generator = np.random.default_rng(0)
    tables = {f"passes_{rows}": rows for rows in sizes}
    where.create_tables(*tables, dimension=dimension)
    for table, rows in tables.items():
        where.fill(table, rows, dimension)
        where.run("vacuum", table=table)
        where.run("attach", [f"syncd_bench.{table}", "cosine"])
    seconds: dict[str, list[float]] = {table: [] for table in tables}
    cpu, building = dict.fromkeys(tables, 0.0), dict.fromkeys(tables, 0.0)
    with serving(where) as service, service.client() as client:
        with where.step("until all indexes are built"):
            service.settle()
        for _ in where.track(range(rounds), "passes"):
            for table, rows in tables.items():
                used, built = service.cpu_seconds(), service.building_cpu_seconds()
                for _ in range(IN_A_ROW):
                    keys = (generator.choice(rows, changes, replace=False) + 1).tolist()
                    token = where.change(
                        table, keys, generator.integers(1, SAMPLES + 1, changes).tolist()
                    )
                    committed = time.perf_counter()
                    client.wait(token, timeout_ms=60_000)
                    seconds[table].append(time.perf_counter() - committed)
                built = service.building_cpu_seconds() - built
                cpu[table] += service.cpu_seconds() - used - built
                building[table] += built
    medians = {table: statistics.median(taken) for table, taken in seconds.items()}
    return [
        Pass(
            rows,
            dimension,
            changes,
            len(seconds[table]),
            round(medians[table] * 1000, 2),
            round(float(np.percentile(seconds[table], 99)) * 1000, 2),
            round(medians[table] / next(iter(medians.values())), 2),
            *(round(used[table] / len(seconds[table]) * 1000, 2) for used in (cpu, building)),
        )
        for table, rows in tables.items()
    ]
