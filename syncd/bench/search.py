"""Searches a second and their latency at a measured recall, beside pgvector's at the same."""

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
"""syncd at each target, and for each the settings of pgvector whose recall is the same or on either
side.
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One engine at one setting with some clients: medians of the rounds' rates, percentiles over
    all their searches.
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
    """Searches a second at one recall, pgvector's by the settings whose measured recall is the same
    or next to it.
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
    """What was searched, how long building took, and how it answered."""

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
    """Load, build, find the settings of equal recall, and let them take turns in each round."""
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
    """Let all that is on the ladder take turns in each round, with each set of clients."""
    engines: list[Engine] = list(
        dict.fromkeys(engine for syncd, others in ladder.items() for engine in (syncd, *others))
    )
    points = [
        point
        for searchers in sets
        for point in take_turns(where, searchers, engines, measured, turns)
    ]
    return points, compare(ladder, points)


def choose(both: Pair, measured: Recalls, recalls: list[float]) -> Ladder:
    """syncd at each target, and for each the settings of pgvector that measure the same recall or
    bracket it.
    """
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
    """Every engine in turn, in each round, so that all meet the same machine."""
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
    """One line for each of syncd's points that has others to compare with."""
    by_setting = {(point.engine, point.setting, point.clients): point for point in points}
    return [
        comparison(mine, [by_setting[other.name, other.setting, number] for other in others])
        for number in dict.fromkeys(point.clients for point in points)
        for engine, others in ladder.items()
        if others
        for mine in [by_setting[engine.name, engine.setting, number]]
    ]


def comparison(mine: Point, others: list[Point]) -> Comparison:
    """pgvector's best rate at this recall or a higher one, or what is interpolated by recall from
    the setting below to the one above.
    """
    below = [other for other in others if other.recall < mine.recall][-1:]
    enough = [other for other in others if other.recall >= mine.recall]
    qps = max(other.qps for other in enough or below)
    if below and enough:
        pair = (below[0], enough[0])
        qps = max(
            qps,
            float(
                np.interp(
                    mine.recall, [other.recall for other in pair], [other.qps for other in pair]
                )
            ),
        )
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
