"""Exact search: FAISS's own loops run directly on the chunks' memory; the live bitmap leaves out
dead rows.

Distances are pgvector's: Euclidean for l2, one minus the cosine, minus the inner product for ip.
FAISS computes in float32. Invariant: no row is lost and no distance is infinite, because a query
that overflows float32 is computed again in float64.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from syncd.index.rows.vectors import Vectors, half_to_float
from syncd.index.storage.bitmap import Slots, bitmap_bytes, live_slots
from syncd.index.storage.columns import ColumnView
from syncd.index.view import View
from syncd.types import Metric

Distances = NDArray[np.float64]

_SCRATCH_BYTES = 1 << 20
"""Bytes of float16 rows converted at a time: such blocks stay in the second-level cache."""

_MOST_CANDIDATES = 1 << 22

_FLOAT64_ROWS = 4096

SPARSE = 4
"""If at most one row in this many of a chunk is live, the live rows are compared one by one.

Measured: 1,000 of 262,144 rows of 128 take 20 µs, and 450 µs with a bitmap; 60,000 of them 9 ms and
19 ms.
"""


PRODUCT_ELEMENTS = 16_384
"""From this many numbers in all queries, FAISS computes a matrix product.

FAISS's default is 128,000: 600 queries of 128 then take 17 ns per row, and 3.4 ns with this value.
"""

faiss.cvar.distance_compute_blas_threshold = PRODUCT_ELEMENTS


class _Thread(threading.local):
    limited = False


_thread = _Thread()


def use_one_thread() -> None:
    """Make FAISS use one thread in calls from the present thread.

    Two threads for one query are slower. The setting is per calling thread.
    """
    if not _thread.limited:
        faiss.omp_set_num_threads(1)
        _thread.limited = True


def search_exact(view: View, queries: Vectors, k: int) -> list[tuple[Distances, Slots]]:
    """The ``k`` nearest live rows of each query, or all if there are fewer.

    ``queries`` is (q, dim), from ``VectorFormat.queries``. Each result is distances ascending, and
    slots.
    """
    use_one_thread()
    k = min(k, view.live.count)
    if k == 0:
        return [(np.empty(0, dtype=np.float64), np.empty(0, dtype=np.int64)) for _ in queries]
    # A block gives k candidates. If k is large, a few queries at a time bound the memory.
    candidates = min(view.count, k * max(1, len(view.vectors.chunks)))
    at_once = max(1, _MOST_CANDIDATES // candidates)
    found: list[tuple[Distances, Slots]] = []
    for start in range(0, len(queries), at_once):
        found += _search_some(view, queries[start : start + at_once], k)
    return found


def search_from(view: View, queries: Vectors, k: int, start: int) -> tuple[Distances, Slots]:
    """The nearest live rows at ``start``, a multiple of eight, and after, in any order.

    Returns distances and slots (q, some): the first ``k`` by distance are each query's result. If
    there are fewer, distances are infinite.
    """
    parts = [search_block(view, queries, k, *block) for block in blocks(view, start)]
    if not parts:
        return np.empty((len(queries), 0), dtype=np.float64), np.empty(
            (len(queries), 0), dtype=np.int64
        )
    if len(parts) == 1:
        return parts[0]
    distances, slots = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    return distances, slots


def pgvector_distances(metric: Metric, raw: NDArray[np.float32]) -> Distances:
    """pgvector's distances from FAISS's numbers: squared Euclidean for l2, else inner products."""
    if metric == "l2":
        return np.sqrt(raw, dtype=np.float64)
    exact = np.negative(raw, dtype=np.float64)
    if metric == "cosine":
        exact += 1.0
        np.maximum(exact, 0.0, out=exact)
    return exact


def _search_some(view: View, queries: Vectors, k: int) -> list[tuple[Distances, Slots]]:
    parts = list(_searched_blocks(view, queries, k))
    if len(parts) == 1:
        distances, slots = parts[0]
    else:
        distances, slots = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    found = []
    for query, row, row_slots in zip(queries, distances, slots, strict=True):
        if len(parts) > 1:
            order = np.argpartition(row, k - 1)[:k] if k < row.size else np.arange(row.size)
            order = order[np.argsort(row[order], kind="stable")]
            row, row_slots = row[order], row_slots[order]
        if np.isfinite(row[-1]) and np.isfinite(row[0]) and row.size >= k:
            found.append((row[:k], row_slots[:k]))
        else:
            found.append(_search_in_float64(view, query, k))
    return found


def _searched_blocks(view: View, queries: Vectors, k: int) -> Iterator[tuple[Distances, Slots]]:
    """Results of ``search_block`` or ``_search_chosen``, chunk by chunk."""
    for number, (first, rows) in enumerate(view.vectors.blocks(view.count)):
        live = len(rows) - int(view.live.dead[number])
        if live * SPARSE <= len(rows):
            if live:
                yield _search_chosen(view, queries, min(k, live), first, rows)
            continue
        for start, block in (
            _converted(first, rows, view.norms) if view.format.half else ((first, rows),)
        ):
            yield search_block(view, queries, k, start, block, live == len(rows))


def _search_chosen(
    view: View, queries: Vectors, k: int, first: int, rows: NDArray[Any]
) -> tuple[Distances, Slots]:
    """``search_block`` for a block with few live rows: only these are read."""
    dim = rows.shape[1]
    chosen = live_slots(view.live.bits[first >> 3 : bitmap_bytes(first + len(rows))], len(rows))
    slots = chosen + first
    if view.format.half:
        rows, halves = np.empty((len(chosen), dim), dtype=np.float32), rows[chosen]
        half_to_float(halves, None if view.norms is None else view.norms.take(slots), rows)
        chosen = np.arange(len(chosen))
    distances, found = search_numbers(view.format.metric, queries, rows, chosen, k)
    found = np.where(found < 0, -1, slots[found] if view.format.half else found + first)
    return distances, found


def search_numbers(
    metric: Metric, queries: Vectors, rows: Vectors, numbers: Slots, k: int
) -> tuple[Distances, Slots]:
    """The nearest of the ``numbers`` (n,) among ``rows``, which are read where they lie.

    The result is like that of ``search_rows``; FAISS computes the same bits. ``k`` is at most n.
    """
    distances = np.empty((len(queries), k), dtype=np.float32)
    found = np.empty((len(queries), k), dtype=np.int64)
    pointer = faiss.swig_ptr
    arguments = (
        pointer(queries),
        pointer(rows),
        pointer(numbers),
        rows.shape[1],
        len(queries),
        len(rows),
        numbers.size,
        k,
        pointer(distances),
        pointer(found),
        0,  # every query is compared with the same rows
    )
    # FAISS's type stubs lack both functions.
    if metric == "l2":
        faiss.knn_L2sqr_by_idx(*arguments)  # type: ignore[attr-defined]
    else:
        faiss.knn_inner_products_by_idx(*arguments)  # type: ignore[attr-defined]
    return _as_distances(metric, distances, found), found


def search_block(
    view: View,
    queries: Vectors,
    k: int,
    first: int,
    rows: Vectors,
    all_live: bool,
    *,
    rough: bool = False,
) -> tuple[Distances, Slots]:
    """The nearest rows of one block: distances and slots (q, k), ascending.

    If there are fewer, the last distances are infinite. ``rough`` allows l2 as |x|² + |y|² - 2xy,
    which takes a quarter of the time for many queries.
    """
    selector, metric = None, view.format.metric
    # A selector costs 3-10 %. With many queries and no selector, FAISS computes l2 as |x|² + |y|² -
    # 2xy. That is fast, but loses near neighbors far from the origin, which exact search must not.
    if not all_live or (metric == "l2" and queries.size >= PRODUCT_ELEMENTS and not rough):
        # `bits` must live while FAISS reads it.
        bits = view.live.bits[first >> 3 : bitmap_bytes(first + len(rows))]
        selector = faiss.IDSelectorBitmap(bits.size, faiss.swig_ptr(bits))
    distances, slots = search_rows(metric, queries, rows, k, selector)
    if first:
        slots[slots >= 0] += first
    return distances, slots


def search_rows(
    metric: Metric,
    queries: Vectors,
    rows: Vectors,
    k: int,
    selector: faiss.IDSelector | None = None,
) -> tuple[Distances, Slots]:
    """The nearest of ``rows`` (n, dim) that pass the selector: distances ascending, and row
    numbers.

    Both are (q, at most k). If there are fewer, or a distance overflows, it is infinite with number
    -1.
    """
    count, dim = rows.shape
    k = min(k, count)
    distances = np.empty((len(queries), k), dtype=np.float32)
    numbers = np.empty((len(queries), k), dtype=np.int64)
    pointer = faiss.swig_ptr
    arguments = (
        pointer(queries),
        pointer(rows),
        dim,
        len(queries),
        count,
        k,
        pointer(distances),
        pointer(numbers),
    )
    if metric == "l2":
        faiss.knn_L2sqr(*arguments, None, selector)
    else:
        faiss.knn_inner_product(*arguments, selector)
    return _as_distances(metric, distances, numbers), numbers


def _as_distances(metric: Metric, found: Vectors, slots: Slots) -> Distances:
    """FAISS's results as pgvector's distances; infinite for the slot -1."""
    exact = pgvector_distances(metric, found)
    last = slots[0, -1] if len(slots) == 1 else slots[:, -1].min()
    if last < 0:  # fewer than k are live, or a distance overflowed
        exact[slots < 0] = np.inf
    return exact


def blocks(view: View, begin: int = 0) -> Iterator[tuple[int, Vectors, bool]]:
    """Each block's first slot, its rows as float32, and whether all are live.

    Slots before ``begin`` are left out.
    """
    for number, (first, rows) in enumerate(view.vectors.blocks(view.count)):
        dead = int(view.live.dead[number])
        if dead == len(rows) or first + len(rows) <= begin:
            continue
        if first < begin:
            first, rows = begin, rows[begin - first :]
        for start, block in (
            _converted(first, rows, view.norms) if view.format.half else ((first, rows),)
        ):
            yield start, block, not dead


def _converted(
    first: int, rows: NDArray[np.float16], norms: ColumnView | None
) -> Iterator[tuple[int, Vectors]]:
    # A multiple of 8, because a block's live bits start at a byte.
    step = max(8, _SCRATCH_BYTES // (4 * rows.shape[1]) & ~7)
    scratch = np.empty((min(step, len(rows)), rows.shape[1]), dtype=np.float32)
    for offset in range(0, len(rows), step):
        part = rows[offset : offset + step]
        block = scratch[: len(part)]
        start = first + offset
        half_to_float(part, None if norms is None else norms.read(start, start + len(part)), block)
        yield start, block


def _search_in_float64(view: View, query: Vectors, k: int) -> tuple[Distances, Slots]:
    slots = live_slots(view.live.bits, view.count)
    wide: NDArray[Any] = query.astype(np.float64)
    distances = np.empty(slots.size, dtype=np.float64)
    for start in range(0, slots.size, _FLOAT64_ROWS):
        part = slice(start, start + _FLOAT64_ROWS)
        rows = view.vectors.take(slots[part]).astype(np.float64)
        if view.format.metric == "l2":
            distances[part] = np.linalg.norm(rows - wide, axis=1)
        elif view.format.metric == "ip":
            distances[part] = -(rows @ wide)
        else:
            norms = np.linalg.norm(rows, axis=1)
            distances[part] = np.maximum(1.0 - rows @ wide / norms, 0.0)
    order = np.argsort(distances, kind="stable")[:k]
    return distances[order], slots[order]
