"""A search is planned once: by codes or exactly, with which settings, and what a query costs. Then
it runs, for some queries at a time.

By codes where they reach the recall that is wanted, else exactly; distances are exact either way.
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
"""The cost of going to a row that lies alone, in elements, beside twice the row's own: 0.15 µs of
128 dimensions.
"""


class SearchResult(NamedTuple):
    """One query's nearest rows: keys, and float64 distances, ascending."""

    keys: list[Key]
    distances: Distances


@dataclass(frozen=True, slots=True)
class SearchPlan:
    """One planned search of one view. Any thread may run it, any number of times."""

    view: View
    dataset: str
    """For messages."""
    k: int
    excluded: int
    """The slot that is left out, -1 for none."""
    max_distance: float | None
    point: Point | None
    """The settings of the codes; None for an exact search."""
    cost: int
    """Elements (numbers of vectors) that an exact search compares in the time that one query is
    expected to take.
    """

    def run(self, queries: Vectors) -> list[SearchResult]:
        """The nearest rows of each query of (q, dim); raises ``DimensionMismatch`` and
        ``InvalidVector``.
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
    """How to find the ``k`` nearest rows of ``view`` at this mean ``recall``; ``dataset`` is its
    name, for messages.

    Raises ``InvalidParams`` for a ``k`` below 1 or an ``exclude`` of another kind.
    """
    if k < 1:
        raise InvalidParams(f"k is {k}", hint="ask for at least one row")
    excluded = -1 if exclude is None else int(view.find([exclude])[0])
    point = point_for(view, k if excluded < 0 else k + 1, recall)
    cost = exact_elements(view) if point is None else coded_elements(view, point)
    return SearchPlan(view, dataset, k, excluded, max_distance, point, cost)


def point_for(view: View, k: int, recall: float) -> Point | None:
    """The settings of the codes with which ``k`` rows are searched; None for an exact search.

    The ``k`` nearest that a filter lets through are most likely among the nearest of all ``k`` over
    its share and some. With how many more lists and candidates those are found was measured; how
    the rows of a filter lie was not, so a search that meets too few of them is done again exactly.
    """
    if view.codes is None or recall >= 1.0 or k >= view.live.count:
        return None
    if view.share == 1.0:
        return view.codes.codes.point(k, recall)
    point = view.codes.codes.point(nearest_to_look_at(k, view.share), recall)
    return (
        point if point is not None and coded_elements(view, point) < exact_elements(view) else None
    )


def nearest_to_look_at(k: int, share: float) -> int:
    """Among how many of the nearest rows ``k`` pass a filter, if every row does with this
    probability: the mean and three standard deviations.
    """
    return math.ceil((k + 3 * math.sqrt(k * (1 - share))) / share)


def exact_elements(view: View) -> int:
    """The cost of one query that is compared with every row, in elements."""
    dim = view.dim or 0
    return (
        view.count * dim
        if view.live.count * SPARSE > view.count
        else view.live.count * (2 * dim + SPARSE_ROW_ELEMENTS)
    )


def coded_elements(view: View, point: Point) -> int:
    """The cost of one query that is compared with codes, the candidates that pass, and the tail, in
    elements.
    """
    dim = view.dim or 0
    assert view.codes is not None
    microseconds = point.cost_us - (1 - view.share) * rerank_us(point.candidates, dim)
    return (
        int(microseconds * 1000 / EXACT_NS_PER_ELEMENT) + (view.count - view.codes.codes.stop) * dim
    )
