"""Approximate search: candidates from the codes, their exact distances, and the tail exactly.

Invariant: distances are as exact as those of ``exact``; only a row may be missing. If fewer rows
are found than asked for and present, or a distance overflows, exact search answers the query.
"""

from __future__ import annotations

import math

import numpy as np

from syncd.index.codes.calibration import Point
from syncd.index.codes.codes import LiveCodes, library
from syncd.index.rows.vectors import Vectors
from syncd.index.search.exact import (
    Distances,
    pgvector_distances,
    search_exact,
    search_from,
    search_numbers,
    search_rows,
    use_one_thread,
)
from syncd.index.storage.bitmap import Slots, test_bits
from syncd.index.view import View

QUERIES_AT_ONCE = 64


def search_codes(
    view: View, codes: LiveCodes, queries: Vectors, k: int, point: Point
) -> list[tuple[Distances, Slots]]:
    """About the ``k`` nearest live rows of each query, in the form of ``search_exact``.

    ``codes`` are the codes of ``view``; a filter is only in the view's bits. Recall was measured
    without a filter. So only rows among the ``point.k`` nearest of all rows are used, for which
    that recall is known. If fewer than ``k`` of them pass the filter, because the passing rows lie
    elsewhere, exact search answers the query.
    """
    use_one_thread()
    wanted = min(k, view.live.count)
    results: list[tuple[Distances, Slots]] = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        some = queries[start : start + QUERIES_AT_ONCE]
        approximate, labels = codes.candidates(some, point)
        ascending = view.format.metric == "l2"
        tail = (
            search_from(view, some, wanted, codes.codes.stop)
            if codes.codes.stop < view.count
            else None
        )
        for row in range(len(some)):
            slots = labels[row]
            # Candidates of several parts come part by part.
            if slots.size > point.candidates or view.share < 1.0:
                order = approximate[row] if ascending else -approximate[row]
                slots = slots[order.argsort(kind="stable")[: point.candidates]]
            if slots.size and slots.min() < 0:
                slots = slots[slots >= 0]
            if view.share < 1.0:
                (places,) = test_bits(view.live.bits, slots).nonzero()
                enough = places.size >= wanted and places[wanted - 1] < point.k
                slots = slots[places] if enough else places[:0]
            distances, slots = nearest_of(view, some[row : row + 1], slots, wanted)
            if tail is not None:
                distances = np.concatenate((distances, tail[0][row]))
                slots = np.concatenate((slots, tail[1][row]))
                order = distances.argsort(kind="stable")[:wanted]
                distances, slots = distances[order], slots[order]
            if distances.size < wanted or not (
                math.isfinite(distances[0]) and math.isfinite(distances[-1])
            ):
                results += search_exact(view, some[row : row + 1], k)
            else:
                results.append((distances, slots))
    return results


def nearest_of(view: View, query: Vectors, slots: Slots, k: int) -> tuple[Distances, Slots]:
    """The at most ``k`` nearest of ``slots`` to a query (1, dim): distances ascending, and slots.

    A distance that overflows is infinite.
    """
    if not slots.size:
        return np.empty(0, dtype=np.float64), slots
    metric, rows = view.format.metric, view.vectors.rows
    if rows is not None and not view.format.half:
        distances, found = search_numbers(metric, query, rows, slots, min(k, slots.size))
        return distances[0], found[0]
    distances, places = search_rows(metric, query, view.compared_rows(slots), k)
    return distances[0], slots[places[0]]


def exact_distances(view: View, query: Vectors, slots: Slots) -> Distances:
    """pgvector's distances between a query (dim,) and the rows of ``slots``, (n,) float64."""
    if not slots.size:
        return np.empty(0, dtype=np.float64)
    rows = view.compared_rows(slots)
    raw = np.empty(slots.size, dtype=np.float32)
    compare = (
        library.fvec_L2sqr_ny if view.format.metric == "l2" else library.fvec_inner_products_ny
    )
    pointer = library.swig_ptr
    compare(pointer(raw), pointer(query), pointer(rows), rows.shape[1], slots.size)
    return pgvector_distances(view.format.metric, raw)
