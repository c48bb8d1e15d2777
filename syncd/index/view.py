"""A reader's view of a dataset: one whole pass, for as long as the reader holds the view.

Invariant: a ``View`` never changes. The writer appends rows past ``count`` and copies the bitmap
before it clears bits of published slots. Then it replaces the index's one reference to its view. So
a reader sees every row of a pass or none. Clearing bits in place would let it see both versions of
an updated row, or neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from syncd.index.codes.codes import LiveCodes
from syncd.index.filter.attributes import AttributesView
from syncd.index.filter.language import Filter
from syncd.index.rows.key_map import Hashes, HashMultimapView
from syncd.index.rows.keys import KeysView, Stored, hash_keys, restore_keys, same_keys, store_keys
from syncd.index.rows.vectors import StoredVectors, VectorFormat, Vectors
from syncd.index.storage.bitmap import Live, Slots, bitmap_bytes, live_slots, prefix, test_bits
from syncd.index.storage.columns import ColumnView
from syncd.types import AttachedColumn, Key, KeyKind

Prints = NDArray[np.int64]
"""Fingerprints of rows as PostgreSQL computed them, (n,) int64; the index treats them as opaque."""


class KeyPage(NamedTuple):
    """Some keys in the order of (hash, key).

    ``next`` is the ``after`` of the next page; None after the last page.
    """

    keys: list[Key]
    next: Key | None


@dataclass(frozen=True, slots=True)
class View:
    """All data that a search of one dataset needs, as of one pass.

    Slots below ``count`` are written; the ``live`` ones among them are the rows. ``dim`` is None
    before the first row.
    """

    format: VectorFormat
    key_kind: KeyKind
    dim: int | None
    count: int
    live: Live
    vectors: ColumnView
    norms: ColumnView | None
    prints: ColumnView
    stored_keys: KeysView
    key_map: HashMultimapView
    codes: LiveCodes | None = None
    """Codes for approximate search; None while the dataset is searched exactly.

    Their slots are below ``count``. Their bits contain no filter.
    """
    attributes: AttributesView | None = None
    share: float = 1.0
    """Share of the pass's rows that a filter passes; 1 without a filter."""

    @property
    def columns(self) -> tuple[AttachedColumn, ...]:
        """The columns for filters and ``include``."""
        return () if self.attributes is None else self.attributes.columns

    def where(self, wanted: Filter | None) -> View:
        """The same pass with only the rows that a filter passes: a search of it finds the nearest
        of them.

        Only here does a filter change the live bitmap; every search takes ``live`` as its selector.
        """
        if wanted is None or self.attributes is None or not self.count:
            return self
        passing = self.attributes.passing(self.count, wanted)
        bits = prefix(self.live.bits, self.count)
        np.bitwise_and(bits, passing[: bitmap_bytes(self.count)], out=bits)
        live = Live.of(bits, self.count, self.vectors.shift)
        share = self.share * live.count / self.live.count if self.live.count else 1.0
        return replace(self, live=live, share=share)

    def find(self, keys: Sequence[Key]) -> Slots:
        """The live slot of each key, (n,); -1 if it is not indexed.

        Raises ``InvalidParams`` for a key of another kind.
        """
        stored = store_keys(self.key_kind, keys)
        return self.find_stored(stored, hash_keys(self.key_kind, stored))

    def find_stored(self, stored: Stored, hashes: Hashes) -> Slots:
        """``find`` for keys in stored form."""
        slots = np.full(len(stored), -1, dtype=np.int64)
        if not hashes.size:
            return slots
        queries, candidates = self.key_map.find(hashes)
        if candidates.size:
            live = test_bits(self.live.bits, candidates)
            queries, candidates = queries[live], candidates[live]
        if candidates.size:  # different keys may share a hash
            same = same_keys(self.stored_keys.take(candidates), stored[queries])
            slots[queries[same]] = candidates[same]
        return slots

    def key_hashes(self) -> Hashes:
        """The hash of every indexed key, in the order of slots."""
        if not self.live.count:
            return np.empty(0, dtype=np.uint64)
        return hash_keys(
            self.key_kind, self.stored_keys.take(live_slots(self.live.bits, self.count))
        )

    def contains(self, keys: Sequence[Key]) -> NDArray[np.bool_]:
        """Whether each of ``keys`` is indexed, (n,) bool."""
        return self.find(keys) >= 0

    def get(self, keys: Sequence[Key], vectors: bool) -> list[tuple[Key, Vectors | None]]:
        """The indexed ones of ``keys``, in the same order; with the user's vector (dim,) if
        ``vectors``.
        """
        slots = self.find(keys)
        (found,) = (slots >= 0).nonzero()
        if not vectors:
            return [(keys[i], None) for i in found.tolist()]
        rows = self.vectors_of(slots[found])
        return [(keys[i], row) for i, row in zip(found.tolist(), rows, strict=True)]

    def vector_of(self, key: Key) -> Vectors | None:
        """The user's vector (dim,) of a key; None if it is not indexed."""
        found = self.get([key], vectors=True)
        return found[0][1] if found else None

    def vectors_of(self, slots: Slots) -> Vectors:
        """The user's vectors (n, dim) of ``slots``."""
        if not slots.size:
            return np.empty((0, self.dim or 0), dtype=np.float32)
        return self.format.restore(self.stored_vectors(slots))

    def stored_vectors(self, slots: Slots) -> StoredVectors:
        """The stored vectors of ``slots``, which has at least one."""
        return StoredVectors(
            self.vectors.take(slots), None if self.norms is None else self.norms.take(slots)
        )

    def compared_rows(self, slots: Slots) -> Vectors:
        """The rows (n, dim) float32 of ``slots`` as searches compare them; under cosine,
        normalized.
        """
        return (
            self.format.as_compared(self.stored_vectors(slots))
            if self.format.half
            else self.vectors.take(slots)
        )

    def keys_of(self, slots: Slots) -> list[Key]:
        """The keys of ``slots``, in the same order."""
        return restore_keys(self.key_kind, self.stored_keys.take(slots)) if slots.size else []

    def some_keys(self, count: int) -> list[Key]:
        """Keys from all over the index, at least this many if there are."""
        slots = live_slots(self.live.bits, self.count)
        return self.keys_of(slots[:: max(slots.size // max(count, 1), 1)][: 2 * count])

    def keys(self, after: Key | None, limit: int) -> KeyPage:
        """At most ``limit`` keys after ``after``, in the order of (hash, key).

        Changes of rows do not change that order. A page costs its own size, not the dataset's.
        Raises ``InvalidParams`` if ``after`` is of another kind.
        """
        start: int | None = 0
        after_hash = None
        if after is not None:
            start = after_hash = int(
                hash_keys(self.key_kind, store_keys(self.key_kind, [after]))[0]
            )
        page: list[Key] = []
        while start is not None and len(page) <= limit:
            hashes, slots, start = self.key_map.from_hash(start, limit + 1)
            live = test_bits(self.live.bits, slots)
            hashes, slots = hashes[live], slots[live]
            keys = self.keys_of(slots)
            numbered: list[tuple[int, Any]] = list(zip(hashes.tolist(), keys, strict=True))
            if (hashes[1:] == hashes[:-1]).any():
                numbered.sort()
            page.extend(key for number, key in numbered if number != after_hash or key > after)
        return KeyPage(page[:limit], page[limit - 1] if len(page) > limit else None)
