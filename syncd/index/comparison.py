"""Compares a view with a table, whose rows are given block by block; lists the keys that differ.

Invariant: rows are equal if their fingerprints are. PostgreSQL computed one when the row was
applied, and computes it again now. ``deep`` also compares the stored vectors.

A PostgreSQL aggregate over buckets would send less. But it would need a second reading of the table
to find the keys, and hash the same amount. One row is 20 bytes on the wire and 1 µs here;
detoasting and hashing 768 dimensions in PostgreSQL takes 6 µs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from syncd.index.filter.attributes import same_values, store_lines
from syncd.index.rows.keys import hash_keys, store_keys
from syncd.index.rows.vectors import Vectors
from syncd.index.storage.bitmap import clear_bits, live_slots, prefix
from syncd.index.view import Prints, View
from syncd.types import Key


class Comparison:
    """One comparison of a view with a table: give all rows to ``rows``, then read ``extra``."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.rows_seen = 0
        self.missing: list[Key] = []
        """Keys in the table, not in the index."""
        self.stale: list[Key] = []
        """Keys in both, with different rows."""
        self._unseen = prefix(self.view.live.bits, self.view.count)

    def rows(self, keys: Sequence[Key], prints: Prints) -> None:
        """Compare some rows of the table, each key once, by their fingerprints (n,) int64."""
        slots = self._find(keys)
        known = np.flatnonzero(slots >= 0)
        if known.size:
            self._differ(keys, known[self.view.prints.take(slots[known]) != prints[known]])

    def deep(
        self, keys: Sequence[Key], vectors: Vectors, prints: Prints, columns: Sequence[str | None]
    ) -> None:
        """Compare rows, and also their vectors (n, dim) float32 and attached columns.

        All are in the form of ``DatasetIndex.apply``. A vector of another length differs from every
        stored vector.
        """
        slots = self._find(keys)
        known = np.flatnonzero(slots >= 0)
        if not known.size:
            return
        differ = self.view.prints.take(slots[known]) != prints[known]
        if vectors.shape[1] != self.view.dim or self.view.format.validate(vectors):
            differ[:] = True
        else:
            stored = self.view.format.store(vectors[known])
            differ |= ~stored.equals(self.view.stored_vectors(slots[known]))
        if self.view.attributes is not None:
            there = store_lines([columns[row] or "null" for row in known.tolist()])
            here = self.view.attributes.stored(slots[known])
            differ |= ~np.fromiter(map(same_values, there, here), dtype=np.bool_, count=known.size)
        self._differ(keys, known[differ])

    def absent(self, keys: Sequence[Key]) -> None:
        """Count rows of the table that cannot be indexed: any version of them in the index is
        extra.
        """
        self.rows_seen += len(keys)

    def extra(self) -> list[Key]:
        """Keys of the index for which no row was given; call it after all rows."""
        return self.view.keys_of(live_slots(self._unseen, self.view.count))

    def _find(self, keys: Sequence[Key]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        self.rows_seen += len(keys)
        stored = store_keys(self.view.key_kind, keys)
        slots = self.view.find_stored(stored, hash_keys(self.view.key_kind, stored))
        self.missing += [keys[row] for row in np.flatnonzero(slots < 0).tolist()]
        clear_bits(self._unseen, slots[slots >= 0])
        return slots

    def _differ(
        self, keys: Sequence[Key], rows: np.ndarray[tuple[int], np.dtype[np.int64]]
    ) -> None:
        self.stale += [keys[row] for row in rows.tolist()]
