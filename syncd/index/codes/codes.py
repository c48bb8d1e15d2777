"""Codes: a compressed copy of the older rows, from which a search takes its candidates.

There are a few immutable *parts*. Each is an IVF index of 4-bit product-quantized vectors over a
range of slots: FAISS's ``IndexIVFPQFastScan``, after André et al., "Quicker ADC", 2019. All parts
share one codebook: the centroids of the lists and of the quantizer. Ids are slots.

Invariant: a part is never changed, so its rows are never removed: in FAISS, ``remove_ids`` followed
by ``add`` corrupts these indexes silently. The view's live bitmap leaves out rows that died.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from syncd.index.codes.calibration import Calibration, Point
from syncd.index.codes.huge_pages import use_huge_pages
from syncd.index.rows.vectors import Vectors
from syncd.index.storage.bitmap import Bitmap, Slots
from syncd.index.storage.files import SavedFile
from syncd.types import Metric

library: Any = faiss
"""FAISS without types: its stubs lack many functions of its Python layer."""

PAIRS_UP_TO_DIM = 128
"""Largest dimension for which a 4-bit code stands for two dimensions; above, it stands for four.

Four take half of the memory and of the scan, and want more candidates. Measured at equal recall of
real queries: 509,490 texts of 256 at 0.95 take 0.41 ms with four and 0.73 ms with two, at 0.98 0.62
and 1.7 ms. A million rows of SIFT, of 128, take a quarter more with four than with two.
"""

BLOCK_ROWS = 64
"""Rows whose codes FAISS keeps and scans together (``bbs``): 0.9 of the time of 32, its default."""

NEAR_LISTS = 8
"""Number of nearest lists whose mean distance is the unit of ``Point.reach``."""

_UNKNOWN = object()
"""Mark of a selector that is not made yet; None is a selector of all rows."""

MOST_CHOSEN = 1000
"""Most remembered choices of settings, because any client may ask for any recall."""

_LARGEST = np.float32(1e15)
"""Largest number that is encoded; larger ones are cut to it, so that their squares stay finite.

Distances come from the vectors themselves.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """The codebook that all parts share.

    ``template`` is a trained index without rows; ``quantizer`` finds the lists of a query.
    """

    number: int
    metric: Metric
    dim: int
    trained_rows: int
    """Number of live rows in the dataset when the codebook was trained."""
    trained_slots: int
    """Number of slots in the dataset at that time.

    The codebook does not know rows that came later, by insert or update.
    """
    quantizer: Any
    template: Any
    file: list[SavedFile] = field(default_factory=list)
    """Empty until the file is durable."""

    @property
    def lists(self) -> int:
        """Number of lists."""
        return int(self.quantizer.ntotal)

    @property
    def width(self) -> int:
        """Dimension of the indexes: ``dim``, padded."""
        return int(self.template.d)

    @property
    def quantizers(self) -> int:
        """Number of 4-bit codes of a row."""
        return int(self.template.pq.M)

    @property
    def is_current(self) -> bool:
        """Whether a new codebook would have the same form; an earlier version's may not."""
        form = (self.width, self.quantizers, int(self.template.bbs))
        return form == (padded_dim(self.dim), quantizers_for(self.dim), BLOCK_ROWS)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The codes of the rows in ``start <= slot < stop`` that were live when the part was built.

    ``sizes`` (lists,) is the number of rows in each list.
    """

    number: int
    start: int
    stop: int
    rows: int
    sizes: NDArray[np.int64]
    index: Any
    file: list[SavedFile] = field(default_factory=list)
    """Empty until the file is durable."""

    def __post_init__(self) -> None:
        use_huge_pages(self.index)


@dataclass(frozen=True, slots=True, eq=False)
class Codes:
    """Parts in the order of their slots, from slot 0 without a gap.

    The *tail*, the slots at ``stop`` and after, is searched exactly.
    """

    generation: int
    codebook: Codebook
    parts: tuple[Part, ...]
    calibration: Calibration
    unevenness_trained: float = 1.0
    """The value of ``unevenness`` when the codebook was new."""
    _chosen: dict[tuple[int, float], Point | None] = field(default_factory=dict, init=False)

    def point(self, k: int, recall: float) -> Point | None:
        """``Calibration.choose``, with its answers remembered."""
        try:
            return self._chosen[k, recall]
        except KeyError:
            if len(self._chosen) >= MOST_CHOSEN:
                self._chosen.clear()
            point = self._chosen[k, recall] = self.calibration.choose(k, recall)
            return point

    @property
    def unevenness(self) -> float:
        """See ``unevenness``."""
        return unevenness(np.sum([part.sizes for part in self.parts], axis=0))

    @property
    def stop(self) -> int:
        """The first slot without a code.

        It is a multiple of eight, so that the tail starts at a byte of the bitmap.
        """
        return self.parts[-1].stop if self.parts else 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory of codes, ids and centroids."""
        rows, book = sum(part.rows for part in self.parts), self.codebook
        return rows * (int(book.template.code_size) + 8) + book.lists * book.width * 4

    @property
    def files(self) -> list[SavedFile]:
        """The files of the codebook and the parts that are written."""
        every = (self.codebook.file, *(part.file for part in self.parts))
        return [file for files in every for file in files]

    @property
    def disk_bytes(self) -> int:
        """Bytes in the files of the codebook and the parts."""
        return sum(file.bytes for file in self.files)


