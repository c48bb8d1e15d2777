"""Which settings of the codes give which recall: measured on the dataset's own rows, chosen by what
they cost.

Some live rows serve as queries, each left out of its own answer. Their exact neighbours are
computed once; then lists are probed in growing numbers, and for each number of candidates the
recall follows from one search. What is kept are the settings that no other beats in both recall and
cost. A recall that none of them reaches is answered by exact search.

The best of many noisy measurements tends to be a lucky one. So settings are chosen by a bound below
the mean over some of the rows, and the recall that is reported is the mean over others, which had
no part in the choice but to forbid it.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

KS = (10, 40, 100, 1000)
"""Recall is measured for these k; a search for fewer rows uses the settings of the next one above,
a search for more than all is exact.
"""

EXACT_NS_PER_ELEMENT = 0.15
"""One dimension of one row in an exact search, 20k rows of 128: 0.37 ms."""
SCAN_NS_PER_CODE = 0.035
"""One 4-bit code in a list that is probed: 0.29 ms for 64 of 1024 lists of a million rows with 64
codes each.
"""
RERANK_NS = 250.0
RERANK_NS_PER_ELEMENT = 2.5
"""One candidate, and each of its dimensions: the row is somewhere in memory, and often not in the
cache.
"""


class Point(msgspec.Struct, frozen=True, array_like=True):
    """Settings with the recall@k they had: ``bound`` is two standard errors below the mean over the
    rows that they are chosen by, ``recall`` the mean over other rows.
    """

    k: int
    nprobe: int
    candidates: int
    bound: float
    recall: float
    cost_us: float

    @property
    def promised(self) -> float:
        """The recall that may be counted on."""
        return min(self.bound, self.recall)


class Calibration(msgspec.Struct, frozen=True):
    """What was measured, when the dataset had ``rows`` live rows and ``slots`` slots; for each k
    the cheapest points come first.

    ``whole``: for every k, and not only in haste for the first.
    """

    rows: int
    slots: int
    points: tuple[Point, ...]
    whole: bool = True

    def choose(self, k: int, recall: float) -> Point | None:
        """The cheapest settings with which ``k`` rows are found at this recall; None where only
        exact search does.
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
    """The points that no cheaper one reaches, in the order of cost."""
    kept: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.cost_us):
        of_this_k = kept.setdefault(point.k, [])
        if not of_this_k or point.promised > of_this_k[-1].promised:
            of_this_k.append(point)
    return tuple(point for k in sorted(kept) for point in kept[k])


def cost_us(*, rows: int, dim: int, codes: int, lists: int, nprobe: int, candidates: int) -> float:
    """What a search is expected to cost one thread, in µs, the exact part left out: centroids,
    lists, candidates.
    """
    nanoseconds = (
        lists * dim * EXACT_NS_PER_ELEMENT + rows / lists * nprobe * codes * SCAN_NS_PER_CODE * 2
    )
    return nanoseconds / 1000 + rerank_us(candidates, dim)


def rerank_us(candidates: int, dim: int) -> float:
    """The part of it for comparing so many rows themselves."""
    return candidates * (RERANK_NS + dim * RERANK_NS_PER_ELEMENT) / 1000
