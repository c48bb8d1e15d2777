"""Cost: the processor time of the service and of its sessions, at rest and for small passes."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from syncd.bench.environment import CONSUMER, SAMPLES, Environment, Serving, serving

TABLE = "cost"
PAUSE_SECONDS = 0.1
"""Pause between two transactions: longer than a pass, so that each gets a pass of its own."""
WARM_UP = 10


@dataclass(frozen=True, slots=True)
class Cost:
    """Processor time of the service with its readers, and of all its sessions in the server.

    Shares are of one core while nothing is written. The other times are milliseconds of a core for
    each transaction: its pass, and the looks until the next transaction.
    """

    idle_service_share: float
    idle_server_share: float
    changes: int
    transactions: int
    service_ms: float
    server_ms: float


def measure(
    where: Environment,
    *,
    rows: int,
    dimension: int,
    changes: int,
    transactions: int,
    rest_seconds: float,
    idle_seconds: float,
) -> Cost:
    """Measure a service at rest, and then transactions of a few changes, with pauses."""
    where.create_tables(TABLE, dimension=dimension)
    where.fill(TABLE, rows, dimension)
    where.run("vacuum", table=TABLE)
    where.run("attach", [f"syncd_bench.{TABLE}", "cosine"])
    generator = np.random.default_rng(0)
    with serving(where) as service, service.client() as client:
        with where.step("until the index is built"):
            service.settle()
        with where.step("rest"):
            time.sleep(rest_seconds)
            before = used(where, service)
            time.sleep(idle_seconds)
            idle = (used(where, service) - before) / idle_seconds
        for number in where.track(range(transactions + WARM_UP), "transactions"):
            if number == WARM_UP:
                before = used(where, service)
            keys = (generator.choice(rows, changes, replace=False) + 1).tolist()
            samples = generator.integers(1, SAMPLES + 1, changes).tolist()
            token = where.change(TABLE, keys, samples)
            time.sleep(PAUSE_SECONDS)
        busy = (used(where, service) - before) / transactions * 1000
        client.wait(token, timeout_ms=60_000)
    return Cost(
        idle_service_share=round(float(idle[0]), 4),
        idle_server_share=round(float(idle[1]), 4),
        changes=changes,
        transactions=transactions,
        service_ms=round(float(busy[0]), 3),
        server_ms=round(float(busy[1]), 3),
    )


def used(where: Environment, service: Serving) -> NDArray[np.float64]:
    """Processor seconds so far of the service with its children, and of its server sessions."""
    sessions = [int(str(pid)) for (pid,) in where.run("list_sessions", [f"syncd/{CONSUMER}"])]
    mine = [service.process.pid]
    for pid in mine:
        for path in Path(f"/proc/{pid}/task").glob("*/children"):
            mine += map(int, path.read_text().split())
    return np.array([sum(map(seconds_of, each)) for each in (mine, sessions)])


def seconds_of(pid: int) -> float:
    """Processor seconds of a process with its threads (schedstat counts nanoseconds)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in tasks) / 1e9
