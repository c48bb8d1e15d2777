"""The settings of the codes, with the recall measured for each and its expected cost.

Queries of several kinds are asked; a row that serves as a query is left out of its own answer.
Their exact neighbors are computed once. Then growing numbers of lists are probed, and one search
gives the recall for each number of candidates. Invariants: the kind with the lowest recall counts;
only those settings are kept that no other setting beats in both recall and cost. If no setting
reaches a recall, exact search answers.

The best of many noisy measurements is often a lucky one. So settings are chosen by a lower bound of
the mean over some of the queries. The mean over the other queries can only reject a choice.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from syncd.types import RecallOf

VERSION = 2
"""Number of the way in which recall is measured.

In the way 0, rows alone were the queries. In the way 1, each query searched the same number of
lists. Codes that were saved with another number are measured again.
"""

KS = (10, 40, 100, 1000)
"""Values of k for which recall is measured.

A search for fewer rows uses the settings of the next larger k; above the largest, search is exact.
"""

EXACT_NS_PER_ELEMENT = 0.15
"""Cost of one dimension of one row in an exact search (measured: 20k rows of 128 in 0.37 ms)."""
SCAN_NS_PER_CODE = 0.03
"""Cost of one 4-bit code of a row in a searched list.

Measured: 0.037 ns for a million rows with 64 codes, of which a part is in the cache; 0.018 ns for
half a million.
"""
LIST_NS = 400.0
"""Cost of each searched list, in addition to its rows."""
CHOICE_NS = 100.0
"""Cost of each list among the nearest that a query may search: they are sorted."""
RERANK_NS = 250.0
RERANK_NS_PER_ELEMENT = 2.5
"""Cost of one candidate, and of each of its dimensions.

The row may be anywhere in memory, and is often not in the cache.
"""


class Point(msgspec.Struct, frozen=True, array_like=True):
    """Settings, and the recall@k measured with them.

    A query searches at most ``nprobe`` lists: those at most ``reach`` times as far as its nearest
    lists are on average (``lists_within``); all of them if ``reach`` is None.

    ``bound`` is the lowest of each kind of queries: two standard errors below the mean over the
    queries that choose the settings, or the mean over the others if that is lower. ``recall`` and
    ``p5`` are the mean and the 5th percentile over all queries of the kind that is reported.
    """

    k: int
    nprobe: int
    candidates: int
    bound: float
    recall: float
    cost_us: float
    p5: float | None = None
    """None: measured by an earlier version."""
    reach: float | None = None

    @property
    def promised(self) -> float:
        """The recall to rely on: the lower of both."""
        return min(self.bound, self.recall)


class Calibration(msgspec.Struct, frozen=True):
    """The measured points of a dataset, when it had ``rows`` live rows and ``slots`` slots.

    For each k the cheapest points come first. ``whole`` is false if only the first k was measured
    yet, quickly. ``of`` says which queries the reported recall is of. ``filtered`` is the largest
    recall at which the codes answer searches with a filter.
    """

    rows: int
    slots: int
    points: tuple[Point, ...]
    whole: bool = True
    of: RecallOf = "rows"
    version: int = 0
    filtered: float = 1.0

    def choose(self, k: int, recall: float) -> Point | None:
        """The cheapest settings that find ``k`` rows at this recall; None if only exact search
        does.
        """
        for wanted in KS:
            if k <= wanted:
                return next(
                    (
                        point
                        for point in self.points
                        if point.k == wanted and point.promised >= recall
                    ),
                    None,
                )
        return None


def frontier(points: Iterable[Point]) -> tuple[Point, ...]:
    """For each k the points that no cheaper point equals in recall, in order of cost."""
    kept: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.cost_us):
        of_this_k = kept.setdefault(point.k, [])
        if not of_this_k or point.promised > of_this_k[-1].promised:
            of_this_k.append(point)
    return tuple(point for k in sorted(kept) for point in kept[k])


def cost_us(
    *,
    dim: int,
    codes: int,
    lists: int,
    nprobe: int,
    searched_lists: float,
    searched_rows: float,
    candidates: int,
) -> float:
    """Expected time of a search in one thread, in µs: centroids, lists and candidates.

    ``searched_lists`` and ``searched_rows`` are means over queries. The exact search of the tail is
    not included.
    """
    nanoseconds = (
        lists * dim * EXACT_NS_PER_ELEMENT
        + nprobe * CHOICE_NS
        + searched_lists * LIST_NS
        + searched_rows * codes * SCAN_NS_PER_CODE
    )
    return nanoseconds / 1000 + rerank_us(candidates, dim)


def rerank_us(candidates: int, dim: int) -> float:
    """The part of ``cost_us`` for comparing this many candidates exactly."""
    return candidates * (RERANK_NS + dim * RERANK_NS_PER_ELEMENT) / 1000
