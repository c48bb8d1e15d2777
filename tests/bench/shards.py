"""Shards: what a layout of n of them costs the database, at rest and while rows are written."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing.pool import Pool

from syncd.bench.clients import leave_ctrl_c_to_the_parent, process_context
from syncd.bench.environment import SAMPLES, Environment, Serving, serving
from syncd.bench.mixed import Writer, write
from tests.bench.cost import seconds_of

TABLE = "sharded"
BATCH = 10
"""Rows of a writer's transaction."""
STATISTICS_SECONDS = 1.5
"""After this long PostgreSQL has published the statistics of a session that rests."""
ROWS_READ = (
    "SELECT seq_tup_read + coalesce(idx_tup_fetch, 0) FROM pg_stat_user_tables "
    f"WHERE schemaname = 'syncd_bench' AND relname = '{TABLE}'"
)
SESSIONS = "SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'syncd/bench-%'"

FORGET_LAYOUT = (
    "DELETE FROM syncd.layout AS l "
    "WHERE NOT EXISTS (SELECT FROM syncd.consumers AS c WHERE c.layout = l.shards)"
)


@dataclass(frozen=True, slots=True)
class Sharded:
    """One layout. Shares are of one core: of the server's sessions of all shards, of all services.

    ``rows_scanned``, ``rows_indexed`` and the server's processor seconds are those of the first
    reading, and of the start. ``applied_per_second`` are the reads that found changes, of all
    shards; each belongs to a pass.
    """

    shards: int
    first_reading_seconds: float
    first_reading_server_seconds: float
    rows_scanned: int
    rows_indexed: int
    connections: int
    idle_server_share: float
    idle_services_share: float
    rows_per_second: int
    server_share: float
    services_share: float
    applied_per_second: int
    lag_ms: float


def measure(
    where: Environment,
    *,
    layouts: Sequence[int],
    rows: int,
    dimension: int,
    rate: float,
    rest_seconds: float,
    seconds: float,
) -> list[Sharded]:
    """Measure one layout after the other; each reads the whole table."""
    where.create_tables(TABLE, dimension=dimension)
    where.fill(TABLE, rows, dimension)
    where.run("vacuum", table=TABLE)
    where.run("attach", [f"syncd_bench.{TABLE}", "l2"])
    with process_context().Pool(1, leave_ctrl_c_to_the_parent) as pool:
        return [
            measure_layout(where, pool, of, rows, rate, rest_seconds, seconds) for of in layouts
        ]


def measure_layout(
    where: Environment,
    pool: Pool,
    of: int,
    rows: int,
    rate: float,
    rest_seconds: float,
    seconds: float,
) -> Sharded:
    """Measure one layout: its first reading, at rest, and while rows are written."""
    time.sleep(STATISTICS_SECONDS)
    before = number(where, ROWS_READ)
    begun = time.perf_counter()
    with shards(where, of) as services:
        indexed = 0
        for service in services:
            with service.client() as client:
                found = client.datasets()
                indexed += sum(each.count for each in found if each.dataset == f"default/{TABLE}")
        first = time.perf_counter() - begun
        reading, _ = used(where, services)
        time.sleep(STATISTICS_SECONDS)
        scanned = number(where, ROWS_READ) - before
        with where.step(f"{of} shards rest"):
            for service in services:
                service.settle()
            time.sleep(rest_seconds)
            idle = shares(where, services, seconds)
        connections = len(where.connection.execute(SESSIONS).fetchall())
        keys = range(1, rows + 1)
        writer = Writer(where.conninfo, TABLE, keys, SAMPLES, rate, BATCH, of)
        with where.step(f"{of} shards follow"):
            applied = sum(map(applied_reads, services))
            writing = pool.apply_async(write, (writer, seconds))
            busy = shares(where, services, seconds)
            written = writing.get()
            applied = sum(map(applied_reads, services)) - applied
        lag = lag_seconds(where, services)
    return Sharded(
        of,
        round(first, 2),
        round(reading, 3),
        scanned,
        indexed,
        connections,
        round(idle[0], 4),
        round(idle[1], 4),
        round(written),
        round(busy[0], 3),
        round(busy[1], 3),
        round(applied / seconds),
        round(lag * 1000, 1),
    )


@contextmanager
def shards(where: Environment, of: int) -> Iterator[list[Serving]]:
    """The shards of a layout, when each is ready; forgotten at the end."""
    names = [f"bench-{of}-{place}" for place in range(of)]
    try:
        with ExitStack() as stack:
            starting = []
            for place, name in enumerate(names):
                directory = where.directory / name
                directory.mkdir()
                variables = {
                    "SYNCD_SHARD": f"{place}/{of}",
                    "SYNCD_CONSUMER": name,
                    "SYNCD_HTTP": "127.0.0.1:0",
                    "SYNCD_READERS": "0",
                }
                own = replace(where, directory=directory, variables=variables)
                starting.append(serving(own))
            with ThreadPoolExecutor(of) as threads:  # each is started as soon as the others
                services = list(threads.map(stack.enter_context, starting))
            yield services
    finally:
        for name in names:
            where.run("forget_consumer", [name])
        where.connection.execute(FORGET_LAYOUT)


def number(where: Environment, query: str) -> int:
    """The single value of a statement's result."""
    row = where.connection.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])


def used(where: Environment, services: Sequence[Serving]) -> tuple[float, float]:
    """Processor seconds so far of the shards' server sessions, and of their processes."""
    sessions = [pid for (pid,) in where.connection.execute(SESSIONS).fetchall()]
    return sum(map(seconds_of, sessions)), sum(each.cpu_seconds() for each in services)


def shares(where: Environment, services: Sequence[Serving], seconds: float) -> tuple[float, float]:
    """Shares of one core that server sessions and processes take during some seconds."""
    before, begun = used(where, services), time.perf_counter()
    time.sleep(seconds)
    after, lasted = used(where, services), time.perf_counter() - begun
    return (after[0] - before[0]) / lasted, (after[1] - before[1]) / lasted


def applied_reads(service: Serving) -> int:
    """Reads that were applied so far, from the service's metrics."""
    lines = (service.socket.parent / "serve.log").read_text().splitlines()
    addresses = [
        event["address"]
        for event in (json.loads(line) for line in lines if line.startswith("{"))
        if event["event"] == "http_listening"
    ]
    with urllib.request.urlopen(f"http://{addresses[-1]}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.search(r"^syncd_apply_seconds_count (\S+)$", text, re.MULTILINE)
    return 0 if found is None else int(float(found[1]))


def lag_seconds(where: Environment, services: Sequence[Serving]) -> float:
    """Seconds from a commit until every shard includes it."""
    with ExitStack() as stack:
        clients = [stack.enter_context(each.client()) for each in services]
        token = where.change(TABLE, [1, 2, 3], [1, 2, 3])
        begun = time.perf_counter()
        for client in clients:
            client.wait(token, timeout_ms=60_000)
        return time.perf_counter() - begun
