"""Read your own writes from SQL: a row is searched for right after its commit, under load."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psycopg
from numpy.typing import NDArray

from syncd.bench.clients import leave_ctrl_c_to_the_parent, process_context
from syncd.bench.environment import SAMPLES, Environment, serving
from syncd.bench.mixed import Writer, write
from syncd.client.client import Client
from tests.bench.sql import TOKEN, Ports, searchable, text_of

TABLE = "fresh"
ROWS = 5000
BATCH = 10
FOREVER_SECONDS = 86_400.0
SEED = 20_261_128
INSERT = f"INSERT INTO syncd_bench.{TABLE} (embedding) VALUES (%s) RETURNING id"
SEARCH = (
    f"SELECT c.id FROM syncd.search('{TABLE}', %s::text, 3, recall => 1, fresh => true) AS s "
    f"JOIN syncd_bench.{TABLE} AS c ON c.id = s.key::bigint"
)


@dataclass(frozen=True, slots=True)
class Fresh:
    """Milliseconds from a commit to the answer, and the answers without the committed row."""

    way: str
    tries: int
    missing: int
    p50_ms: float
    p99_ms: float
    worst_ms: float


def measure(
    *, tries: int, writers: int, rate: float, dimension: int, readers: int | None
) -> list[Fresh]:
    """Each second try is an RPC with ``consistency: "strong"``, under the same load."""
    with searchable(readers) as (where, ports):
        where.create_tables(TABLE, dimension=dimension)
        where.fill(TABLE, ROWS, dimension)
        where.run("attach", [f"syncd_bench.{TABLE}", "l2"])
        with (
            serving(where) as service,
            process_context().Pool(writers, leave_ctrl_c_to_the_parent) as pool,
        ):
            service.wait_searchable(TABLE, ROWS)
            for number in range(writers):
                keys = range(1 + number, ROWS + 1, writers)
                writer = Writer(where.conninfo, TABLE, keys, SAMPLES, rate / writers, BATCH, number)
                pool.apply_async(write, (writer, FOREVER_SECONDS))
            return look(where, ports, tries, dimension)


def look(where: Environment, ports: Ports, tries: int, dimension: int) -> list[Fresh]:
    """Insert rows far from each other; search for each in the session that has written it."""
    generator = np.random.default_rng(SEED)
    with (
        psycopg.connect(where.conninfo, autocommit=True) as connection,
        Client(f"tcp://127.0.0.1:{ports.rpc}", token=TOKEN) as client,
    ):

        def by_sql(vector: NDArray[np.float32]) -> list[object]:
            rows = connection.execute(SEARCH, [text_of(vector).decode()], prepare=True).fetchall()
            return [key for (key,) in rows]

        def by_rpc(vector: NDArray[np.float32]) -> list[object]:
            hits = client.search(TABLE, vector, k=3, exact=True, consistency="strong")
            return [hit.key for hit in hits]

        ways: dict[str, Callable[[NDArray[np.float32]], list[object]]] = {
            "syncd.search, fresh": by_sql,
            "rpc, strong": by_rpc,
        }
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        missing = dict.fromkeys(ways, 0)
        for _ in where.track(range(tries), "tries"):
            for way, search in ways.items():
                vector = (generator.standard_normal(dimension) * 100).astype(np.float32)
                row = connection.execute(
                    INSERT, [text_of(vector).decode()], prepare=True
                ).fetchone()
                committed = time.perf_counter()
                found = search(vector)
                seconds[way].append(time.perf_counter() - committed)
                missing[way] += row is None or row[0] not in found
    return [
        Fresh(
            way,
            tries,
            missing[way],
            *(round(float(each) * 1000, 2) for each in np.percentile(seconds[way], [50, 99, 100])),
        )
        for way in ways
    ]
