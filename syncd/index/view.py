"""What a reader sees of a dataset: one pass, whole, for as long as it holds the view.

A ``View`` is never changed. The writer appends rows past ``count``, copies the bitmap before it
clears bits of published slots, and then replaces the index's one reference to its view: a reader
sees every row of a pass or none, and never both versions of an updated row, or neither, as clearing
bits in place would let it.
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
"""Fingerprints of rows as Postgres computed them, (n,); what they are made of is not the index'
business.
"""


class KeyPage(NamedTuple):
    """Some keys in the order of (hash, key), and what to pass as ``after`` for those that follow;
    None after the last.
    """

    keys: list[Key]
    next: Key | None


@dataclass(frozen=True, slots=True)
class View:
    """Everything that a search of one dataset needs, as of one pass.

    Slots below ``count`` are written; of these the ``live`` ones are the rows. ``dim`` is None
    until the first row.
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
    """What approximate search reads; None while the dataset is searched exactly. Their slots are
    below ``count``, and no filter is in their bits.
    """
    attributes: AttributesView | None = None
    share: float = 1.0
    """Of the pass' rows, how many a filter has left: 1 where none was asked for."""

    @property
    def columns(self) -> tuple[AttachedColumn, ...]:
        """What can be filtered on and included."""
        return () if self.attributes is None else self.attributes.columns

    def where(self, wanted: Filter | None) -> View:
        """The same pass with only the rows that a filter lets through: what a search of it finds
        are the nearest of these.

        This is the one place where a filter meets the live bitmap; whatever searches a view takes
        ``live`` for its selector.
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
        """The live slot of each key, -1 where it is not indexed; raises ``InvalidParams`` for a key
        of another kind.
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
        if candidates.size:  # a hash is no proof
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
        """Which of ``keys`` are indexed."""
        return self.find(keys) >= 0

    def get(self, keys: Sequence[Key], vectors: bool) -> list[tuple[Key, Vectors | None]]:
        """Those of ``keys`` that are indexed, in the order asked; each with the user's own vector
        (dim,) if ``vectors``.
        """
        slots = self.find(keys)
        (found,) = (slots >= 0).nonzero()
        if not vectors:
            return [(keys[i], None) for i in found.tolist()]
        rows = self.vectors_of(slots[found])
        return [(keys[i], row) for i, row in zip(found.tolist(), rows, strict=True)]

    def vector_of(self, key: Key) -> Vectors | None:
        """The user's own vector (dim,) of a key, None when it is not indexed."""
        found = self.get([key], vectors=True)
        return found[0][1] if found else None

    def vectors_of(self, slots: Slots) -> Vectors:
        """The user's own vectors (n, dim) of ``slots``."""
        if not slots.size:
            return np.empty((0, self.dim or 0), dtype=np.float32)
        return self.format.restore(self.stored_vectors(slots))

    def stored_vectors(self, slots: Slots) -> StoredVectors:
        """The vectors of ``slots``, at least one, as they are stored."""
        return StoredVectors(
            self.vectors.take(slots), None if self.norms is None else self.norms.take(slots)
        )

    def compared_rows(self, slots: Slots) -> Vectors:
        """The rows (n, dim) float32 of ``slots`` as searches compare them; under cosine each is
        divided by its norm.
        """
        return (
            self.format.as_compared(self.stored_vectors(slots))
            if self.format.half
            else self.vectors.take(slots)
        )

    def keys_of(self, slots: Slots) -> list[Key]:
        """The keys of ``slots``, in their order."""
        return restore_keys(self.key_kind, self.stored_keys.take(slots)) if slots.size else []

    def some_keys(self, count: int) -> list[Key]:
        """Keys from all over the index, at least this many if there are."""
        slots = live_slots(self.live.bits, self.count)
        return self.keys_of(slots[:: max(slots.size // max(count, 1), 1)][: 2 * count])

    def keys(self, after: Key | None, limit: int) -> KeyPage:
        """At most ``limit`` keys after ``after`` in the order of (hash, key), which does not change
        when rows do.

        A page costs its own size, not the dataset's. Raises ``InvalidParams`` when ``after`` is of
        another kind.
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
