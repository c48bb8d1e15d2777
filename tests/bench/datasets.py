"""Datasets: the cost of a search with few and with many datasets of the same size."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from syncd.bench.environment import Environment, serving


@dataclass(frozen=True, slots=True)
class Many:
    """One client: the first search in each dataset, then searches in random datasets.

    Memory is that of the process without mapped files.
    """

    datasets: int
    rows_each: int
    dimension: int
    start_seconds: float
    memory_bytes: int
    first_p50_us: float
    first_p99_us: float
    p50_us: float
    p99_us: float


def measure(
    where: Environment, *, numbers: list[int], rows_each: int, dimension: int, searches: int
) -> list[Many]:
    """Measure one number of datasets after the other, each with its own table and syncd."""
    return [run(where, number, rows_each, dimension, searches) for number in numbers]


def run(where: Environment, number: int, rows_each: int, dimension: int, searches: int) -> Many:
    """Measure with one table whose rows are dealt out to the datasets."""
    generator = np.random.default_rng(1)
    table = f"of_{number}"
    where.create(table, dimension)
    where.fill(table, number * rows_each, dimension)
    where.run("attach_datasets", [f"syncd_bench.{table}", "l2", f"{table}_", number])
    chosen = np.concatenate(
        [generator.permutation(number), generator.integers(number, size=searches)]
    )
    queries = generator.standard_normal((len(chosen), dimension), dtype=np.float32)
    seconds = []
    with where.step(f"{number} datasets"), serving(where) as service, service.client() as client:
        for dataset, query in zip(chosen.tolist(), queries, strict=True):
            begun = time.perf_counter()
            client.search(f"{table}_{dataset}", query, k=10)
            seconds.append(time.perf_counter() - begun)
        memory = service.memory_bytes("RssAnon")
    where.run("detach", [f"syncd_bench.{table}"])
    where.run("drop_table", table=table)
    percentiles = [
        np.percentile(taken, [50, 99]) * 1e6 for taken in (seconds[:number], seconds[number:])
    ]
    return Many(
        number,
        rows_each,
        dimension,
        round(service.start_seconds, 2),
        memory,
        *(round(float(value), 1) for value in np.concatenate(percentiles)),
    )
