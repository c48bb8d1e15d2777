"""Filtered searches: recall and searches per second, compared with pgvector's iterative scan.

Each of two columns numbers the rows from 0, so that exactly ``n`` rows pass ``column < n``.
``independent`` numbers them in a random order, ``correlated`` by their distance to one row. The
rows that pass the second are around that row, which is near to some queries and far from others.
So the nearest quarter of the queries and the farthest quarter are measured separately.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from syncd.bench.clients import clients
from syncd.bench.engines import Below
from syncd.bench.environment import Columns, Environment
from syncd.bench.search import Comparison, Ladder, Point, choose, rate
from syncd.bench.vector_set import K, VectorSet, normalised, truth
from syncd.bench.versus import Build, Pair, Recalls, Turns, pair
from syncd.errors import SettingsError

ITERATIVE_SCAN = (0, 8)
"""The first version of pgvector that has an iterative scan."""
DEFAULT_EF_SEARCH = 40
"""pgvector's default, measured as well if its recall is sufficient.

The planner may choose another plan than the HNSW index at this value but not at a smaller one. That
plan may be faster.
"""
QUARTER = 4

Kind = Literal["independent", "near", "far"]


@dataclass(frozen=True, slots=True)
class FilteredPoint(Point):
    """One engine under one filter."""

    kind: Kind
    selectivity: float


@dataclass(frozen=True, slots=True)
class FilteredComparison(Comparison):
    """The rates under one filter."""

    kind: Kind
    selectivity: float


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of pgvector's searches under one filter."""

    kind: Kind
    selectivity: float
    setting: str
    plan: str


@dataclass(frozen=True, slots=True)
class FilterReport:
    """The vectors and the results of all filters."""

    vectors: str
    rows: int
    dimension: int
    metric: str
    k: int
    shared_buffers: str
    builds: list[Build]
    points: list[FilteredPoint]
    comparisons: list[FilteredComparison]
    plans: list[Plan]


def measure(
    where: Environment,
    vectors: VectorSet,
    *,
    selectivities: list[float],
    recall: float,
    client_numbers: list[int],
    turns: Turns,
) -> FilterReport:
    """Load and build; under each filter find settings of equal recall, and measure them in turn."""
    if turns.versus:
        check_iterative_scan(where)
    rows = len(vectors.base)
    vectors, columns = with_columns(vectors)
    points, comparisons, plans = list[FilteredPoint](), list[FilteredComparison](), list[Plan]()
    with (
        pair(where, vectors, rows, versus=turns.versus, columns=columns) as both,
        ExitStack() as stack,
    ):
        sets = [stack.enter_context(clients(number, vectors.queries)) for number in client_numbers]
        for column, kinds in asked(len(vectors.queries)).items():
            for selectivity in where.track(selectivities, f"filters on {column}"):
                below = Below(column, max(round(rows * selectivity), 1))
                gone = np.flatnonzero(columns[column] >= below.limit)
                exact = truth(
                    vectors.base, vectors.queries, vectors.metric, track=where.track, gone=gone
                )
                for kind, queries in kinds.items():
                    filtered = replace(both, filter=below)
                    asking = [searchers.asking(queries) for searchers in sets]
                    measured = Recalls(asking[-1], exact)
                    ladder = with_default(filtered, measured, choose(filtered, measured, [recall]))
                    found, compared = rate(where, asking, ladder, measured, turns)
                    points += [
                        FilteredPoint(**asdict(one), kind=kind, selectivity=selectivity)
                        for one in found
                    ]
                    comparisons += [
                        FilteredComparison(**asdict(one), kind=kind, selectivity=selectivity)
                        for one in compared
                    ]
                    query = vectors.queries[queries[0]]
                    plans += [
                        Plan(kind, selectivity, engine.setting, engine.plan(query))
                        for others in ladder.values()
                        for engine in others
                    ]
        return FilterReport(
            vectors.name,
            rows,
            vectors.dimension,
            vectors.metric,
            K,
            str(where.value("shared_buffers")),
            both.builds,
            points,
            comparisons,
            plans,
        )


def with_default(both: Pair, measured: Recalls, ladder: Ladder) -> Ladder:
    """The ladder, with pgvector's default ``ef_search`` if its recall is sufficient."""
    usual = both.pgvector(DEFAULT_EF_SEARCH)
    return {
        syncd: [*others, usual]
        if others and usual not in others and measured.of(usual) >= measured.of(syncd)
        else others
        for syncd, others in ladder.items()
    }


def check_iterative_scan(where: Environment) -> None:
    """Raise ``SettingsError`` if the server's pgvector has no iterative scan."""
    for (version,) in where.run("pgvector_version"):
        if tuple(map(int, str(version).split(".")[:2])) < ITERATIVE_SCAN:
            raise SettingsError(
                f"pgvector {version} has no iterative scan",
                hint="omit --versus, or: ALTER EXTENSION vector UPDATE",
            )


def with_columns(vectors: VectorSet) -> tuple[VectorSet, Columns]:
    """Vectors with ordered queries, and the columns of the rows.

    The queries are ordered by their distance to the row from which ``correlated`` is counted.
    """
    generator = np.random.default_rng(0)
    pivot = vectors.base[int(generator.integers(len(vectors.base)))][None].astype(np.float32)

    def distances(block: NDArray[np.float32]) -> NDArray[np.float32]:
        if vectors.metric == "cosine":
            return np.asarray(np.linalg.norm(normalised(block) - normalised(pivot), axis=1))
        return np.asarray(np.linalg.norm(block - pivot, axis=1))

    nearest_first = np.argsort(
        np.concatenate([distances(block) for block in vectors.blocks()]), kind="stable"
    )
    correlated = np.empty(len(nearest_first), dtype=np.int32)
    correlated[nearest_first] = np.arange(len(nearest_first))
    independent = generator.permutation(len(nearest_first)).astype(np.int32)
    ordered = vectors.queries[np.argsort(distances(vectors.queries), kind="stable")]
    return replace(vectors, queries=ordered, neighbors=None), {
        "independent": independent,
        "correlated": correlated,
    }


def asked(queries: int) -> dict[Literal["independent", "correlated"], dict[Kind, range]]:
    """Numbers of the queries for each column, in the order of ``with_columns``."""
    some = -(-queries // QUARTER)
    return {
        "independent": {"independent": range(queries)},
        "correlated": {"near": range(some), "far": range(queries - some, queries)},
    }
