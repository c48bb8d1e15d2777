"""Searches per second and their latency at a measured recall, compared with pgvector's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from syncd.bench.clients import Clients, clients
from syncd.bench.engines import Engine, PgvectorEngine
from syncd.bench.environment import Environment
from syncd.bench.vector_set import K, VectorSet, truth
from syncd.bench.versus import Build, Pair, Recalls, Turns, pair

Ladder = dict[Engine, list[PgvectorEngine]]
"""syncd at each recall target, with the settings of pgvector that have this recall or bracket it.
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One engine at one setting with some clients.

    The rate is the median of the rounds' rates; percentiles are over all searches of all rounds.
    """

    engine: str
    setting: str
    clients: int
    recall: float
    recall_queries: int
    qps: float
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Searches per second at one recall.

    pgvector's are measured at the settings whose recall is the same or next to it.
    """

    setting: str
    clients: int
    recall: float
    syncd_qps: float
    pgvector_setting: str
    pgvector_recall: str
    pgvector_qps: float
    ratio: float


@dataclass(frozen=True, slots=True)
class SearchReport:
    """The vectors, the time to build, and the results."""

    vectors: str
    rows: int
    dimension: int
    metric: str
    intrinsic_dimension: float | None
    k: int
    shared_buffers: str
    builds: list[Build]
    points: list[Point]
    comparisons: list[Comparison]


def measure(
    where: Environment,
    vectors: VectorSet,
    *,
    recalls: list[float],
    client_numbers: list[int],
    turns: Turns,
) -> SearchReport:
    """Load, build, find the settings of equal recall, and measure them in turn in each round."""
    exact = truth(
        vectors.base,
        vectors.queries,
        vectors.metric,
        track=where.track,
        neighbors=vectors.neighbors,
    )
    with pair(where, vectors, len(vectors.base), versus=turns.versus) as both, ExitStack() as stack:
        sets = [stack.enter_context(clients(number, vectors.queries)) for number in client_numbers]
        measured = Recalls(sets[-1], exact)
        if both.index == "codes":
            with where.step("syncd: recall of the queries"):
                have_queries_measured(both, sets[-1], max(recalls))
        ladder = choose(both, measured, recalls)
        points, comparisons = rate(where, sets, ladder, measured, turns)
        return SearchReport(
            vectors.name,
            len(vectors.base),
            vectors.dimension,
            vectors.metric,
            exact.intrinsic_dimension(),
            K,
            str(where.value("shared_buffers")),
            both.builds,
            points,
            comparisons,
        )


def rate(
    where: Environment, sets: list[Clients], ladder: Ladder, measured: Recalls, turns: Turns
) -> tuple[list[Point], list[Comparison]]:
    """Measure all engines of the ladder in turn, in each round, with each set of clients."""
    engines: list[Engine] = list(
        dict.fromkeys(engine for syncd, others in ladder.items() for engine in (syncd, *others))
    )
    points = [
        point
        for searchers in sets
        for point in take_turns(where, searchers, engines, measured, turns)
    ]
    return points, compare(ladder, points)


def have_queries_measured(both: Pair, searchers: Clients, recall: float) -> None:
    """Ask every query once, and return when syncd has chosen its settings for them.

    Otherwise recall would be measured with other settings than the rates.
    """
    searchers.answers(both.syncd(recall))
    both.service.settle()


def choose(both: Pair, measured: Recalls, recalls: list[float]) -> Ladder:
    """The ladder: syncd at each target, and settings of pgvector with measured recall around it."""
    ladder: Ladder = {}
    with both.where.step("settings of equal recall"):
        for target in recalls:
            engine = both.syncd(target)
            wanted = measured.of(engine)
            ladder[engine] = measured.bracket(both.pgvector, wanted) if both.versus else []
    return ladder


def take_turns(
    where: Environment,
    searchers: Clients,
    engines: Sequence[Engine],
    measured: Recalls,
    turns: Turns,
) -> list[Point]:
    """Measure every engine in turn, in each round, so that changes of the machine affect all."""
    rates: dict[Engine, list[float]] = {engine: [] for engine in engines}
    latencies: dict[Engine, list[float]] = {engine: [] for engine in engines}
    for _ in where.track(range(turns.rounds), f"{searchers.number} clients"):
        for engine in engines:
            timing = searchers.search(engine, turns.seconds)
            rates[engine].append(timing.qps)
            latencies[engine] += timing.latencies.tolist()
    return [
        Point(
            engine.name,
            engine.setting,
            searchers.number,
            measured.of(engine),
            measured.queries(engine),
            round(float(np.median(rates[engine])), 1),
            *(
                round(float(value), 3)
                for value in np.percentile(latencies[engine], [50, 99]) * 1000
            ),
        )
        for engine in engines
    ]


def compare(ladder: Ladder, points: list[Point]) -> list[Comparison]:
    """One comparison for each of syncd's points that has settings of pgvector."""
    by_setting = {(point.engine, point.setting, point.clients): point for point in points}
    return [
        comparison(mine, [by_setting[other.name, other.setting, number] for other in others])
        for number in dict.fromkeys(point.clients for point in points)
        for engine, others in ladder.items()
        if others
        for mine in [by_setting[engine.name, engine.setting, number]]
    ]


def comparison(mine: Point, others: list[Point]) -> Comparison:
    """Compare with pgvector's best rate at this recall or a higher one.

    Between a setting below and one above, a rate is interpolated by recall; the better one counts.
    """
    below = [other for other in others if other.recall < mine.recall][-1:]
    enough = [other for other in others if other.recall >= mine.recall]
    qps = max(other.qps for other in enough or below)
    if below and enough:
        recalls, rates = zip(*((one.recall, one.qps) for one in (below[0], enough[0])), strict=True)
        qps = max(qps, float(np.interp(mine.recall, recalls, rates)))
    return Comparison(
        mine.setting,
        mine.clients,
        mine.recall,
        mine.qps,
        " to ".join(other.setting for other in others),
        " to ".join(f"{other.recall:g}" for other in others),
        round(qps, 1),
        round(mine.qps / qps, 2),
    )
