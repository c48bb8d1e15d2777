"""Filtered searches: recall and searches per second, compared with pgvector's iterative scan.

Each of two columns numbers the rows from 0, so that exactly ``n`` rows pass ``column < n``.
``independent`` numbers them in a random order, ``correlated`` by their distance to one row. The
rows that pass the second are around that row, which is near to some queries and far from others.
So the nearest quarter of the queries and the farthest quarter are measured separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from syncd.bench.clients import Clients, clients
from syncd.bench.engines import Below
from syncd.bench.environment import Columns, Environment
from syncd.bench.reported import halves, queries_known, status_of
from syncd.bench.search import Comparison, Ladder, Point, choose, rate
from syncd.bench.vector_set import K, VectorSet, normalised, truth
from syncd.bench.versus import Build, Pair, Recalls, Turns, pair
from syncd.errors import SettingsError
from syncd.types import RecallOf

ITERATIVE_SCAN = (0, 8)
"""The first version of pgvector that has an iterative scan."""
DEFAULT_EF_SEARCH = 40
"""pgvector's default, measured as well if its recall is sufficient.

The planner may choose another plan than the HNSW index at this value but not at a smaller one. That
plan may be faster.
"""
QUARTER = 4
TURNS = 20
"""Turns in which the queries are asked first.

In one turn all filters together ask 150 of 1,000 queries, with four selectivities.
"""

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
    """The vectors and the results of all filters.

    ``recall_of`` and ``held_back`` are those of ``SearchReport``.
    """

    vectors: str
    rows: int
    dimension: int
    metric: str
    k: int
    shared_buffers: str
    recall_of: RecallOf | None
    held_back: bool
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
        together = sum(client_numbers)
        sets = [
            stack.enter_context(clients(number, vectors.queries, together))
            for number in client_numbers
        ]
        first, held_back = halves(both, len(vectors.queries))
        kinds_of = asked(len(vectors.queries))
        filters = {
            (column, selectivity): Below(column, max(round(rows * selectivity), 1))
            for column in kinds_of
            for selectivity in selectivities
        }
        if both.approximate:
            with where.step("syncd: recall of the queries"):
                have_filters_measured(
                    both,
                    sets[-1],
                    [
                        (below, queries[first])
                        for (column, _), below in filters.items()
                        for queries in kinds_of[column].values()
                    ],
                    recall,
                )
        recall_of = status_of(both).recall_of if both.approximate else None
        for column, kinds in kinds_of.items():
            for selectivity in where.track(selectivities, f"filters on {column}"):
                below = filters[column, selectivity]
                gone = np.flatnonzero(columns[column] >= below.limit)
                exact = truth(
                    vectors.base, vectors.queries, vectors.metric, track=where.track, gone=gone
                )
                for kind, queries in kinds.items():
                    filtered = replace(both, filter=below)
                    asking = [searchers.asking(queries[held_back]) for searchers in sets]
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
                    query = vectors.queries[queries[held_back][0]]
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
            recall_of,
            first != held_back,
            both.builds,
            points,
            comparisons,
            plans,
        )


def have_filters_measured(
    both: Pair, searchers: Clients, filters: Sequence[tuple[Below, range]], recall: float
) -> None:
    """Ask queries under each filter, and return when syncd has chosen its settings for them.

    The filters take turns, since syncd measures soon after the first 200 queries, whatever their
    filters are, and then not again for some minutes.
    """
    for turn in range(TURNS):
        for below, queries in filters:
            searchers.asking(queries[turn::TURNS]).answers(
                replace(both, filter=below).syncd(recall)
            )
    queries_known(both)


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
