"""Restart: how long stopping and starting take, and what a checkpoint writes after some changes."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

from syncd.bench.environment import SAMPLES, Environment, serving

TABLE = "restart"


@dataclass(frozen=True, slots=True)
class Restart:
    """Medians of the rounds. A start lasts from the command to its line ``ready``, with Python's own start in it."""

    rows: int
    dimension: int
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
    where.run("attach", [f"syncd_bench.{TABLE}", "cosine"])

    def change() -> str:
        keys = generator.choice(rows, changes, replace=False) + 1
        return where.change(TABLE, keys.tolist(), generator.integers(1, SAMPLES + 1, changes).tolist())

    with serving(where), where.step("the first reading"):
        pass  # it ends with a checkpoint
    written, saved, stops, starts, late_starts = [], [], [], [], []
    for _ in where.track(range(rounds), "stop and start"):
        with serving(where) as service, service.client() as client:
            starts.append(service.start_seconds)
            client.wait(change(), timeout_ms=60_000)
            checkpoint = client.checkpoint()
            written.append(checkpoint.bytes_written)
            saved.append(checkpoint.seconds)
        stops.append(service.stop_seconds)
        change()
        with serving(where) as service:
            late_starts.append(service.start_seconds)
    return Restart(
        rows,
        dimension,
        changes,
        int(statistics.median(written)),
        *(round(statistics.median(values), 3) for values in (saved, stops, starts, late_starts)),
    )
