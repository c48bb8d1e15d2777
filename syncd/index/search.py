"""A search request on one view: checked, answered, and given back as keys.

Exact for now: approximate candidates will come from the view too, and be re-ranked by the same distances.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from syncd.errors import DimensionMismatch, InvalidParams
from syncd.index.exact import Distances, search_exact
from syncd.index.vectors import Vectors
from syncd.index.view import View
from syncd.types import Key


class SearchResult(NamedTuple):
    """One query's nearest rows: keys, and float64 distances, ascending."""

    keys: list[Key]
    distances: Distances


def search(
    view: View, name: str, queries: Vectors, k: int, exclude: Key | None, max_distance: float | None
) -> list[SearchResult]:
    """For each query of (q, dim) the ``k`` nearest rows of ``view``; ``name`` is the dataset's, for messages.

    Raises ``DimensionMismatch``, ``InvalidVector``, and ``InvalidParams`` for a ``k`` below 1 or an ``exclude`` of
    another kind.
    """
    if k < 1:
        raise InvalidParams(f"k is {k}", hint="ask for at least one row")
    queries = view.format.queries(queries)
    excluded = -1 if exclude is None else int(view.find([exclude])[0])
    if not view.live_count:
        return [SearchResult([], np.empty(0, dtype=np.float64)) for _ in queries]
    if queries.shape[1] != view.dim:
        raise DimensionMismatch(name, expected=view.dim or 0, got=queries.shape[1])
    results = []
    for distances, slots in search_exact(view, queries, k if excluded < 0 else k + 1):
        if excluded >= 0:
            others = slots != excluded
            distances, slots = distances[others][:k], slots[others][:k]
        if max_distance is not None:
            near = int(np.searchsorted(distances, max_distance, side="right"))
            distances, slots = distances[:near], slots[:near]
        results.append(SearchResult(view.keys_of(slots), distances))
    return results
