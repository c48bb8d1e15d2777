"""Measures the recall of the codes with each setting: queries of several kinds, compared exactly.

Rows alone overstate recall if real queries are unlike them. So two more kinds are made of rows
until enough real queries were asked; the promise is kept for the hardest kind. Then the real
queries are measured in their place, and the harder of rows and real queries counts.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from syncd.cores import available_cores
from syncd.index.asked import Sample
from syncd.index.build.neighbors import nearest_others
from syncd.index.codes.calibration import (
    EXACT_NS_PER_ELEMENT,
    KS,
    VERSION,
    Calibration,
    Point,
    cost_us,
    frontier,
)
from syncd.index.codes.codes import Codes, LiveCodes, lists_within, padded
from syncd.index.rows.vectors import Vectors
from syncd.index.search.approximate import exact_distances
from syncd.index.search.exact import Distances, use_one_thread
from syncd.index.storage.bitmap import Slots, live_slots
from syncd.index.storage.stopping import Cancelled, Stop
from syncd.index.view import View
from syncd.types import RecallOf

QUERIES = {10: 450, 40: 180, 100: 100, 1000: 30}
"""Number of queries of each kind, for each k.

For a larger k one query says more about recall, and takes longer.
"""
QUERIES_IN_HASTE = 100
"""Number of queries of each kind for the first measurement, of the first k only.

It takes a fifth of the time, so new codes can be used soon. With so few queries the lower bound of
the mean is a little lower.
"""
NOISE = 1.35
"""Noise that makes a query of a row, in standard deviations of the rows in each dimension.

Measured on 60,000 embeddings of text, with real queries of another kind: for 0.95, the settings
that noise of 1.0, 1.25 and 1.35 chooses reach 0.949, 0.927 to 0.978, and 0.953 to 0.996. Rows
alone choose settings that reach 0.883.
"""
CHOOSING = 2 / 3
"""Share of the queries that choose the settings; the others only confirm."""
CANDIDATES = {
    10: (20, 40, 70, 100, 150, 200, 300, 400, 600, 900, 1500, 2500, 4000),
    40: (60, 80, 120, 160, 250, 400, 700),
    100: (150, 200, 300, 400, 700, 1000, 1600),
    1000: (1300, 1600, 2000, 3000, 4500, 7000),
}
QUERIES_AT_ONCE = 100
"""Queries per call: together they take half of the time of single calls."""
NPROBE_STEP = 1.35
NPROBE_STEP_IN_HASTE = 1.8
"""Factor between two numbers of lists that are measured.

The large numbers take most of the time: with fewer steps the first measurement takes 0.6 of it.
"""
THREADS_IN_HASTE = 2
"""Most threads of the first measurement: the dataset waits for it, and readings have ended.

