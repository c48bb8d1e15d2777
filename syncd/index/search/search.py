"""A search request on one view: checked, answered, and given back as keys.

With the codes' help where they reach the recall that is wanted, else exactly; distances are exact either way.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from syncd.errors import DimensionMismatch, InvalidParams
from syncd.index.codes.calibration import EXACT_NS_PER_ELEMENT, Point, rerank_us
from syncd.index.rows.vectors import Vectors
from syncd.index.search.approximate import search_codes
from syncd.index.search.exact import SPARSE, Distances, search_exact
from syncd.index.storage.bitmap import Slots
from syncd.index.view import View
from syncd.types import Key

SPARSE_ROW_ELEMENTS = 700
"""What it costs to go to a row that lies alone, beside twice its elements: 0.15 µs of 128 dimensions."""


class SearchResult(NamedTuple):
    """One query's nearest rows: keys, and float64 distances, ascending."""

    keys: list[Key]
    distances: Distances


def search(
    view: View, name: str, queries: Vectors, k: int, exclude: Key | None, max_distance: float | None, recall: float
) -> list[SearchResult]:
    """For each query of (q, dim) the ``k`` nearest rows of ``view``, at this mean ``recall``; ``name`` is the dataset's, for messages.

    Raises ``DimensionMismatch``, ``InvalidVector``, and ``InvalidParams`` for a ``k`` below 1 or an ``exclude`` of
    another kind.
    """
    if k < 1:
        raise InvalidParams(f"k is {k}", hint="ask for at least one row")
    queries = view.format.queries(queries)
    excluded = -1 if exclude is None else int(view.find([exclude])[0])
    if not view.live.count:
        return [SearchResult([], np.empty(0, dtype=np.float64)) for _ in queries]
    if queries.shape[1] != view.dim:
        raise DimensionMismatch(name, expected=view.dim or 0, got=queries.shape[1])
    results = []
    for distances, slots in nearest(view, queries, k if excluded < 0 else k + 1, recall):
        if excluded >= 0:
            others = slots != excluded
            distances, slots = distances[others][:k], slots[others][:k]
        if max_distance is not None:
            near = int(np.searchsorted(distances, max_distance, side="right"))
            distances, slots = distances[:near], slots[:near]
        results.append(SearchResult(view.keys_of(slots), distances))
    return results


def nearest(view: View, queries: Vectors, k: int, recall: float) -> list[tuple[Distances, Slots]]:
    """The ``k`` nearest live rows of each query, or all if there are fewer: distances ascending, and slots."""
    point = point_for(view, k, recall)
    if point is None or view.codes is None:
        return search_exact(view, queries, k)
    return search_codes(view, view.codes, queries, k, point)


def point_for(view: View, k: int, recall: float) -> Point | None:
    """The settings of the codes with which ``k`` rows are searched; None for an exact search.

    The ``k`` nearest that a filter lets through are most likely among the nearest of all ``k`` over its share and some. With how many more lists
    and candidates those are found was measured; how the rows of a filter lie was not, so a search that meets too few of them is done again exactly.
    """
    if view.codes is None or recall >= 1.0 or k >= view.live.count:
        return None
    if view.share == 1.0:
        return view.codes.codes.point(k, recall)
    point = view.codes.codes.point(nearest_to_look_at(k, view.share), recall)
    return point if point is not None and coded_elements(view, point) < exact_elements(view) else None


def nearest_to_look_at(k: int, share: float) -> int:
    """Among how many of the nearest rows ``k`` pass a filter, if every row does with this probability: the mean and three standard deviations."""
    return math.ceil((k + 3 * math.sqrt(k * (1 - share))) / share)


def elements(view: View, queries: int, k: int, recall: float) -> int:
    """What a search is expected to cost, as the number of elements that an exact one compares in the same time."""
    point = point_for(view, k, recall)
    return queries * (exact_elements(view) if point is None else coded_elements(view, point))


def exact_elements(view: View) -> int:
    """``elements`` of one query that is compared with every row."""
    dim = view.dim or 0
    return (
        view.count * dim if view.live.count * SPARSE > view.count else view.live.count * (2 * dim + SPARSE_ROW_ELEMENTS)
    )


def coded_elements(view: View, point: Point) -> int:
    """``elements`` of one query that is compared with codes, the candidates that pass, and the tail."""
    dim = view.dim or 0
    assert view.codes is not None
    microseconds = point.cost_us - (1 - view.share) * rerank_us(point.candidates, dim)
    return int(microseconds * 1000 / EXACT_NS_PER_ELEMENT) + (view.count - view.codes.codes.stop) * dim
