"""Trains a codebook on some of a dataset's rows: the lists' centroids by k-means, then FAISS's
quantizer.

K-means is done here, not by FAISS, so that it can be cancelled between two blocks of rows. With
four million rows of 768, one round takes a minute.
"""

from __future__ import annotations

import math

import faiss
import numpy as np

from syncd.index.codes.codes import (
    Codebook,
    encodable,
    faiss_metric,
    new_index,
    padded_dim,
    quantizers_for,
)
from syncd.index.rows.vectors import Vectors
from syncd.index.storage.bitmap import Slots, live_slots
from syncd.index.storage.stopping import Cancelled, Stop
from syncd.index.view import View

ROWS_PER_LIST = 40
TRAINING_BYTES = 512 << 20
QUANTIZER_ROWS = 16_384
ROUNDS = 5
BLOCK_ROWS = 4096
"""Rows per block: numpy holds the interpreter for milliseconds at most, and searches go on."""

QUANTIZER_ROUNDS = 12
"""Rounds of k-means for the quantizer.

FAISS's default, 25, takes twice as long. Among 100 candidates it finds 0.001 more of the ten
nearest.
"""


def lists_for(rows: int) -> int:
    """Number of lists for a dataset of ``rows`` rows: the power of two nearest to the square root.

    It is fewer than usual for IVF: with 4-bit codes, scanning is cheap compared to finding the
    lists. Measured with a million rows of 128 at recall 0.985: 0.40 ms with 1024 lists, 0.53 ms
    with 512. With 4096 lists it takes a quarter more than with 1024, and the build three times as
    long. Measured with 60,000 rows of 784 at 0.99: 0.17 ms with 256 lists, 0.22 ms with 512 or
    1024.

    A second list for each row (SOAR: Sun et al., NeurIPS 2023) is not used. Measured with 509,490
    texts of 256 and real queries of another kind, at 0.95 and 0.98: 0.45 and 0.62 ms with 512 lists
    and one list for each row; 0.43 and 0.81 ms with 1024 lists, two lists for each row and twice
    the memory. At 0.98 most lists are searched in both cases.
    """
    return max(1, min(1 << round(math.log2(max(rows, 1)) / 2), rows // ROWS_PER_LIST))


def training_rows(rows: int, dim: int) -> int:
    """Number of rows on which a codebook for a dataset of ``rows`` rows is trained."""
    wanted = max(lists_for(rows) * ROWS_PER_LIST, QUANTIZER_ROWS)
    return min(wanted, TRAINING_BYTES // (4 * dim))


def train(
    view: View, number: int, seed: int, stop: Stop, *, expected: int | None = None
) -> Codebook:
    """A codebook for the live rows of ``view``, at least one; raises ``Cancelled``.

    ``expected`` is the number of rows if more are still being read.
    """
    dim, metric = view.dim or 0, view.format.metric
    expected = view.live.count if expected is None else expected
    lists, wanted = lists_for(expected), training_rows(expected, dim)
    random = np.random.default_rng(seed)
    slots = live_slots(view.live.bits, view.count)
    if slots.size > wanted:
        slots = np.sort(random.choice(slots, wanted, replace=False))
    lists = min(lists, slots.size)
    width = padded_dim(dim)
    rows = _read(view, slots, width, stop)
    quantizer = faiss.IndexFlat(width, faiss_metric(metric))
    quantizer.add(kmeans(rows, lists, random, stop, spherical=metric != "l2"))
    template = new_index(quantizer, metric, lists, width=width, quantizers=quantizers_for(dim))
    template.pq.cp.niter = QUANTIZER_ROUNDS
    template.train(np.ascontiguousarray(rows[random.permutation(len(rows))[:QUANTIZER_ROWS]]))
    return Codebook(number, metric, dim, expected, view.count, quantizer, template)


def kmeans(
    rows: Vectors, lists: int, random: np.random.Generator, stop: Stop, *, spherical: bool
) -> Vectors:
    """Centroids (lists, dim) of ``rows``, by Lloyd's algorithm.

    With ``spherical`` they are unit vectors, compared by their inner product.
    """
    centroids = rows[np.sort(random.choice(len(rows), lists, replace=False))].copy()
    for _ in range(ROUNDS):
        if spherical:
            _normalise(centroids)
        nearest = faiss.IndexFlat(
            rows.shape[1], faiss.METRIC_INNER_PRODUCT if spherical else faiss.METRIC_L2
        )
        nearest.add(centroids)
        sums = np.zeros(centroids.shape, dtype=np.float64)
        counts = np.zeros(lists, dtype=np.int64)
        for start in range(0, len(rows), BLOCK_ROWS):
            if stop():
                raise Cancelled
            block = rows[start : start + BLOCK_ROWS]
            chosen = nearest.search(block, 1)[1][:, 0]
            order = chosen.argsort(kind="stable")
            ids, firsts = np.unique(chosen[order], return_index=True)
            sums[ids] += np.add.reduceat(block[order], firsts, axis=0)
            counts += np.bincount(chosen, minlength=lists)
        (empty,) = (counts == 0).nonzero()
        centroids = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        if empty.size:  # an empty list takes a random row
            centroids[empty] = rows[random.choice(len(rows), empty.size)]
    if spherical:
        _normalise(centroids)
    return np.ascontiguousarray(centroids)


def _normalise(centroids: Vectors) -> None:
    norms = np.linalg.norm(centroids, axis=1)
    norms[norms == 0] = 1
    centroids /= norms[:, None]


def _read(view: View, slots: Slots, width: int, stop: Stop) -> Vectors:
    rows = np.empty((slots.size, width), dtype=np.float32)
    for start in range(0, slots.size, BLOCK_ROWS):
        if stop():
            raise Cancelled
        some = slots[start : start + BLOCK_ROWS]
        rows[start : start + some.size] = encodable(view.compared_rows(some), width)
    return rows
