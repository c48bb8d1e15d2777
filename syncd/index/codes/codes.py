"""Codes: a compressed copy of the older rows, which gives a search its candidates.

Up to a few immutable *parts*, each an IVF index of 4-bit product-quantized vectors over a range of
slots (FAISS' ``IndexIVFPQFastScan``, after André et al., "Quicker ADC", 2019), all with one
codebook: the centroids of the lists and the quantizer's. Ids are slots. A part is never changed, so
its rows are never removed: ``remove_ids`` followed by ``add`` corrupts these indexes silently. Rows
that died are left out by the view's live bitmap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from syncd.index.codes.calibration import Calibration, Point
from syncd.index.rows.vectors import Vectors
from syncd.index.storage.bitmap import Bitmap, Slots
from syncd.index.storage.files import SavedFile
from syncd.types import Metric

library: Any = faiss
"""FAISS, whose type stubs lack much of what its Python layer adds."""

PAIRS_UP_TO_DIM = 256
"""A 4-bit code stands for two dimensions up to here, for four above."""

MOST_CHOSEN = 1000
"""Whoever may search may ask for any recall."""

_LARGEST = np.float32(1e15)
"""Numbers are cut to this size before they are encoded: their squares then stay finite. Distances
come from the vectors themselves.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """What the parts share. ``template`` is a trained index without rows; ``quantizer`` finds the
    lists of a query.
    """

    number: int
    metric: Metric
    dim: int
    trained_rows: int
    """Live rows of the dataset when this was trained."""
    trained_slots: int
    """Slots of the dataset then: what has come since, by insert or update, is what this does not
    know.
    """
    quantizer: Any
    template: Any
    file: list[SavedFile] = field(default_factory=list)
    """Empty until the file is durable."""

    @property
    def lists(self) -> int:
        """How many lists there are."""
        return int(self.quantizer.ntotal)

    def encodable(self, rows: Vectors) -> Vectors:
        """(n, dim) as this codebook's indexes take them: finite squares, and as many dimensions as
        codes stand for.
        """
        cut: Vectors = np.clip(rows, -_LARGEST, _LARGEST)
        return self.padded(cut)

    def padded(self, rows: Vectors) -> Vectors:
        """(n, dim) with zeros up to the dimension of the indexes."""
        width = padded_dim(self.dim)
        if rows.shape[1] == width:
            return rows
        wider = np.zeros((len(rows), width), dtype=np.float32)
        wider[:, : self.dim] = rows
        return wider


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The codes of the rows that lived in ``start <= slot < stop`` when it was built; ``sizes`` are
    its lists' rows, (lists,).
    """

    number: int
    start: int
    stop: int
    rows: int
    sizes: NDArray[np.int64]
    index: Any
    file: list[SavedFile] = field(default_factory=list)
    """Empty until the file is durable."""


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Parts in the order of their slots, from 0 without a gap; what lies at ``stop`` and after is
    searched exactly.
    """

    generation: int
    codebook: Codebook
    parts: tuple[Part, ...]
    calibration: Calibration
    unevenness_trained: float = 1.0
    """``unevenness`` when the codebook was new."""
    _chosen: dict[tuple[int, float], Point | None] = field(default_factory=dict, init=False)

    def point(self, k: int, recall: float) -> Point | None:
        """``Calibration.choose``, kept for those who ask for the same."""
        try:
            return self._chosen[k, recall]
        except KeyError:
            if len(self._chosen) >= MOST_CHOSEN:
                self._chosen.clear()
            point = self._chosen[k, recall] = self.calibration.choose(k, recall)
            return point

    @property
    def unevenness(self) -> float:
        """What scanning a row's own list costs, against lists of one size: 1 at best (Jégou et al.,
        2011: imbalance factor).
        """
        sizes: NDArray[np.float64] = np.array(
            [part.sizes for part in self.parts], dtype=np.float64
        ).sum(axis=0)
        return float(len(sizes) * (sizes**2).sum() / max(sizes.sum(), 1.0) ** 2)

    @property
    def stop(self) -> int:
        """The first slot without a code; a multiple of eight, so that the rest begins with a byte
        of the bitmap.
        """
        return self.parts[-1].stop if self.parts else 0

    @property
    def nbytes(self) -> int:
        """Memory of codes, ids and centroids."""
        rows, book = sum(part.rows for part in self.parts), self.codebook
        return rows * (int(book.template.code_size) + 8) + book.lists * padded_dim(book.dim) * 4

    @property
    def disk_bytes(self) -> int:
        """Bytes in files."""
        return sum(
            file.bytes
            for files in (self.codebook.file, *(part.file for part in self.parts))
            for file in files
        )


