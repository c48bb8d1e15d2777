"""Measures the recall of the codes with each setting: rows serve as queries, compared exactly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from syncd.index.build.neighbors import nearest_others
from syncd.index.codes.calibration import (
    EXACT_NS_PER_ELEMENT,
    KS,
    Calibration,
    Point,
    cost_us,
    frontier,
)
from syncd.index.codes.codes import Codes, LiveCodes
from syncd.index.rows.vectors import Vectors
from syncd.index.search.approximate import exact_distances
from syncd.index.search.exact import Distances, use_one_thread
from syncd.index.storage.bitmap import Slots, live_slots
from syncd.index.storage.stopping import Cancelled, Stop
from syncd.index.view import View

QUERIES = {10: 600, 40: 250, 100: 150, 1000: 45}
"""Number of rows that serve as queries, for each k.

For a larger k one query says more about recall, and takes longer.
"""
QUERIES_IN_HASTE = 200
"""Number of queries for the first measurement, of the first k only.

It takes a fifth of the time, so new codes can be used soon. With so few queries the lower bound of
the mean is a little lower.
"""
CHOOSING = 2 / 3
"""Share of the queries that choose the settings; the others only confirm."""
CANDIDATES = {
    10: (20, 40, 70, 100, 150, 200, 300, 400),
    40: (60, 80, 120, 160, 250, 400, 700),
    100: (150, 200, 300, 400, 700, 1000, 1600),
    1000: (1300, 1600, 2000, 3000, 4500, 7000),
}
QUERIES_AT_ONCE = 100
"""Queries per call: together they take half of the time of single calls."""
NPROBE_STEP = 1.35
ENOUGH = 0.999
CHEAPER_THAN_EXACT = 0.7
"""Largest cost of settings that are used, as a share of an exact search."""

_TIE = 1e-6


def calibrate(
    view: View, codes: Codes, seed: int, stop: Stop, *, in_haste: bool = False
) -> Calibration:
    """The settings worth using with ``codes``, measured on ``view``; raises ``Cancelled``.

    ``in_haste`` measures quickly, and only the first k.
    """
    use_one_thread()
    slots = live_slots(view.live.bits, view.count)
    if slots.size < 2:
        return Calibration(view.live.count, view.count, ())
    slots = np.random.default_rng(seed).permutation(slots)[
        : QUERIES_IN_HASTE if in_haste else max(QUERIES.values())
    ]
    queries = np.ascontiguousarray(view.compared_rows(slots))
    live = LiveCodes(codes, view.live.bits)
    if in_haste:
        exact = nearest_others(view, queries, slots, KS[0] + 1, stop)
        points = _measure(view, live, queries, slots, exact, KS[0], stop)
        return Calibration(view.live.count, view.count, frontier(points), whole=False)
    few = QUERIES[KS[-1]]
    exact = nearest_others(view, queries, slots, KS[-2] + 1, stop)
    exact_of_few = nearest_others(view, queries[:few], slots[:few], KS[-1] + 1, stop)
    points = []
    for k in KS:
        points += _measure(
            view,
            live,
            queries[: QUERIES[k]],
            slots,
            exact_of_few if k == KS[-1] else exact,
            k,
            stop,
        )
    return Calibration(view.live.count, view.count, frontier(points))


def _measure(
    view: View,
    live: LiveCodes,
    queries: Vectors,
    own: Slots,
    exact: tuple[Distances, Slots],
    k: int,
    stop: Stop,
) -> list[Point]:
    """The settings for one k, with growing numbers of lists.

    It ends when settings are no longer cheaper than an exact search, or find everything.
    """
    codebook, dim = live.codes.codebook, view.dim or 1
    most_us = CHEAPER_THAN_EXACT * view.live.count * dim * EXACT_NS_PER_ELEMENT / 1000
    choosing = max(1, int(CHOOSING * len(queries)))
    points: list[Point] = []
    nprobe = max(1, codebook.lists // 128)
    while True:
        shares = _shares(view, live, queries, own, exact, k, nprobe, stop)
        cheap = False
        for column, candidates in enumerate(CANDIDATES[k]):
            us = cost_us(
                rows=view.live.count,
                dim=dim,
                codes=int(codebook.template.pq.M),
                lists=codebook.lists,
                nprobe=nprobe,
                candidates=candidates,
            )
            if us > most_us:
                break
            cheap = True
            chosen_by, others = shares[:choosing, column], shares[choosing:, column]
            bound = float(chosen_by.mean() - 2 * chosen_by.std() / np.sqrt(len(chosen_by)))
            recall = float(others.mean()) if len(others) else bound
            points.append(Point(k, nprobe, candidates, bound, recall, us))
        if not cheap or nprobe >= codebook.lists or shares[:, -1].mean() >= ENOUGH:
            return points
        nprobe = min(codebook.lists, max(nprobe + 1, int(nprobe * NPROBE_STEP)))


def _shares(
    view: View,
    live: LiveCodes,
    queries: Vectors,
    own: Slots,
    exact: tuple[Distances, Slots],
    k: int,
    nprobe: int,
    stop: Stop,
) -> NDArray[np.float64]:
    """Recall@k of each query with each number of candidates, (q, candidates).

    One search serves all numbers: fewer candidates are the first of more.
    """
    numbers = np.array(CANDIDATES[k])
    setting = Point(k, nprobe, int(numbers[-1]) + 1, 0.0, 0.0, 0.0)
    shares = np.ones((len(queries), len(numbers)))
    sought = np.zeros(view.count, dtype=np.bool_)
    for row, query in enumerate(queries):
        if row % QUERIES_AT_ONCE == 0:
            if stop():
                raise Cancelled
            found = live.candidates(queries[row : row + QUERIES_AT_ONCE], setting)
        distances, slots = exact[0][row], exact[1][row]
        wanted = min(k, int(np.count_nonzero(slots >= 0)))
        if not wanted:
            continue
        approximate, labels = (each[row % QUERIES_AT_ONCE] for each in found)
        if len(live.codes.parts) > 1:  # one part returns them in this order
            labels = labels[
                (approximate if view.format.metric == "l2" else -approximate).argsort(kind="stable")
            ]
        # The query itself does not count as an answer.
        near = labels[(labels >= 0) & (labels != own[row])][: numbers[-1]]
        limit = distances[wanted - 1] + _TIE * abs(distances[wanted - 1])
        # Among rows at the same distance, any is correct.
        if wanted < distances.size and distances[wanted] <= limit:
            good = exact_distances(view, query, near) <= limit
        else:
            sought[slots[:wanted]] = True
            good = sought[near]
            sought[slots[:wanted]] = False
        among = np.concatenate(([0], np.cumsum(good)))[np.minimum(numbers, near.size)]
        in_tail = np.count_nonzero(slots[:wanted] >= live.codes.stop)
        shares[row] = np.minimum(among + in_tail, wanted) / wanted
    return shares
