"""Churn: recall and latency before and after much of a table has changed, and what following that cost."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from syncd.bench.clients import clients
from syncd.bench.engines import Engine
from syncd.bench.environment import Environment
from syncd.bench.search import Point, take_turns
from syncd.bench.vector_set import VectorSet, truth
from syncd.bench.versus import FOLLOWED, HNSW, Build, Recalls, pair

BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """Changing the table with its index, in transactions of ``BATCH_ROWS``, until the index had it all; and vacuuming after that."""

    engine: str
    updated: int
    deleted: int
    seconds: float
    rows_per_second: int
    vacuum_seconds: float


@dataclass(frozen=True, slots=True)
class ChurnReport:
    """The same settings before and after."""

    vectors: str
    rows: int
    dimension: int
    metric: str
    builds: list[Build]
    changes: list[Change]
    before: list[Point]
    after: list[Point]


def measure(
    where: Environment,
    vectors: VectorSet,
    *,
    rows: int,
    updates: float,
    deletes: float,
    recalls: list[float],
    client_number: int,
    seconds: float,
    rounds: int,
    versus: bool,
) -> ChurnReport:
    """Index the first rows of the set; give a share of them the vectors that follow in it, and delete a share of the others."""
    order = np.random.default_rng(0).permutation(rows) + 1
    updated, deleted = np.split(order, [int(rows * updates)])
    deleted = deleted[: int(rows * deletes)]
    vectors_after = np.array(vectors.base[:rows])
    vectors_after[updated - 1] = vectors.base[rows : rows + len(updated)]
    loaded = truth(vectors.base[:rows], vectors.queries, vectors.metric, track=where.track)
    changed = truth(vectors_after, vectors.queries, vectors.metric, track=where.track, gone=deleted - 1)
    where.create("samples", vectors.dimension)
    where.load("samples", vectors.blocks(rows, rows + len(updated)))
    with pair(where, vectors, rows, versus=versus) as both, clients(client_number, vectors.queries) as searchers:
        measured = Recalls(searchers, loaded)
        engines: list[Engine] = []
        with where.step("settings of equal recall"):
            for target in recalls:
                syncd = both.syncd(target)
                wanted = measured.of(syncd)
                engines += [syncd, *(measured.bracket(both.pgvector, wanted)[-1:] if versus else [])]
        engines = list(dict.fromkeys(engines))
        before = take_turns(where, searchers, engines, measured, seconds=seconds, rounds=rounds)
        tables = {"syncd": FOLLOWED} | ({"pgvector": HNSW} if versus else {})
        spent = change_tables(where, list(tables.values()), updated, deleted)
        begun = time.perf_counter()
        with both.service.client() as client:
            client.wait(str(where.value("token")), timeout_ms=600_000)
        both.service.wait_searchable(FOLLOWED, rows - len(deleted))
        spent[FOLLOWED] += time.perf_counter() - begun
        changes = []
        for name, table in tables.items():
            begun = time.perf_counter()
            with where.step(f"VACUUM {table}"):
                where.run("vacuum", table=table)
            vacuum_seconds = round(time.perf_counter() - begun, 2)
            rate = round((len(updated) + len(deleted)) / spent[table])
            changes.append(Change(name, len(updated), len(deleted), round(spent[table], 2), rate, vacuum_seconds))
        measured = Recalls(searchers, changed)
        for engine in engines:
            measured.of(engine)
        after = take_turns(where, searchers, engines, measured, seconds=seconds, rounds=rounds)
        return ChurnReport(vectors.name, rows, vectors.dimension, vectors.metric, both.builds, changes, before, after)


def change_tables(where: Environment, tables: list[str], updated: np.ndarray, deleted: np.ndarray) -> dict[str, float]:
    """Some rows in one table, the same in the other; the seconds that each took."""
    spent = dict.fromkeys(tables, 0.0)
    for start in where.track(range(0, len(updated), BATCH_ROWS), "updates"):
        keys = updated[start : start + BATCH_ROWS].tolist()
        for table in tables:
            begun = time.perf_counter()
            where.change(table, keys, range(start + 1, start + 1 + len(keys)))
            spent[table] += time.perf_counter() - begun
    for start in where.track(range(0, len(deleted), BATCH_ROWS), "deletes"):
        keys = deleted[start : start + BATCH_ROWS].tolist()
        for table in tables:
            begun = time.perf_counter()
            where.run("delete_rows", [keys], table=table)
            spent[table] += time.perf_counter() - begun
    return spent