class LiveCodes:
    """The codes of one view: with its live bitmap, and what FAISS needs made once. Any threads may
    search.
    """

    __slots__ = ("_bits", "_parameters", "_selector", "codes")

    def __init__(self, codes: Codes, live: Bitmap) -> None:
        self.codes = codes
        # FAISS reads this memory: it lives as long as the selector
        self._bits = live[: codes.stop >> 3]
        self._selector: Any = None
        self._parameters: dict[int, Any] = {}

    def parameters(self, nprobe: int) -> Any:
        """FAISS' parameters, which an IVF search only reads; two threads that make them at once do
        no harm.
        """
        found = self._parameters.get(nprobe)
        if found is None:
            if self._selector is None:
                self._selector = faiss.IDSelectorBitmap(self._bits.size, faiss.swig_ptr(self._bits))
            found = library.SearchParametersIVF(sel=self._selector, nprobe=nprobe)
            self._parameters[nprobe] = found
        return found

    def candidates(self, queries: Vectors, point: Point) -> tuple[NDArray[np.float32], Slots]:
        """For each query of (q, dim): approximate distances and slots (q, at most
        ``point.candidates`` a part), -1 where there are fewer.

        All have codes and are live. From several parts they come part by part, from one in the
        order of FAISS.
        """
        codebook, count = self.codes.codebook, len(queries)
        queries = codebook.padded(queries)
        nprobe = min(point.nprobe, codebook.lists)
        parameters, pointer = self.parameters(nprobe), faiss.swig_ptr
        lists = np.empty((count, nprobe), dtype=np.int64)
        list_distances = np.empty((count, nprobe), dtype=np.float32)
        at = pointer(queries)
        codebook.quantizer.search_c(count, at, nprobe, pointer(list_distances), pointer(lists))
        found = []
        for part in self.codes.parts:  # one search for the lists serves them all
            wanted = min(point.candidates, part.rows)
            if not wanted:
                continue
            distances = np.empty((count, wanted), dtype=np.float32)
            slots = np.empty((count, wanted), dtype=np.int64)
            part.index.search_preassigned_c(
                count,
                at,
                wanted,
                pointer(lists),
                pointer(list_distances),
                pointer(distances),
                pointer(slots),
                False,
                parameters,
            )
            found.append((distances, slots))
        if len(found) == 1:
            return found[0]
        if not found:
            return np.empty((count, 0), dtype=np.float32), np.empty((count, 0), dtype=np.int64)
        return np.concatenate([one[0] for one in found], axis=1), np.concatenate(
            [one[1] for one in found], axis=1
        )


def padded_dim(dim: int) -> int:
    """The dimension of the indexes: a multiple of what one code stands for."""
    step = 2 if dim <= PAIRS_UP_TO_DIM else 4
    return math.ceil(dim / step) * step


def new_index(quantizer: Any, metric: Metric, dim: int, lists: int) -> Any:
    """An untrained index. Codes are of the rows themselves and not of what is left of them after
    their list's centroid.

    On a million rows of 128, that halves the time in the lists (290 µs against 535 for 64 of 1024
    lists) and needs no table of 64 bytes times 16 for each list; recall among 200 candidates stays
    the same (0.989), and calibration takes more candidates where it does not.
    """
    width = padded_dim(dim)
    codes = width // (2 if dim <= PAIRS_UP_TO_DIM else 4)
    index = faiss.IndexIVFPQFastScan(quantizer, width, lists, codes, 4, faiss_metric(metric))
    index.by_residual = False
    return index


def faiss_metric(metric: Metric) -> int:
    """Cosine is the inner product of normalised vectors."""
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def empty_part(codebook: Codebook) -> Any:
    """An index without rows that takes them with ``add_with_ids``; to be closed by
    ``without_quantizer``.
    """
    index = new_index(codebook.quantizer, codebook.metric, codebook.dim, codebook.lists)
    index.pq = codebook.template.pq
    index.is_trained = True
    return index


def list_sizes(index: Any) -> NDArray[np.int64]:
    """How many rows each list has, (lists,)."""
    return np.array(
        [index.invlists.list_size(number) for number in range(index.nlist)], dtype=np.int64
    )


def without_quantizer(codebook: Codebook, index: Any) -> Any:
    """A finished part: it keeps no centroids, in memory or on disk, since the codebook's quantizer
    finds the lists.
    """
    nothing = library.IndexFlat(padded_dim(codebook.dim), faiss_metric(codebook.metric))
    index.quantizer = nothing
    nothing.this.disown()
    index.own_fields = True
    return index
