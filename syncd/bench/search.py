"""Searches per second and their latency at a measured recall, compared with pgvector's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from syncd.bench.clients import Clients, Timing, clients
from syncd.bench.engines import Engine, PgvectorEngine
from syncd.bench.environment import Environment
from syncd.bench.reported import Reported, report, status_of
from syncd.bench.vector_set import K, Recall, VectorSet, truth
from syncd.bench.versus import Build, Pair, Recalls, Turns, pair
from syncd.types import RecallOf

Ladder = dict[Engine, list[PgvectorEngine]]
"""syncd at each recall target, with the settings of pgvector that have this recall or bracket it.
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One engine at one setting with some clients.

    The rate is the median of the rounds' rates; percentiles are over all searches of all rounds.
    ``recall_p5`` is the 5th percentile of the recall of single queries. ``client_us`` is the
    processor time that the client itself takes for a search, and ``client_share`` the share of the
    processor that all clients take; one client has one core at most.
    """

    engine: str
    setting: str
    clients: int
    recall: float
    recall_p5: float
    recall_queries: int
    qps: float
    p50_ms: float
    p99_ms: float
    client_us: float
    client_share: float


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
    """The vectors, the time to build, and the results.

    ``recall_of`` are the queries by which syncd chose its settings: ``queries`` that were asked, or
    ``rows`` if fewer than 200 were; null if every search is exact. ``held_back``: the recall is
    that of queries that were not asked before. ``measured_again``: syncd chose new settings while
    the rates were measured.
    """

    vectors: str
    rows: int
    dimension: int
    metric: str
    intrinsic_dimension: float | None
    k: int
    shared_buffers: str
    recall_of: RecallOf | None
    held_back: bool
    measured_again: bool
    builds: list[Build]
    reported: list[Reported]
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
        together = sum(client_numbers)
        sets = [
            stack.enter_context(clients(number, vectors.queries, together))
            for number in client_numbers
        ]
        measured, reported = report(both, sets[-1], exact, recalls)
        asking = [searchers.asking(measured.searchers.queries) for searchers in sets]
        ladder = choose(both, measured, recalls)
        before = status_of(both)
        points, comparisons = rate(where, asking, ladder, measured, turns)
        after = status_of(both)
        return SearchReport(
            vectors.name,
            len(vectors.base),
            vectors.dimension,
            vectors.metric,
            exact.intrinsic_dimension(),
            K,
            str(where.value("shared_buffers")),
            before.recall_of if both.approximate else None,
            len(measured.searchers.queries) < len(vectors.queries),
            (before.recall, before.recall_p5) != (after.recall, after.recall_p5),
            both.builds,
            reported,
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
    found: dict[Engine, list[Timing]] = {engine: [] for engine in engines}
    for _ in where.track(range(turns.rounds), f"{searchers.number} clients"):
        for engine in engines:
            found[engine].append(searchers.search(engine, turns.seconds))
    return [point(engine, measured.measured(engine), found[engine]) for engine in engines]


def point(engine: Engine, recall: Recall, rounds: list[Timing]) -> Point:
    """One engine's rounds, taken together."""
    latencies = np.concatenate([each.latencies for each in rounds])
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return Point(
        engine.name,
        engine.setting,
        rounds[0].clients,
        recall.mean,
        recall.p5,
        recall.queries,
        round(float(np.median([each.qps for each in rounds])), 1),
        round(float(p50), 3),
        round(float(p99), 3),
        round(sum(each.cpu_seconds for each in rounds) / len(latencies) * 1e6, 1),
        round(float(np.median([each.share for each in rounds])), 3),
    )


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
