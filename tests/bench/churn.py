"""Churn: recall and latency before and after much of a table has changed, and the cost of that.

Both are compared with a fresh build of the rows that are left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from syncd.bench.clients import Clients, clients
from syncd.bench.engines import Engine, SyncdEngine
from syncd.bench.environment import Environment
from syncd.bench.search import Point, take_turns
from syncd.bench.vector_set import Truth, VectorSet, truth
from syncd.bench.versus import FOLLOWED, HNSW, Build, Pair, Recalls, Turns, pair

FRESH = "fresh"
BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the table in transactions of ``BATCH_ROWS``, until the index has it; then VACUUM.

    ``settle_seconds``: from the end of the first measurement after the change until syncd builds
    nothing more.
    """

    engine: str
    updated: int
    deleted: int
    seconds: float
    rows_per_second: int
    settle_seconds: float
    vacuum_seconds: float


@dataclass(frozen=True, slots=True)
class Loss:
    """syncd at one target, at once after the change and settled, and a new index of the same rows.

    ``lost_recall``: recall of the new index minus that of the settled one.
    """

    setting: str
    fresh_recall: float
    at_once_recall: float
    settled_recall: float
    lost_recall: float
    fresh_p99_ms: float
    at_once_p99_ms: float
    settled_p99_ms: float


@dataclass(frozen=True, slots=True)
class ChurnReport:
    """The same settings before the change, at once after it, and after all builds and VACUUM.

    The last are measured in turn with a fresh build.
    """

    vectors: str
    rows: int
    dimension: int
    metric: str
    builds: list[Build]
    changes: list[Change]
    losses: list[Loss]
    before: list[Point]
    at_once: list[Point]
    settled: list[Point]
    fresh: list[Point]


def measure(
    where: Environment,
    vectors: VectorSet,
    *,
    deletes: float,
    recalls: list[float],
    client_number: int,
    turns: Turns,
) -> ChurnReport:
    """Index the first rows of the set, update a share of them and delete a share of the others.

    The updated rows get the vectors that follow in the set.
    """
    rows = vectors.rows
    updated, deleted = np.split(np.random.default_rng(0).permutation(rows) + 1, [vectors.spare])
    deleted = deleted[: int(rows * deletes)]
    vectors_after = np.array(vectors.base[:rows])
    vectors_after[updated - 1] = vectors.base[rows:]
    loaded = truth(vectors.base[:rows], vectors.queries, vectors.metric, track=where.track)
    changed = truth(
        vectors_after, vectors.queries, vectors.metric, track=where.track, gone=deleted - 1
    )
    where.create("samples", vectors.dimension)
    where.load("samples", vectors.blocks(rows))
    with (
        pair(where, vectors, rows, versus=turns.versus) as both,
        clients(client_number, vectors.queries) as searchers,
    ):
        measured = Recalls(searchers, loaded)
        engines, mine = list[Engine](), list[SyncdEngine]()
        with where.step("settings of equal recall"):
            for target in recalls:
                syncd = both.syncd(target)
                wanted = measured.of(syncd)
                mine.append(syncd)
                engines += [
                    syncd,
                    *(measured.bracket(both.pgvector, wanted)[-1:] if turns.versus else []),
                ]
        engines = list(dict.fromkeys(engines))
        before = take_turns(where, searchers, engines, measured, turns)
        tables = {"syncd": FOLLOWED} | ({"pgvector": HNSW} if turns.versus else {})
        spent = change_tables(where, list(tables.values()), updated, deleted)
        begun = time.perf_counter()
        with both.service.client() as client:
            client.wait(str(where.value("token")), timeout_ms=600_000)
        spent[FOLLOWED] += time.perf_counter() - begun
        at_once = measure_again(where, searchers, engines, changed, turns)
        begun = time.perf_counter()
        with where.step("syncd: until nothing is built"):
            both.service.wait_searchable(FOLLOWED, rows - len(deleted))
            both.service.settle()
        settle_seconds = {"syncd": time.perf_counter() - begun}
        changes = []
        for name, table in tables.items():
            begun = time.perf_counter()
            with where.step(f"VACUUM {table}"):
                where.run("vacuum", table=table)
            changes.append(
                Change(
                    name,
                    len(updated),
                    len(deleted),
                    round(spent[table], 2),
                    round((len(updated) + len(deleted)) / spent[table]),
                    round(settle_seconds.get(name, 0.0), 2),
                    round(time.perf_counter() - begun, 2),
                )
            )
        build_fresh(where, both, rows - len(deleted))
        others = [replace(engine, dataset=FRESH) for engine in dict.fromkeys(mine)]
        later = measure_again(where, searchers, [*engines, *others], changed, turns)
        settled, fresh = later[: len(engines)], later[len(engines) :]
        return ChurnReport(
            vectors.name,
            rows,
            vectors.dimension,
            vectors.metric,
            both.builds,
            changes,
            losses(fresh, at_once, settled),
            before,
            at_once,
            settled,
            fresh,
        )


def measure_again(
    where: Environment, searchers: Clients, engines: Sequence[Engine], exact: Truth, turns: Turns
) -> list[Point]:
    """Measure the engines on the current rows, with the recall of all before the first turn."""
    measured = Recalls(searchers, exact)
    for engine in engines:
        measured.of(engine)
    return take_turns(where, searchers, engines, measured, turns)


def build_fresh(where: Environment, both: Pair, rows: int) -> None:
    """Build a new index on a copy of the current table."""
    with where.step("a fresh build of the same rows"):
        where.run("create_table_like", table=FRESH)
        where.copy(FRESH)
        where.run("attach", [f"syncd_bench.{FRESH}", both.metric])
        both.service.wait_searchable(FRESH, rows)
        both.service.settle()


def losses(fresh: list[Point], at_once: list[Point], settled: list[Point]) -> list[Loss]:
    """One line for each of syncd's settings."""
    earlier, later = (
        {(one.engine, one.setting): one for one in points} for points in (at_once, settled)
    )
    return [
        Loss(
            one.setting,
            one.recall,
            earlier[one.engine, one.setting].recall,
            later[one.engine, one.setting].recall,
            round(one.recall - later[one.engine, one.setting].recall, 4),
            one.p99_ms,
            earlier[one.engine, one.setting].p99_ms,
            later[one.engine, one.setting].p99_ms,
        )
        for one in fresh
    ]


def change_tables(
    where: Environment, tables: list[str], updated: np.ndarray, deleted: np.ndarray
) -> dict[str, float]:
    """Change some rows in one table, then in the other, and return the seconds of each."""
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