Each thread has its own queries. FAISS's own threads wait for each other, and take twice the
processor when other programs need a core.
"""
MOST_LISTS = 2.2
"""Most lists that one query searches, as a factor of the mean over queries."""
REACHES = (0.5, 16.0)
"""The least and the largest ``Point.reach``."""
REACH_STEPS = 20
REACH_QUERIES = 100
"""Queries of each kind whose distances to the lists choose the reach."""
ENOUGH = 0.999
CHEAPER_THAN_EXACT = 0.7
"""Largest cost of settings that are used, as a share of an exact search."""

_TIE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """Queries (n, dim) of one kind, in random order.

    ``own`` (n,) are the slots that are left out of the answers; -1: none.
    """

    queries: Vectors
    own: Slots
    exact: tuple[Distances, Slots] | None = None
    """The true neighbors; None: not computed yet."""

    def first(self, count: int) -> Queries:
        """The first ``count`` of these queries."""
        return self.part(slice(count))

    def part(self, some: slice) -> Queries:
        """Some of these queries."""
        exact = self.exact
        return Queries(
            self.queries[some],
            self.own[some],
            None if exact is None else (exact[0][some], exact[1][some]),
        )


def calibrate(
    view: View,
    codes: Codes,
    seed: int,
    stop: Stop,
    *,
    sample: Sample | None = None,
    in_haste: bool = False,
) -> Calibration:
    """The settings worth using with ``codes``, measured on ``view``; raises ``Cancelled``.

    ``sample`` are real queries. ``in_haste`` measures quickly, and only the first k.
    """
    use_one_thread()
    of: RecallOf = "rows" if sample is None else "queries"
    calibration = partial(
        Calibration, view.live.count, view.count, whole=not in_haste, of=of, version=VERSION
    )
    slots = live_slots(view.live.bits, view.count)
    if slots.size < 2:
        return calibration((), whole=True)
    random = np.random.default_rng(seed)
    wanted = QUERIES_IN_HASTE if in_haste else max(QUERIES.values())
    kinds = [rows_as_queries(view, random.permutation(slots)[:wanted])]
    if sample is None:
        kinds += [_noisy(view, slots, wanted, random), _between(view, slots, wanted, random)]
    else:
        kinds.append(real_queries(view, sample).first(wanted))
    live = LiveCodes(codes, view.live.bits)
    threads = min(THREADS_IN_HASTE, available_cores()) if in_haste else 1
    with ThreadPoolExecutor(threads, "syncd-measure", initializer=use_one_thread) as pool:
        measure = _Measurement(view, live, of, stop, in_haste, threads, pool)
        if in_haste:
            return calibration(frontier(measure.points(measure.with_exact(kinds, KS[0]), KS[0])))
        few = measure.with_exact([each.first(QUERIES[KS[-1]]) for each in kinds], KS[-1])
        kinds = measure.with_exact(kinds, KS[-2])
        points = []
        for k in KS:
            asked = few if k == KS[-1] else [each.first(QUERIES[k]) for each in kinds]
            points += measure.points(asked, k)
    return calibration(frontier(points))


def rows_as_queries(view: View, slots: Slots) -> Queries:
    """The rows of ``slots``, each left out of its own answer."""
    return Queries(np.ascontiguousarray(view.compared_rows(slots)), slots)


def real_queries(view: View, sample: Sample) -> Queries:
    """The queries of a sample, without their filters."""
    own = np.full(len(sample), -1, dtype=np.int64)
    places = [place for place, key in enumerate(sample.own) if key is not None]
    if places:
        own[places] = view.find([key for key in sample.own if key is not None])
    return Queries(np.ascontiguousarray(view.format.queries(sample.queries)), own)


def _noisy(view: View, slots: Slots, count: int, random: np.random.Generator) -> Queries:
    """Rows with ``NOISE``: they stand for queries of another kind than the rows."""
    rows = view.compared_rows(random.choice(slots, count))
    noise = random.standard_normal(rows.shape, dtype=np.float32) * rows.std(axis=0)
    return _made(view, rows, rows + np.float32(NOISE) * noise)


def _between(view: View, slots: Slots, count: int, random: np.random.Generator) -> Queries:
    """Midpoints of two rows: they stand for queries without near copies.

    Measured on 15,000 rows of SIFT with nine near copies each, and real queries with none, for
    0.95: rows alone choose settings that reach 0.58, with noise 0.86, and with midpoints 0.99.
    """
    rows = view.compared_rows(random.choice(slots, count))
    return _made(
        view, rows, (rows + view.compared_rows(random.choice(slots, count))) * np.float32(0.5)
    )


def _made(view: View, rows: Vectors, queries: Vectors) -> Queries:
    """Queries made of ``rows``, as long as those."""
    norms = np.linalg.norm(queries, axis=1, keepdims=True)
    norms[norms == 0] = 1
    scaled = queries * (np.linalg.norm(rows, axis=1, keepdims=True) / norms)
    finite = np.isfinite(scaled).all(axis=1, keepdims=True)
    queries = view.format.queries(np.where(finite, scaled, rows).astype(np.float32))
    return Queries(np.ascontiguousarray(queries), np.full(len(rows), -1, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class _Measurement:
    """One measurement of a view with codes, in some threads of a pool."""

    view: View
    live: LiveCodes
    of: RecallOf
    stop: Stop
    in_haste: bool
    threads: int
    pool: ThreadPoolExecutor

    def with_exact(self, kinds: list[Queries], k: int) -> list[Queries]:
        """The same queries with their true neighbors, from one reading of the rows per thread."""
        queries = np.concatenate([each.queries for each in kinds])
        own = np.concatenate([each.own for each in kinds])
        found = self.pool.map(
            lambda some: nearest_others(self.view, queries[some], own[some], k + 1, self.stop),
            self.shares_of(len(queries)),
        )
        distances, slots = (np.concatenate(each) for each in zip(*found, strict=True))
        answered, start = [], 0
        for each in kinds:
            end = start + len(each.queries)
            exact = (distances[start:end], slots[start:end])
            answered.append(Queries(each.queries, each.own, exact))
            start = end
        return answered

    def points(self, kinds: list[Queries], k: int) -> list[Point]:
        """The settings for one k, with growing numbers of lists.

        It ends when settings are no longer cheaper than an exact search, or find everything.
        """
        codebook, dim = self.live.codes.codebook, self.view.dim or 1
        most_us = CHEAPER_THAN_EXACT * self.view.live.count * dim * EXACT_NS_PER_ELEMENT / 1000
        points: list[Point] = []
        reaches = _Reaches(self.live, kinds, adaptive=self.of == "queries")
        lists = max(1, codebook.lists // 128)
        step = NPROBE_STEP_IN_HASTE if self.in_haste else NPROBE_STEP
        while True:
            reach = reaches.searching(lists)
            nprobe = reach.nprobe
            setting = Point(k, nprobe, CANDIDATES[k][-1] + 1, 0.0, 0.0, 0.0, reach=reach.factor)
            shares = self.shares(kinds, setting)
            cheap = False
            for column, candidates in enumerate(CANDIDATES[k]):
                us = cost_us(
                    dim=dim,
                    codes=codebook.quantizers,
                    lists=codebook.lists,
                    nprobe=nprobe,
                    searched_lists=reach.lists,
                    searched_rows=reach.rows,
                    candidates=candidates,
                )
                if us > most_us:
                    break
                cheap = True
                of_each = [each[:, column] for each in shares]
                reported = of_each[-1] if self.of == "queries" else min(of_each, key=np.mean)
                points.append(
                    Point(
                        k,
                        nprobe,
                        candidates,
                        min(map(_lower_bound, of_each)),
                        float(reported.mean()),
                        us,
                        float(np.percentile(reported, 5)),
                        reach.factor,
                    )
                )
            found_all = all(each[:, -1].mean() >= ENOUGH for each in shares)
            if not cheap or lists >= codebook.lists or found_all:
                return points
            lists = min(codebook.lists, max(lists + 1, int(lists * step)))

    def shares(self, kinds: list[Queries], setting: Point) -> list[NDArray[np.float64]]:
        """``_shares`` of each kind of queries."""
        parts = [(each, some) for each in kinds for some in self.shares_of(len(each.queries))]
        found = self.pool.map(
            lambda part: _shares(self.view, self.live, part[0].part(part[1]), setting, self.stop),
            parts,
        )
        shares = list(found)
        return [
            np.concatenate(shares[start : start + self.threads])
            for start in range(0, len(shares), self.threads)
        ]

    def shares_of(self, count: int) -> list[slice]:
        """The parts of some queries for each thread."""
        bounds = [count * number // self.threads for number in range(self.threads + 1)]
        return [slice(start, stop) for start, stop in pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class _Reach:
    """How far queries search: ``Point.nprobe`` and ``Point.reach``.

    ``lists`` and ``rows`` are the mean numbers of searched lists and rows of a query.
    """

    nprobe: int
    factor: float | None
    lists: float
    rows: float


class _Reaches:
    """The distances of some queries to all lists.

    Not ``adaptive``, each query searches the same number of lists. Made queries lie between many
    lists, and would search more of them than real queries. Measured on 60,000 embeddings of text
    before any query was asked, for 0.95: 0.937 of real queries with a reach, and 0.998 without.
    """

    def __init__(self, live: LiveCodes, kinds: list[Queries], *, adaptive: bool) -> None:
        codebook = live.codes.codebook
        self._most, self._adaptive = codebook.lists, adaptive
        some = np.concatenate([each.queries[:REACH_QUERIES] for each in kinds])
        lists, _, self._distances = live.near_lists(
            padded(np.ascontiguousarray(some), codebook.width), self._most
        )
        sizes = np.sum([part.sizes for part in live.codes.parts], axis=0)
        self._rows = np.cumsum(sizes[lists], axis=1)

    def searching(self, lists: int) -> _Reach:
        """The reach with which a query searches this number of lists on average."""
        if lists >= self._most or not self._adaptive:
            lists = min(lists, self._most)
            return _Reach(lists, None, lists, float(self._rows[:, lists - 1].mean()))
        nprobe = min(self._most, math.ceil(MOST_LISTS * lists))
        low, high = REACHES
        for _ in range(REACH_STEPS):
            middle = (low + high) / 2
            if self._searched(middle, nprobe).mean() < lists:
                low = middle
            else:
                high = middle
        searched = self._searched(high, nprobe)
        rows = self._rows[np.arange(len(searched)), searched - 1]
        return _Reach(nprobe, high, float(searched.mean()), float(rows.mean()))

    def _searched(self, reach: float, nprobe: int) -> NDArray[np.int64]:
        return lists_within(self._distances[:, :nprobe], reach)


def _lower_bound(shares: NDArray[np.float64]) -> float:
    """The recall to rely on for one kind of queries, from the recall of each."""
    choosing = max(1, int(CHOOSING * len(shares)))
    chosen_by, others = shares[:choosing], shares[choosing:]
    bound = float(chosen_by.mean() - 2 * chosen_by.std() / np.sqrt(len(chosen_by)))
    return min(bound, float(others.mean())) if len(others) else bound


def _shares(
    view: View, live: LiveCodes, asked: Queries, setting: Point, stop: Stop
) -> NDArray[np.float64]:
    """Recall@k of each query with each number of candidates, (q, candidates).

    One search serves all numbers: fewer candidates are the first of more.
    """
    k = setting.k
    numbers, queries, own, exact = np.array(CANDIDATES[k]), asked.queries, asked.own, asked.exact
    assert exact is not None
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
