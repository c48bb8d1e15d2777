"""A search is planned once: by codes or exactly, with which settings, and the cost of a query.

The plan then runs, for some queries at a time. Invariant: codes answer only if they reach the
wanted recall; distances are exact in both cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from syncd.errors import DimensionMismatch, InvalidParams
from syncd.index.codes.calibration import EXACT_NS_PER_ELEMENT, Point, rerank_us
from syncd.index.rows.vectors import Vectors
from syncd.index.search.approximate import search_codes
from syncd.index.search.exact import SPARSE, Distances, search_exact
from syncd.index.view import View
from syncd.types import Key

SPARSE_ROW_ELEMENTS = 700
"""Cost of reading a row that lies alone, in elements, in addition to twice the row's own.

Measured: 0.15 µs with 128 dimensions.
"""


class SearchResult(NamedTuple):
    """The nearest rows of one query: keys, and float64 distances, ascending."""

    keys: list[Key]
    distances: Distances


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """One planned search of one view. Any thread may run it, any number of times."""

    view: View
    dataset: str
    """The dataset's name, for messages."""
    k: int
    excluded: int
    """The slot that is left out; -1 for none."""
    max_distance: float | None
    point: Point | None
    """The settings of the codes; None for an exact search."""
    cost: int
    """Expected cost of one query, in elements (numbers of vectors).

    It is the number of elements that an exact search compares in the expected time of the query.
    """

    def run(self, queries: Vectors) -> list[SearchResult]:
        """The nearest rows of each query of (q, dim).

        Raises ``DimensionMismatch`` and ``InvalidVector``.
        """
        view, k = self.view, self.k
        queries = view.format.queries(queries)
        if not view.live.count:
            return [SearchResult([], np.empty(0, dtype=np.float64)) for _ in queries]
        if queries.shape[1] != view.dim:
            raise DimensionMismatch(self.dataset, expected=view.dim or 0, got=queries.shape[1])
        wanted = k if self.excluded < 0 else k + 1
        if self.point is None or view.codes is None:
            found = search_exact(view, queries, wanted)
        else:
            found = search_codes(view, view.codes, queries, wanted, self.point)
        results = []
        for distances, slots in found:
            if self.excluded >= 0:
                others = slots != self.excluded
                distances, slots = distances[others][:k], slots[others][:k]
            if self.max_distance is not None:
                near = int(np.searchsorted(distances, self.max_distance, side="right"))
                distances, slots = distances[:near], slots[:near]
            results.append(SearchResult(view.keys_of(slots), distances))
        return results


def plan_search(
    view: View,
    dataset: str,
    k: int,
    recall: float,
    *,
    exclude: Key | None = None,
    max_distance: float | None = None,
) -> SearchPlan:
    """The plan to find the ``k`` nearest rows of ``view`` at this mean ``recall``.

    ``dataset`` is its name, for messages. Raises ``InvalidParams`` for a ``k`` below 1 or an
    ``exclude`` of another kind.
    """
    if k < 1:
        raise InvalidParams(f"expected k of at least 1, got {k}", hint="ask for at least one row")
    excluded = -1 if exclude is None else int(view.find([exclude])[0])
    point = point_for(view, k if excluded < 0 else k + 1, recall)
    cost = exact_elements(view) if point is None else coded_elements(view, point)
    return SearchPlan(view, dataset, k, excluded, max_distance, point, cost)


def point_for(view: View, k: int, recall: float) -> Point | None:
    """The settings of the codes for a search of ``k`` rows; None for an exact search.

    With a filter, the ``k`` nearest passing rows are most likely among the nearest ``k / share`` of
    all rows and some more. The lists and candidates that find this many rows were measured. The
    places of the passing rows were not measured, so a search that finds too few of them is repeated
    exactly. If queries that were asked with a filter missed a recall, such searches are exact.
    """
    if view.codes is None or recall >= 1.0 or k >= view.live.count:
        return None
    if view.share == 1.0:
        return view.codes.codes.point(k, recall)
    if recall > view.codes.codes.calibration.filtered:
        return None
    point = view.codes.codes.point(nearest_to_look_at(k, view.share), recall)
    return (
        point if point is not None and coded_elements(view, point) < exact_elements(view) else None
    )


def nearest_to_look_at(k: int, share: float) -> int:
    """Number of nearest rows among which ``k`` pass a filter that passes this share of the rows.

    It is the mean plus three standard deviations.
    """
    return math.ceil((k + 3 * math.sqrt(k * (1 - share))) / share)


def exact_elements(view: View) -> int:
    """Cost of one exact query, in elements."""
    dim = view.dim or 0
    return (
        view.count * dim
        if view.live.count * SPARSE > view.count
        else view.live.count * (2 * dim + SPARSE_ROW_ELEMENTS)
    )


def coded_elements(view: View, point: Point) -> int:
    """Cost of one query by codes, in elements: codes, candidates that pass, and the tail."""
    dim = view.dim or 0
    assert view.codes is not None
    microseconds = point.cost_us - (1 - view.share) * rerank_us(point.candidates, dim)
    return (
        int(microseconds * 1000 / EXACT_NS_PER_ELEMENT) + (view.count - view.codes.codes.stop) * dim
    )
