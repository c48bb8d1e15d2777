"""Restart: time of a stop and of a start, and bytes of a checkpoint after some changes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from syncd.bench.environment import SAMPLES, Environment, Serving, serving

TABLE = "restart"
FEW = "few"
FEW_ROWS = 100
"""Rows of a dataset that only loads FAISS: until then FAISS is not in memory."""


@dataclass(frozen=True, slots=True)
class Restart:
    """Medians of the rounds. A start lasts from the command to its line ``ready``, with Python's.

    ``memory_bytes_per_row``: memory of the process after such a start, changes and a search,
    without mapped files, less its memory with ``FEW_ROWS`` alone.
    """

    rows: int
    dimension: int
    index: str
    memory_bytes_per_row: float
    changes: int
    checkpoint_bytes: int
    checkpoint_seconds: float
    stop_seconds: float
    start_seconds: float
    start_after_changes_seconds: float


def measure(where: Environment, *, rows: int, dimension: int, changes: int, rounds: int) -> Restart:
    """Measure a checkpoint after changes, a stop, and two starts.

    The first start has nothing to catch up with; the second follows changes made while stopped.
    """
    generator = np.random.default_rng(0)
    where.create_tables(TABLE, FEW, dimension=dimension)
    for table, number in ((TABLE, rows), (FEW, FEW_ROWS)):
        where.fill(table, number, dimension)
        where.run("vacuum", table=table)

    def search(service: Serving, table: str) -> None:
        with service.client() as client:
            client.search(table, generator.standard_normal(dimension, dtype=np.float32))

    def change() -> str:
        keys = generator.choice(rows, changes, replace=False) + 1
        return where.change(
            TABLE, keys.tolist(), generator.integers(1, SAMPLES + 1, changes).tolist()
        )

    with serving(where) as service:
        attach(where, service, FEW, FEW_ROWS)
    with serving(where) as service, where.step("the first reading"):
        search(service, FEW)
        empty = service.memory_bytes("RssAnon")
        index = attach(where, service, TABLE, rows)
        service.settle()  # it ends with a checkpoint
    written, saved, stops, starts, late_starts, memory = [], [], [], [], [], []
    for _ in where.track(range(rounds), "stop and start"):
        with serving(where) as service, service.client() as client:
            starts.append(service.start_seconds)
            client.wait(change(), timeout_ms=60_000)
            checkpoint = client.checkpoint()
            written.append(checkpoint.bytes_written)
            saved.append(checkpoint.seconds)
            search(service, TABLE)
            memory.append((service.memory_bytes("RssAnon") - empty) / rows)
        stops.append(service.stop_seconds)
        change()
        with serving(where) as service:
            late_starts.append(service.start_seconds)
    return Restart(
        rows,
        dimension,
        index,
        round(statistics.median(memory), 1),
        changes,
        int(statistics.median(written)),
        *(round(statistics.median(values), 3) for values in (saved, stops, starts, late_starts)),
    )


def attach(where: Environment, service: Serving, table: str, rows: int) -> str:
    """Attach a table, wait until a search uses its index, and return the kind of the index."""
    where.run("attach", [f"syncd_bench.{table}", "cosine"])
    return str(service.wait_searchable(table, rows).index)
