"""Restart: how long stopping and starting take, and what a checkpoint writes after some changes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from syncd.bench.environment import SAMPLES, Environment, serving

TABLE = "restart"


@dataclass(frozen=True, slots=True)
class Restart:
    """Medians of the rounds. A start lasts from the command to its line ``ready``, with Python's own start in it.

    ``memory_bytes_per_row``: of the process after such a start, a search and some changes, without mapped files and what it has without any row.
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


def measure(where: Environment, *, rows: int, dimension: int, changes: int, rounds: int, seed: int = 0) -> Restart:
    """A checkpoint after changes, a stop, a start with nothing to catch up with, and one after changes that were made meanwhile."""
    generator = np.random.default_rng(seed)
    where.create_tables(TABLE, dimension=dimension)
    where.fill(TABLE, rows, dimension, seed)
    where.run("vacuum", table=TABLE)

    def change() -> str:
        keys = generator.choice(rows, changes, replace=False) + 1
        return where.change(TABLE, keys.tolist(), generator.integers(1, SAMPLES + 1, changes).tolist())

    with serving(where) as service, where.step("the first reading"):
        empty = service.memory_bytes("RssAnon")
        where.run("attach", [f"syncd_bench.{TABLE}", "cosine"])
        index = str(service.wait_searchable(TABLE, rows).index)
        service.settle()  # it ends with a checkpoint
    written, saved, stops, starts, late_starts, memory = [], [], [], [], [], []
    for _ in where.track(range(rounds), "stop and start"):
        with serving(where) as service, service.client() as client:
            starts.append(service.start_seconds)
            client.wait(change(), timeout_ms=60_000)
            checkpoint = client.checkpoint()
            written.append(checkpoint.bytes_written)
            saved.append(checkpoint.seconds)
            client.search(TABLE, generator.standard_normal(dimension, dtype=np.float32), k=10)
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
