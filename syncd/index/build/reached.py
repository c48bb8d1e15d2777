"""Recall that searches reach: real queries, or rows, searched as a client's search is.

A search with a filter is repeated with its filter. Invariant: only the plan of the client's search
decides whether the codes answer, and with which settings.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from syncd.index.asked import Sample
from syncd.index.build.measuring import Queries, real_queries, rows_as_queries
from syncd.index.build.neighbors import nearest_others
from syncd.index.codes.calibration import KS
from syncd.index.codes.codes import Codes, LiveCodes
from syncd.index.filter.language import Filter
from syncd.index.search.exact import use_one_thread
from syncd.index.search.plan import SearchPlan, plan_search
from syncd.index.storage.bitmap import live_slots
from syncd.index.storage.stopping import Cancelled, Stop
from syncd.index.view import View
from syncd.types import RecallOf

ROWS = 200
"""Number of rows that serve as queries."""
TIMED = 5
"""Number of exact searches that are timed; their recall needs no measurement."""

FILTERED = (30, 100)
"""Least and most queries with a filter on which their recall is measured."""
FILTERED_TARGETS = (0.8, 0.9, 0.95, 0.98, 0.99)

_TIE = 1e-6


@dataclass(frozen=True, slots=True)
class Reached:
    """Recall@k of the searches that want ``target``, and the mean time of one.

    ``error`` is the standard error of the mean. ``exact`` is the number of queries that no settings
    of the codes answer at this target.
    """

    target: float
    mean: float
    error: float
    p5: float
    least: float
    exact: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Recall for each target, over this number of queries."""

    of: RecallOf
    queries: int
    targets: tuple[Reached, ...]


def measure_reached(
    view: View,
    dataset: str,
    sample: Sample | None,
    k: int,
    targets: Sequence[float],
    stop: Stop = lambda: False,
) -> Measured:
    """Recall@k of ``view`` for each target: over a sample, or over rows if it is None.

    Raises ``Cancelled``.
    """
    use_one_thread()
    of: RecallOf = "rows" if sample is None else "queries"
    slots = live_slots(view.live.bits, view.count)
    if slots.size < 2:
        return Measured(of, 0, ())
    if sample is None:
        asked = rows_as_queries(view, np.random.default_rng(view.count).permutation(slots)[:ROWS])
        given = view.vectors_of(asked.own)
    else:
        asked, given = real_queries(view, sample), sample.queries
    filters = [None] * len(given) if sample is None else sample.filters
    limits = _plain_limits(view, asked, filters, k, stop)
    shares, exact = np.ones((len(targets), len(given))), np.zeros(len(targets), dtype=np.int64)
    seconds: list[list[float]] = [[] for _ in targets]
    for wanted, rows in _by_filter(filters):
        chosen = view.where(wanted)  # one at a time, because its bitmap is as long as the dataset
        for row in rows:
            if stop():
                raise Cancelled
            query, own = given[row : row + 1], int(asked.own[row])
            if wanted is not None:
                limits[row] = _plan(chosen, dataset, k, 1.0, own).run(query)[0].distances
            for place, target in enumerate(targets):
                plan = _plan(chosen, dataset, k, target, own)
                exact[place] += plan.point is None
                if plan.point is None and exact[place] > TIMED:
                    continue
                begun = time.perf_counter()
                (found,) = plan.run(query)
                seconds[place].append(time.perf_counter() - begun)
                if plan.point is not None and limits[row].size:
                    limit = limits[row][-1]
                    good = np.count_nonzero(found.distances <= limit + _TIE * abs(limit))
                    shares[place, row] = good / limits[row].size
    reached = (
        Reached(
            target,
            float(each.mean()),
            float(each.std() / np.sqrt(len(given))),
            float(np.percentile(each, 5)),
            float(each.min()),
            int(exact[place]),
            float(np.mean(seconds[place])),
        )
        for place, (target, each) in enumerate(zip(targets, shares, strict=True))
    )
    return Measured(of, len(given), tuple(reached))


def filtered_limit(view: View, codes: Codes, sample: Sample, stop: Stop) -> float:
    """The largest recall at which ``codes`` answer searches with a filter; 1 if there are few.

    Settings are measured without filters. This is the measurement of the sampled searches with
    their filters. A mean that misses its target by less than a standard error is not a miss.
    """
    least, most = FILTERED
    filtered = sample.filtered(most)
    if len(filtered) < least:
        return 1.0
    view = replace(view, codes=LiveCodes(codes, view.live.bits))
    measured = measure_reached(view, "", filtered, KS[0], FILTERED_TARGETS, stop)
    limit = 0.0
    for each in measured.targets:
        if each.mean + each.error < each.target:
            return limit
        limit = each.target
    return 1.0


def _by_filter(filters: Sequence[Filter | None]) -> list[tuple[Filter | None, list[int]]]:
    """The different filters, each with the rows that have it."""
    found: dict[bytes | None, tuple[Filter | None, list[int]]] = {}
    for row, each in enumerate(filters):
        key = None if each is None else each.text
        found.setdefault(key, (each, []))[1].append(row)
    return list(found.values())


def _plain_limits(
    view: View, asked: Queries, filters: Sequence[Filter | None], k: int, stop: Stop
) -> list[NDArray[np.float64]]:
    """The true distances of each query without a filter, ascending: at most ``k``."""
    limits: list[NDArray[np.float64]] = [np.empty(0)] * len(filters)
    plain = [row for row, each in enumerate(filters) if each is None]
    if plain:  # together, because one matrix product serves them all
        found, _ = nearest_others(view, asked.queries[plain], asked.own[plain], k, stop)
        for row, distances in zip(plain, found, strict=True):
            limits[row] = distances[np.isfinite(distances)]
    return limits


def _plan(view: View, dataset: str, k: int, recall: float, own: int) -> SearchPlan:
    """The plan of a client's search; ``own`` is the slot of the row that is the query, or -1."""
    (key,) = view.keys_of(np.array([own])) if own >= 0 else (None,)
    return plan_search(view, dataset, k, recall, exclude=key)
