"""Rows in the form that a generation stores, and which rows of a pass differ from stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncd.index.filter.attributes import Lines, store_lines
from syncd.index.rows.key_map import Hashes
from syncd.index.rows.keys import Stored, hash_keys, store_keys
from syncd.index.rows.vectors import StoredVectors, VectorFormat, Vectors
from syncd.index.storage.bitmap import Slots
from syncd.index.view import Prints, View
from syncd.types import AttachedColumn, Key, KeyKind


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows (n,) in stored form; ``lines`` is None if no columns are attached."""

    vectors: StoredVectors
    prints: Prints
    keys: Stored
    hashes: Hashes
    lines: Lines | None

    @classmethod
    def of(
        cls,
        form: VectorFormat,
        kind: KeyKind,
        keys: Sequence[Key],
        vectors: Vectors,
        prints: Prints,
        lines: Lines | None,
        squared_norms: NDArray[np.float64] | None = None,
    ) -> StoredRows:
        """Rows with vectors (n, dim) in stored form. See ``VectorFormat.store``.

        Raises ``InvalidVector``, and ``InvalidParams`` for a key of another kind.
        """
        stored, stored_keys = form.store(vectors, squared_norms), store_keys(kind, keys)
        return cls(stored, prints, stored_keys, hash_keys(kind, stored_keys), lines)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return int(self.vectors.rows.shape[1])

    def part(self, start: int, stop: int) -> StoredRows:
        """The rows ``start <= row < stop``, without a copy."""
        vectors, some = self.vectors, slice(start, stop)
        return StoredRows(
            StoredVectors(
                vectors.rows[some], None if vectors.norms is None else vectors.norms[some]
            ),
            self.prints[some],
            self.keys[some],
            self.hashes[some],
            None if self.lines is None else self.lines[some],
        )

    def select(self, chosen: NDArray[Any]) -> StoredRows:
        """The chosen rows, by mask or by index."""
        lines = None if self.lines is None else self.lines[chosen]
        return StoredRows(
            self.vectors.select(chosen),
            self.prints[chosen],
            self.keys[chosen],
            self.hashes[chosen],
            lines,
        )

    def compare(self, view: View) -> tuple[Slots, NDArray[np.bool_]]:
        """Each row's live slot in ``view`` (-1 if there is none), and whether the row differs from
        it.
        """
        slots = view.find_stored(self.keys, self.hashes)
        differs = np.ones(len(self), dtype=np.bool_)
        (known,) = (slots >= 0).nonzero()
        if known.size:
            there = slots[known]
            same = self.vectors.select(known).equals(view.stored_vectors(there))
            differs[known] = ~same | (self.prints[known] != view.prints.take(there))
            if self.lines is not None and view.attributes is not None:
                # 1.0 that became 1.00 keeps its fingerprint.
                differs[known] |= view.attributes.stored(there) != self.lines[known]
        return slots, differs


NO_STORED_ROWS = StoredRows(
    StoredVectors(np.empty((0, 0), dtype=np.float32), None),
    np.empty(0, dtype=np.int64),
    np.empty(0, dtype=np.int64),
    np.empty(0, dtype=np.uint64),
    None,
)


@dataclass(frozen=True, slots=True)
class Upserts:
    """A pass's rows as they were given, each key once: the last row of a repeated key counts."""

    keys: Sequence[Key]
    vectors: Vectors
    prints: Prints
    lines: Lines | None

    @classmethod
    def of(
        cls,
        keys: Sequence[Key],
        vectors: Vectors,
        prints: Prints | None,
        lines: Sequence[str] | Sequence[bytes] | None,
        attached: Sequence[AttachedColumn],
    ) -> Upserts:
        """Rows with missing fingerprints as 0 and missing columns as NULL.

        Raises ``ValueError`` for lengths that differ.
        """
        count = len(keys)
        vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        if prints is None:
            prints = np.zeros(count, dtype=np.int64)
        stored = None
        if attached:
            stored = store_lines(
                ["[" + ",".join(["null"] * len(attached)) + "]"] * count if lines is None else lines
            )
        if vectors.ndim != 2 or any(
            len(each) != count for each in (vectors, prints, keys if stored is None else stored)
        ):
            raise ValueError(f"{count} keys and vectors of shape {vectors.shape}")
        last = {key: row for row, key in enumerate(keys)}
        if len(last) == count:
            return cls(keys, vectors, prints, stored)
        rows = list(last.values())
        return cls(
            list(last), vectors[rows], prints[rows], None if stored is None else stored[rows]
        )

    def store(self, form: VectorFormat, kind: KeyKind) -> StoredRows:
        """The rows in stored form.

        Raises ``InvalidVector``, and ``InvalidParams`` for a key of another kind.
        """
        return StoredRows.of(form, kind, self.keys, self.vectors, self.prints, self.lines)
