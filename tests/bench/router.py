"""The router's share of a search: a client asks a router, each of its shards, and one syncd alone.

The searches are exact, so that shards and the syncd alone do equal work. Requests take turns, so
that all are measured under the same load. With fewer cores than processes the shards' searches run
one after the other: ``side_by_side_ms`` leaves out the processor time of all shards but the slowest
one, as if each had a core.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psycopg
from numpy.typing import NDArray

from syncd.bench.environment import used_seconds
from syncd.client.client import Client
from syncd.postgres import schema
from tests.daemon import Daemon
from tests.servers import PostgresServer

DATASET = "vectors"
WARM_UP = 100
CPU_SEARCHES = 1000
"""Searches over which processor time is counted: the system counts it in hundredths of a second."""
TOKEN = "of the benchmark"  # noqa: S105 - listens on 127.0.0.1


@dataclass(frozen=True, slots=True)
class Asked:
    """Latency of one address, and the processor time of its process for one search.

    The 5th percentile says what a search takes when no other program wants the cores.
    """

    who: str
    p5_ms: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    side_by_side_ms: float | None = None
    """The router's p50 without the time in which its shards had to wait for each other's core."""
    target_ms: float | None = None
    """1.3 times the slowest shard's p50, and half a millisecond."""


def measure(
    *, rows: int, dimension: int, shards: int, searches: int, k: int, versus: Path | None
) -> list[Asked]:
    """Start everything on a server of its own, and ask each in turn.

    ``versus`` is the checkout of another build, whose router asks the same shards.
    """
    with ExitStack() as stack:
        server = stack.enter_context(PostgresServer(16))
        conninfo = server.create_database("router")
        schema.install(conninfo)
        fill(conninfo, rows, dimension)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="syncd-bench-")))
        daemons = {"one syncd": Daemon(conninfo, folder / "alone")}
        for number in range(shards):
            name = f"shard {number}/{shards}"
            daemons[name] = Daemon(conninfo, folder / str(number), shard=f"{number}/{shards}")
        for each in daemons.values():
            each.spawn()
            stack.callback(each.kill)
        for each in daemons.values():
            assert each.process is not None
            assert each.wait_for_line(each.process).startswith(b"ready"), each.log.read_text()
        routers = {"router": sys.executable}
        if versus is not None:
            routers["router of the other build"] = str(versus / ".venv/bin/python")
        for name, python in routers.items():
            daemons[name] = Daemon(conninfo, folder / name.replace(" ", "-"))
            daemons[name].command, daemons[name].python = "route", python
            daemons[name].variables["PYTHONSAFEPATH"] = "1"  # not the checkout in this directory
            daemons[name].start()
            stack.callback(daemons[name].kill)
        clients = {name: stack.enter_context(Client(each.socket)) for name, each in daemons.items()}
        queries = np.random.default_rng(1).standard_normal((100, dimension)).astype(np.float32)
        for number in range(WARM_UP):
            for client in clients.values():
                client.search(DATASET, queries[number], k=k, exact=True)
        latencies: dict[str, list[float]] = {name: [] for name in clients}
        for number in range(searches):
            for name, client in clients.items():
                begun = time.perf_counter()
                client.search(DATASET, queries[number % len(queries)], k=k, exact=True)
                latencies[name].append(time.perf_counter() - begun)
        used = {name: cpu_of(daemons, client, queries, k) for name, client in clients.items()}
        return [reported(name, latencies, used[name]) for name in clients]


def fill(conninfo: str, rows: int, dimension: int) -> None:
    """A table with random vectors, attached."""
    vectors = np.random.default_rng(0).standard_normal((rows, dimension)).astype(np.float32)
    with psycopg.connect(conninfo, autocommit=True) as db:
        db.execute(f"CREATE TABLE {DATASET} (id bigint PRIMARY KEY, v real[])")
        with db.cursor().copy(f"COPY {DATASET} FROM STDIN") as copy:
            for key, vector in enumerate(vectors):
                copy.write_row((key, vector.tolist()))
        db.execute(f"SELECT syncd.attach('{DATASET}', metric => 'l2')")


def cpu_of(
    daemons: dict[str, Daemon], client: Client, queries: NDArray[np.float32], k: int
) -> dict[str, float]:
    """Processor time of each process for one search by this client alone, in seconds."""
    before = {name: cpu_seconds(each) for name, each in daemons.items()}
    for number in range(CPU_SEARCHES):
        client.search(DATASET, queries[number % len(queries)], k=k, exact=True)
    return {
        name: (cpu_seconds(each) - before[name]) / CPU_SEARCHES for name, each in daemons.items()
    }


def cpu_seconds(daemon: Daemon) -> float:
    """Processor time that a process has used so far."""
    assert daemon.process is not None
    stat = Path(f"/proc/{daemon.process.pid}/stat").read_text(encoding="ascii")
    return used_seconds(stat.rpartition(")")[2].split())


def reported(who: str, latencies: dict[str, list[float]], used: dict[str, float]) -> Asked:
    """The figures of one address."""
    p5, p50, p99 = (float(value) * 1000 for value in np.percentile(latencies[who], [5, 50, 99]))
    found = Asked(who, round(p5, 3), round(p50, 3), round(p99, 3), round(used[who] * 1e6, 1))
    if not who.startswith("router"):
        return found
    shards = [name for name in latencies if name.startswith("shard")]
    slowest = max(float(np.median(latencies[name])) * 1000 for name in shards)
    waited = (sum(used[name] for name in shards) - max(used[name] for name in shards)) * 1000
    return replace(
        found, side_by_side_ms=round(p50 - waited, 3), target_ms=round(1.3 * slowest + 0.5, 3)
    )
