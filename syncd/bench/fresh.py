"""Freshness: time from a writer's commit until a reader sees the row, on the writer's clock."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from psycopg import sql

from syncd.bench.clients import leave_ctrl_c_to_the_parent, process_context
from syncd.bench.environment import SAMPLES, Environment, Serving, serving
from syncd.client.client import Client
from syncd.postgres.connection import open_session
from syncd.statements import filled

DATASET = "fresh"
IDLE_SECONDS = (0.02, 0.2)
LOOK_SECONDS = 0.0005
WARM_UP = 10


@dataclass(frozen=True, slots=True)
class Freshness:
    """Milliseconds from commit to searchable."""

    writers: int
    commits: int
    p50_ms: float
    p99_ms: float
    worst_ms: float


def measure(where: Environment, *, dimension: int, commits: int, writers: int) -> list[Freshness]:
    """Measure one writer with pauses, then several writers at once without pauses."""
    where.create_tables(DATASET, dimension=dimension)
    where.run("insert_sample", table=DATASET)
    where.run("attach", [f"syncd_bench.{DATASET}", "cosine"])
    with serving(where) as service:
        each = max(commits // writers, 10) * 4
        return [
            run(where, service, writers=1, commits=commits, idle=True),
            run(where, service, writers=writers, commits=each, idle=False),
        ]


def run(
    where: Environment, service: Serving, *, writers: int, commits: int, idle: bool
) -> Freshness:
    """Measure writers, each in a process of its own, so that they do not wait for each other."""
    pause = IDLE_SECONDS if idle else (0.0, 0.0)
    with (
        where.step(f"{commits} commits by each of {writers} writers"),
        process_context().Pool(writers, leave_ctrl_c_to_the_parent) as pool,
    ):
        probes = [
            Probe(where.conninfo, str(service.socket), DATASET, SAMPLES, pause, number)
            for number in range(writers)
        ]
        delays = np.concatenate(
            pool.starmap(write_and_look, [(probe, commits + WARM_UP) for probe in probes])
        )
    p50, p99 = np.percentile(delays, [50, 99])
    return Freshness(
        writers,
        len(delays),
        round(float(p50), 2),
        round(float(p99), 2),
        round(float(delays.max()), 2),
    )


@dataclass(frozen=True, slots=True)
class Probe:
    """A writer that looks for its own rows, by RPC; without a socket by SQL in another session."""

    conninfo: str
    socket: str | None
    table: str
    samples: int
    pause_seconds: tuple[float, float]
    seed: int

    @contextmanager
    def reader(self) -> Iterator[Callable[[int], bool]]:
        """A function that says whether the row with a key can be found."""
        if self.socket is not None:
            with Client(self.socket) as client:
                yield lambda key: bool(client.get(self.table, [key]))
        else:
            find = filled("bench", "find_row", table=sql.Identifier(self.table))
            with open_session(self.conninfo) as connection:
                yield (
                    lambda key: connection.execute(find, [key], prepare=True).fetchone() is not None
                )


def write_and_look(probe: Probe, commits: int, seconds: float = math.inf) -> NDArray[np.float64]:
    """Insert rows; look for each until it is found.

    Returns milliseconds per commit, without the first ``WARM_UP`` commits.
    """
    chance = random.Random(probe.seed)  # noqa: S311 - a reproducible schedule
    insert = filled("bench", "insert_returning", table=sql.Identifier(probe.table))
    delays: list[float] = []
    with open_session(probe.conninfo) as connection, probe.reader() as is_there:
        end = time.perf_counter() + seconds
        while len(delays) < commits and time.perf_counter() < end:
            time.sleep(chance.uniform(*probe.pause_seconds))
            row = connection.execute(
                insert, [chance.randint(1, probe.samples)], prepare=True
            ).fetchone()
            committed = time.perf_counter()
            assert row is not None
            while not is_there(row[0]):
                time.sleep(LOOK_SECONDS)  # without a pause, eight busy readers would be measured
            delays.append(time.perf_counter() - committed)
    return np.array(delays[WARM_UP:] or delays) * 1000