class LiveCodes:
    """The codes of one view, with its live bitmap and the objects that FAISS needs, made once.

    Any number of threads may search.
    """

    __slots__ = ("_bits", "_parameters", "_selector", "codes")

    def __init__(self, codes: Codes, live: Bitmap) -> None:
        self.codes = codes
        # FAISS reads this memory, so it must live as long as the selector.
        self._bits = live[: codes.stop >> 3]
        self._selector: Any = _UNKNOWN
        self._parameters: dict[int, Any] = {}

    def parameters(self, nprobe: int) -> Any:
        """FAISS's parameters for a search. An IVF search only reads them.

        Two threads may make them at the same time without harm.
        """
        found = self._parameters.get(nprobe)
        if found is None:
            if self._selector is _UNKNOWN:
                self._selector = self._make_selector()
            found = library.SearchParametersIVF(sel=self._selector, nprobe=nprobe)
            self._parameters[nprobe] = found
        return found

    def _make_selector(self) -> Any:
        """The selector of the live rows; None if every row with a code is live.

        To test the rows takes up to 5 % of a search.
        """
        live = int(np.bitwise_count(self._bits).sum(dtype=np.int64))
        if live == sum(part.rows for part in self.codes.parts):
            return None
        return faiss.IDSelectorBitmap(self._bits.size, faiss.swig_ptr(self._bits))

    def near_lists(
        self, queries: Vectors, most: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """The ``most`` nearest lists of each query of (q, width): numbers and distances.

        Three arrays (q, most), nearest first: the lists' numbers; distances as FAISS computes them;
        and distances of which the smallest is the nearest: squared for l2, else one minus the
        cosine.
        """
        codebook, count, pointer = self.codes.codebook, len(queries), faiss.swig_ptr
        lists = np.empty((count, most), dtype=np.int64)
        found = np.empty((count, most), dtype=np.float32)
        codebook.quantizer.search_c(count, pointer(queries), most, pointer(found), pointer(lists))
        if codebook.metric == "l2":
            return lists, found, found
        norms = np.ones((1, 1), dtype=np.float32)
        if codebook.metric == "ip":
            norms = np.linalg.norm(queries, axis=1, keepdims=True)
            norms[norms == 0] = 1
        return lists, found, 1 - found / norms

    def candidates(self, queries: Vectors, point: Point) -> tuple[NDArray[np.float32], Slots]:
        """Candidates of each query of (q, dim): approximate distances and slots.

        Their shape is (q, at most ``point.candidates`` per part); missing slots are -1. All slots
        have codes and are live. Candidates of several parts come part by part; those of one part in
        FAISS's order.
        """
        codebook, count = self.codes.codebook, len(queries)
        queries = padded(queries, codebook.width)
        nprobe = min(point.nprobe, codebook.lists)
        lists, list_distances, relative = self.near_lists(queries, nprobe)
        if point.reach is not None:
            wanted_lists = lists_within(relative, point.reach)
            if count == 1:  # FAISS reads only the first of them
                nprobe = int(wanted_lists[0])
            else:
                lists[np.arange(nprobe) >= wanted_lists[:, None]] = -1
        parameters, pointer = self.parameters(nprobe), faiss.swig_ptr
        at = pointer(queries)
        found = []
        for part in self.codes.parts:  # the lists are searched once for all parts
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


def unevenness(sizes: NDArray[np.int64]) -> float:
    """Cost of scanning a row's own list, relative to lists of equal size; 1 is the best.

    ``sizes`` (lists,) are the numbers of rows. Source: Jégou et al., 2011, imbalance factor.
    """
    rows = sizes.astype(np.float64)
    return float(len(rows) * (rows**2).sum() / max(rows.sum(), 1.0) ** 2)


def lists_within(distances: NDArray[np.float32], reach: float) -> NDArray[np.int64]:
    """Number of lists that a query searches, at least one, (q,).

    They are those at most ``reach`` times as far as its nearest lists are on average.
    ``distances`` (q, lists) are ascending, as ``LiveCodes.near_lists`` returns them. A query
    between many lists searches more of them than a query close to one.
    """
    near = distances[:, :NEAR_LISTS]
    limits = near.sum(axis=1) * np.float32(reach / near.shape[1])
    within: NDArray[np.int64] = np.maximum((distances <= limits[:, None]).sum(axis=1), 1)
    return within


def encodable(rows: Vectors, width: int) -> Vectors:
    """(n, dim) as indexes of dimension ``width`` take them: padded, with finite squares."""
    cut: Vectors = np.clip(rows, -_LARGEST, _LARGEST)
    return padded(cut, width)


def padded(rows: Vectors, width: int) -> Vectors:
    """(n, dim), padded with zeros to (n, width)."""
    if rows.shape[1] == width:
        return rows
    wider = np.zeros((len(rows), width), dtype=np.float32)
    wider[:, : rows.shape[1]] = rows
    return wider


def padded_dim(dim: int) -> int:
    """The dimension of new indexes: a multiple of the dimensions per code."""
    step = _step(dim)
    return math.ceil(dim / step) * step


def quantizers_for(dim: int) -> int:
    """Number of 4-bit codes of a row in new indexes."""
    return padded_dim(dim) // _step(dim)


def _step(dim: int) -> int:
    return 2 if dim <= PAIRS_UP_TO_DIM else 4


def new_index(
    quantizer: Any,
    metric: Metric,
    lists: int,
    *,
    width: int,
    quantizers: int,
    block_rows: int | None = None,
) -> Any:
    """An untrained index, by default with blocks of ``BLOCK_ROWS`` rows.

    It encodes the rows themselves, not their residuals to a list's centroid.

    For a million rows of 128 this halves the time in the lists: 290 µs instead of 535 µs for 64 of
    1024 lists. It also needs no table of 64 bytes times 16 per list. Recall among 200 candidates
    stays the same (0.989); if it is lower for other data, calibration takes more candidates.
    """
    index = faiss.IndexIVFPQFastScan(
        quantizer, width, lists, quantizers, 4, faiss_metric(metric), block_rows or BLOCK_ROWS
    )
    index.by_residual = False
    return index


def faiss_metric(metric: Metric) -> int:
    """FAISS's metric; cosine is the inner product of normalized vectors."""
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


def empty_part(codebook: Codebook) -> Any:
    """An index without rows, to be filled with ``add_with_ids`` and finished by
    ``without_quantizer``.
    """
    index = new_index(
        codebook.quantizer,
        codebook.metric,
        codebook.lists,
        width=codebook.width,
        quantizers=codebook.quantizers,
        block_rows=int(codebook.template.bbs),
    )
    index.pq = codebook.template.pq
    index.is_trained = True
    return index


def list_sizes(index: Any) -> NDArray[np.int64]:
    """Number of rows in each list, (lists,)."""
    return np.array(
        [index.invlists.list_size(number) for number in range(index.nlist)], dtype=np.int64
    )


def without_quantizer(codebook: Codebook, index: Any) -> Any:
    """A finished part, without centroids in memory or on disk: the codebook's quantizer finds the
    lists.
    """
    nothing = library.IndexFlat(codebook.width, faiss_metric(codebook.metric))
    index.quantizer = nothing
    nothing.this.disown()
    index.own_fields = True
    return index
