"""A sample of the queries that were really asked of one dataset, to measure recall on them.

Rows that serve as queries overstate recall if the queries are unlike the rows. Measured on 60,000
embeddings of text, with queries of another kind: 0.95 on rows, 0.88 on the queries.

Invariant: the sample is only in memory, and never in a log, a metric or a file. Its size is
bounded for each dataset, and for all datasets together. Each of the last queries has the same
chance to be in it (reservoir sampling: Vitter, 1985, algorithm R). The count of earlier queries
is bounded, so that old queries fade.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from random import random

import numpy as np
from numpy.typing import NDArray

from syncd.index.filter.language import Filter
from syncd.index.rows.vectors import Vectors
from syncd.types import Key, RecallOf

SAMPLED = 512
"""Number of queries in a full sample."""
REMEMBERED = 16 * SAMPLED
"""Largest count of earlier queries: from then on one query in 16 takes a place in the sample."""
ENOUGH = 200
"""Number of different queries from which recall is measured on them."""
RENEWED = 0.5
"""Share of the sample that is new before recall is measured again."""
DATASET_BYTES = 4 << 20
"""Bytes of one dataset's sample at most: 512 queries of 2,048 dimensions."""
TOTAL_BYTES = 64 << 20
"""Bytes of all samples of the process. Datasets that come too late have no sample."""
FILTER_BYTES = 4096
"""Largest filter that is kept; a query with a larger one is not sampled."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Sample:
    """The sampled queries at one moment, in random order. Its text shows none of them."""

    queries: Vectors
    """(n, dim), as the clients sent them."""
    filters: Sequence[Filter | None]
    own: Sequence[Key | None]
    """Key of the row that the search left out; None: a query that is not a row."""
    taken: int
    """Number of queries that the sample had taken up."""

    def __len__(self) -> int:
        return len(self.queries)

    def filtered(self, count: int) -> Sample:
        """At most ``count`` of the queries that have a filter."""
        places = [place for place, each in enumerate(self.filters) if each is not None][:count]
        return Sample(
            self.queries[places],
            [self.filters[place] for place in places],
            [self.own[place] for place in places],
            self.taken,
        )


class AskedQueries:
    """The sample of one dataset. Any thread may add to it and read it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._rows: Vectors = np.empty((0, 0), dtype=np.float32)
        self._filters: list[Filter | None] = []
        self._own: list[Key | None] = []
        self._hashes: list[int] = []
        self._numbers: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._seen = 0
        self._taken = 0
        self._measured = 0

    def note(self, queries: Vectors, wanted: Filter | None, own: Key | None) -> None:
        """Sample the queries (q, dim) of a search that was answered. One query costs 0.3 to 2 µs.

        ``wanted`` is their filter, and ``own`` the key of the row that is the query.
        """
        if wanted is not None and len(wanted.text) > FILTER_BYTES:
            return
        with self._lock:
            if queries.shape[1] != self._rows.shape[1] and not self._begin(queries.shape[1]):
                return
            size = len(self._rows)
            for query in queries:
                seen = self._seen = min(self._seen + 1, REMEMBERED)
                place = len(self._own)
                if place == size:
                    place = int(random() * seen)  # noqa: S311 - a sample, not a secret
                    if place >= size:
                        continue
                else:
                    self._filters.append(None)
                    self._own.append(None)
                    self._hashes.append(0)
                self._rows[place] = query
                self._filters[place] = wanted
                self._own[place] = own
                self._hashes[place] = hash(query.tobytes())
                self._taken += 1
                self._numbers[place] = self._taken

    def _begin(self, dim: int) -> bool:
        """Make room for queries of this dimension; returns whether there is room."""
        _memory.free(self)
        self._clear()
        size = min(SAMPLED, DATASET_BYTES // (4 * max(dim, 1)))
        if size < ENOUGH or not _memory.reserve(self, size * dim * 4):
            return False
        self._rows = np.empty((size, dim), dtype=np.float32)
        self._numbers = np.zeros(size, dtype=np.int64)
        return True

    def is_due(self, dim: int, measured_on: RecallOf) -> bool:
        """Whether recall, last measured on ``measured_on``, is to be measured on the sample now."""
        with self._lock:
            if len(self._own) < ENOUGH or self._rows.shape[1] != dim:
                return False
            if measured_on == "queries":
                new = int(np.count_nonzero(self._numbers > self._measured))
                if new < max(RENEWED * len(self._rows), ENOUGH):
                    return False
            return len(set(self._hashes)) >= ENOUGH

    def sample(self, seed: int = 0) -> Sample | None:
        """The present sample; None if there are not ``ENOUGH`` different queries."""
        with self._lock:
            if len(set(self._hashes)) < ENOUGH:
                return None
            order = np.random.default_rng(seed).permutation(len(self._own))
            return Sample(
                self._rows[order],
                [self._filters[place] for place in order],
                [self._own[place] for place in order],
                self._taken,
            )

    def measured(self, sample: Sample) -> None:
        """Note that recall was measured on ``sample``."""
        with self._lock:
            self._measured = min(sample.taken, self._taken)

    def __len__(self) -> int:
        return len(self._own)


class _Memory:
    """Bytes of all samples. A finalizer may run anywhere, so it takes no lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Bytes of all samples."""
        return sum([*self._bytes.values()])  # a copy: finalizers may change it meanwhile

    def reserve(self, asked: AskedQueries, number: int) -> bool:
        """Reserve memory until ``free``, or until the sample is gone; returns if there was room."""
        with self._lock:
            if self.used + number > TOTAL_BYTES:
                return False
            self._bytes[id(asked)] = number
        weakref.finalize(asked, self._bytes.pop, id(asked), None)
        return True

    def free(self, asked: AskedQueries) -> None:
        """Give back the memory of a sample."""
        self._bytes.pop(id(asked), None)


_memory = _Memory()
