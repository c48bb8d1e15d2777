"""Measure recall: some rows as queries, their exact neighbours, and what the codes find of them with each setting."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from syncd.index.approximate import exact_distances, rows_of
from syncd.index.calibration import EXACT_NS_PER_ELEMENT, KS, Calibration, Point, cost_us, frontier
from syncd.index.codes import Codes, LiveCodes, Stop
from syncd.index.exact import Distances, blocks, search_block, use_one_thread
from syncd.index.live import Slots, live_slots
from syncd.index.training import Cancelled
from syncd.index.vectors import Vectors
from syncd.index.view import View

QUERIES = 256
CANDIDATES = {10: (20, 40, 70, 100, 150, 200, 300, 400), 100: (150, 200, 300, 400, 700, 1000, 1600)}
NPROBE_STEP = 1.3
ENOUGH = 0.999
CHEAPER_THAN_EXACT = 0.7
"""Settings that are expected to cost more than this share of an exact search are not used."""
BLOCK_BYTES = 2 << 20
"""All queries are compared with so much at a time: it stays in the second-level cache, and 256 queries cost a fifth of 256 searches."""

_SAME = 1 + 1e-6


def calibrate(view: View, codes: Codes, seed: int, stop: Stop) -> Calibration:
    """The settings worth using with ``codes``, measured on ``view``; raises ``Cancelled``."""
    use_one_thread()
    slots = live_slots(view.live, view.count)
    if slots.size > QUERIES:
        slots = np.sort(np.random.default_rng(seed).choice(slots, QUERIES, replace=False))
    if slots.size < 2:
        return Calibration(view.live_count, view.count, ())
    queries = np.ascontiguousarray(rows_of(view, slots))
    exact = nearest_others(view, queries, slots, max(KS), stop)
    codebook, dim, live = codes.codebook, view.dim or 1, LiveCodes(codes, view.live)
    most_us = CHEAPER_THAN_EXACT * view.live_count * dim * EXACT_NS_PER_ELEMENT / 1000
    points: list[Point] = []
    nprobe = max(1, codebook.lists // 256)
    while True:
        measured = _recalls(view, live, queries, slots, exact, nprobe, stop)
        cheap = False
        for (k, candidates), (recall, error) in measured.items():
            us = cost_us(
                rows=view.live_count,
                dim=dim,
                codes=codebook.template.pq.M,
                lists=codebook.lists,
                nprobe=nprobe,
                candidates=candidates,
            )
            if us <= most_us:
                points.append(Point(k, nprobe, candidates, recall, error, us))
                cheap = True
        if not cheap or nprobe >= codebook.lists or all(_best(measured, k) >= ENOUGH for k in KS):
            return Calibration(view.live_count, view.count, frontier(points))
        nprobe = min(codebook.lists, max(nprobe + 1, int(nprobe * NPROBE_STEP)))


def nearest_others(view: View, queries: Vectors, own: Slots, k: int, stop: Stop) -> tuple[Distances, Slots]:
    """For each query the ``k`` nearest live rows but its ``own``: distances ascending and slots (q, k), infinite and -1 where there are fewer."""
    distances = np.full((len(queries), 1), np.inf)
    slots = np.full((len(queries), 1), -1, dtype=np.int64)
    step = max(8, BLOCK_BYTES // (4 * queries.shape[1]) & ~7)
    for first, rows, all_live in blocks(view):
        for offset in range(0, len(rows), step):
            if stop():
                raise Cancelled
            found = search_block(view, queries, k + 1, first + offset, rows[offset : offset + step], all_live)
            distances, slots = np.hstack((distances, found[0])), np.hstack((slots, found[1]))
            if distances.shape[1] > k + 1:
                nearest = distances.argpartition(k, axis=1)[:, : k + 1]
                distances = np.take_along_axis(distances, nearest, axis=1)
                slots = np.take_along_axis(slots, nearest, axis=1)
    distances[(slots == own[:, None]) | (slots < 0)] = np.inf
    order = distances.argsort(axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(slots, order, axis=1)


def _recalls(
    view: View,
    live: LiveCodes,
    queries: Vectors,
    own: Slots,
    exact: tuple[Distances, Slots],
    nprobe: int,
    stop: Stop,
) -> dict[tuple[int, int], tuple[float, float]]:
    """Mean recall and its standard error by (k, candidates). One search serves all: fewer candidates are the first of more."""
    most = max(max(CANDIDATES[k]) for k in KS)
    setting = Point(0, nprobe, most + 1, 0.0, 0.0, 0.0)
    there = np.isfinite(exact[0]).sum(axis=1)
    shares: dict[tuple[int, int], list[float]] = {}
    for row in range(len(queries)):
        if stop():
            raise Cancelled
        approximate, labels = live.candidates(queries[row : row + 1], setting)
        near = labels[0][(approximate[0] if view.format.metric == "l2" else -approximate[0]).argsort(kind="stable")]
        near = near[(near >= 0) & (near != own[row])][:most]  # the query itself is no answer
        distances = exact_distances(view, queries[row], near)
        for k in KS:
            wanted = min(k, int(there[row]))
            if not wanted:
                continue
            farthest = exact[0][row, wanted - 1]
            limit = farthest + abs(farthest) * (_SAME - 1) + 1e-12  # of rows equally far, any will do
            in_tail = int(np.count_nonzero(exact[1][row, :wanted] >= live.codes.stop))
            good: NDArray[np.int64] = np.cumsum(distances <= limit)
            for candidates in CANDIDATES[k]:
                hits = int(good[min(candidates, good.size) - 1]) if good.size else 0
                shares.setdefault((k, candidates), []).append(min(hits + in_tail, wanted) / wanted)
    return {
        key: (float(np.mean(values)), float(np.std(values) / np.sqrt(len(values)))) for key, values in shares.items()
    }


def _best(measured: dict[tuple[int, int], tuple[float, float]], k: int) -> float:
    return max((recall for (of, _), (recall, _) in measured.items() if of == k), default=1.0)
