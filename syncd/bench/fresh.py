"""Freshness: from a writer's commit until a reader sees the row, measured in the writer's process."""

from __future__ import annotations

import multiprocessing
import random
import time
from dataclasses import dataclass

import numpy as np
import psycopg
from psycopg import sql

from syncd.bench.environment import Environment, Serving, serving
from syncd.rpc.client import Client
from syncd.statements import statement

DATASET = "fresh"
IDLE_SECONDS = (0.02, 0.2)
LOOK_SECONDS = 0.0005
WARM_UP = 20


@dataclass(frozen=True, slots=True)
class Freshness:
    """Milliseconds from commit to searchable."""

    writers: int
    commits: int
    p50_ms: float
    p99_ms: float
    worst_ms: float


def measure(where: Environment, *, dimension: int, commits: int, writers: int, seed: int = 0) -> list[Freshness]:
    """An idle system with one writer, then several writers at once without a pause."""
    where.create_tables(DATASET, dimension=dimension)
    where.run("insert_sample", table=DATASET)
    where.run("attach", [f"syncd_bench.{DATASET}", "cosine"])
    with serving(where) as service:
        return [
            run(where, service, writers=1, commits=commits, idle=True, seed=seed),
            run(where, service, writers=writers, commits=max(commits // writers, 10) * 4, idle=False, seed=seed),
        ]


def run(where: Environment, service: Serving, *, writers: int, commits: int, idle: bool, seed: int) -> Freshness:
    """Each writer in a process of its own, so that they do not wait for one another."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(writers) as pool:
        arguments = [(where.conninfo, str(service.socket), commits, idle, seed + number) for number in range(writers)]
        delays = np.concatenate(pool.starmap(write_and_look, arguments)) * 1000
    p50, p99 = np.percentile(delays, [50, 99])
    return Freshness(writers, len(delays), round(float(p50), 2), round(float(p99), 2), round(float(delays.max()), 2))


def write_and_look(conninfo: str, socket: str, commits: int, idle: bool, seed: int) -> list[float]:
    """Insert a row, then ask for it until it is there; seconds for each commit after the first few."""
    pauses = random.Random(seed)  # noqa: S311 - a reproducible schedule
    insert = sql.SQL(statement("bench", "insert_returning")).format(table=sql.Identifier(DATASET))
    delays = []
    with psycopg.connect(conninfo, autocommit=True) as connection, Client(socket) as client:
        for _ in range(commits + WARM_UP):
            if idle:
                time.sleep(pauses.uniform(*IDLE_SECONDS))
            row = connection.execute(insert, prepare=True).fetchone()
            committed = time.perf_counter()
            assert row is not None
            while not client.get(DATASET, [row[0]]):
                time.sleep(LOOK_SECONDS)  # eight readers that spin would be what is measured
            delays.append(time.perf_counter() - committed)
    return delays[WARM_UP:]
