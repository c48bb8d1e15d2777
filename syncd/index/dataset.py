"""One dataset's index: one writer applies passes, any number of threads search, one thread saves.

Invariant: the index equals the last applied pass. The only shared state is one reference to an
immutable view, replaced once per pass; writer and readers share no lock. A pass that fails leaves
the view unchanged: rows that it wrote past the count are overwritten later.

The state and its publication to reader processes are in ``shared.present``, builds in ``building``.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from syncd.errors import DimensionMismatch, InvalidVector
from syncd.index.building import BuiltIndex
from syncd.index.generation.generation import Generation
from syncd.index.generation.saving import CapturedIndex, State
from syncd.index.generation.stored_rows import StoredRows, Upserts
from syncd.index.rows.vectors import VectorFormat, Vectors
from syncd.index.saved import Saved, SavedIndex
from syncd.index.search.plan import SearchResult, plan_search
from syncd.index.storage.bitmap import (
    NO_SLOTS,
    empty_bitmap,
    grown,
    live_slots,
    set_bits,
    set_range,
    test_bits,
)
from syncd.index.storage.columns import CHUNK_BYTES
from syncd.index.storage.stopping import Stop
from syncd.index.view import Prints, View
from syncd.types import AttachedColumn, Key, KeyKind, Metric


class Applied(NamedTuple):
    """Numbers of rows of one applied pass; ``unchanged`` rows had their present values already."""

    inserted: int
    updated: int
    unchanged: int
    deleted: int


class DatasetIndex(BuiltIndex):
    """Rows of one dataset by key and by distance; made by ``create`` or ``load``."""

    @classmethod
    def create(
        cls,
        directory: Path,
        *,
        metric: Metric,
        key_kind: KeyKind,
        half: bool = False,
        dim: int | None = None,
        name: str = "",
        columns: Sequence[AttachedColumn] = (),
        chunk_bytes: int = CHUNK_BYTES,
    ) -> DatasetIndex:
        """An empty index with files in ``directory`` and attached ``columns``; ``name`` is for
        messages.

        The directory is created with the first file, so only ``save`` can fail on a full disk.
        """
        generation = Generation(
            directory, 1, VectorFormat(metric, half), key_kind, dim, chunk_bytes, columns
        )
        return cls(
            State(generation, generation.empty_view()), name or _name(directory), chunk_bytes
        )

    @classmethod
    def load(cls, directory: Path, saved: SavedIndex, *, name: str = "") -> DatasetIndex:
        """The index as it was saved.

        Raises ``DamagedFile`` if a file is missing, shorter than saved, or has another checksum.
        Vector files above 64 MiB are mapped, and ``scrub`` checks them later.
        """
        generation = Generation.of_saved(directory, saved)
        if saved.codes is None and saved.earlier_codes is None:
            view, codes, damage = generation.load(saved), None, ""
        else:  # a million rows: codes take half of the time
            with ThreadPoolExecutor(1, "syncd-load") as thread:
                loading = thread.submit(generation.load_codes, saved)
                view = generation.load(saved)
                codes, damage = loading.result()
        state = State(generation, view).with_codes(codes)
        index = cls(state, name or _name(directory), saved.chunk_bytes)
        index._saver.loaded(index._state, saved, whole=not damage)
        index._code_number = saved.code_number
        index.codes_damage = damage
        return index

    # Reading: from any thread, without a lock. Take ``view`` once if several answers must be of one
    # pass.

    def search(
        self,
        queries: Vectors,
        k: int,
        *,
        exclude: Key | None = None,
        max_distance: float | None = None,
        view: View | None = None,
        recall: float = 0.95,
        exact: bool = False,
    ) -> list[SearchResult]:
        """The ``k`` nearest rows of each query of (q, dim), by exact distance as in pgvector.

        The mean share ``recall`` of them is found; all of them with ``exact``, or if no codes reach
        it. ``exclude``, and rows beyond ``max_distance``, are left out. Raises
        ``DimensionMismatch``, ``InvalidVector``, and ``InvalidParams`` for a ``k`` below 1 or an
        ``exclude`` of another kind.
        """
        plan = plan_search(
            self.view if view is None else view,
            self._name,
            k,
            1.0 if exact else recall,
            exclude=exclude,
            max_distance=max_distance,
        )
        return plan.run(queries)

    @property
    def count(self) -> int:
        """Number of rows that a search can find."""
        return self.view.live.count

    @property
    def tombstones(self) -> int:
        """Number of slots whose row was updated or deleted."""
        return self.view.count - self.view.live.count

    @property
    def dim(self) -> int | None:
        """The dimension; None before the first row."""
        return self.view.dim

    @property
    def bytes_memory(self) -> int:
        """Bytes of memory of rows, keys and maps; mapped files are not counted."""
        return self._state.heap_bytes

    @property
    def bytes_disk(self) -> int:
        """Bytes of the present rows in files."""
        return self._state.disk_bytes

    @property
    def verified(self) -> bool:
        """Whether every loaded byte has been compared with its checksum."""
        return self._state.generation.checked

    def scrub(self, stop: Stop = lambda: False) -> None:
        """See ``Generation.scrub``."""
        self._state.generation.scrub(stop)

    # Writing: one thread.

    def apply(
        self,
        upserts: Sequence[Key],
        vectors: Vectors,
        deletes: Sequence[Key],
        prints: Prints | None = None,
        columns: Sequence[str] | Sequence[bytes] | None = None,
    ) -> Applied:
        """Apply one pass: readers see all of it at once, or nothing if this raises.

        ``vectors`` is (n, dim) float32, one row per upsert; the last row of a repeated key counts.
        ``prints`` (n,) int64 are the rows' fingerprints, by default 0. ``columns`` are JSON arrays
        of the attached columns' values, one per row, by default NULLs. A row with the same stored
        vector, columns and fingerprint keeps its slot. Deletes of unknown keys are ignored.

        Raises ``DimensionMismatch``, ``InvalidVector``, ``InvalidParams`` for a key of another
        kind, and ``ValueError`` for a key in both lists or lengths that differ.
        """
        view = self._state.view
        given = Upserts.of(upserts, vectors, prints, columns, view.columns)
        if deletes and not set(given.keys).isdisjoint(deletes):
            raise ValueError("a key is both upserted and deleted")
        if len(given.keys) and not given.vectors.shape[1]:
            raise InvalidVector("the vector has no element")
        return self.apply_stored(given.store(view.format, view.key_kind), deletes)

    def apply_stored(
        self, rows: StoredRows, deletes: Sequence[Key], *, known: bool = True
    ) -> Applied:
        """``apply`` for rows in stored form, each key once and none of them in ``deletes``.

        Not ``known``: none of the rows' keys is in the index, so none is looked up.
        """
        with self._write_lock:
            return self._apply(rows, deletes, known=known)

    def _apply(self, rows: StoredRows, deletes: Sequence[Key], *, known: bool) -> Applied:
        state, view = self._state, self._state.view
        deleted = NO_SLOTS
        if deletes:
            deleted = view.find(list(dict.fromkeys(deletes)))
            deleted = deleted[deleted >= 0]
        if len(rows) and rows.dim != view.dim:
            if view.dim is not None and view.live.count > deleted.size:
                raise DimensionMismatch(self._name, expected=view.dim, got=rows.dim)
            state = self._new_generation(rows.dim)
            view = state.view
        written, replaced, same = rows, NO_SLOTS, NO_SLOTS
        if known and view.live.count:
            old, changed = rows.compare(view)
            if not changed.all():
                written, same, old = rows.select(changed), old[~changed], old[changed]
            replaced = old[old >= 0]
            if deleted.size and np.intersect1d(deleted, old).size:
                raise ValueError("a key is both upserted and deleted")
        inserted, unchanged = len(written) - replaced.size, len(rows) - len(written)
        applied = Applied(inserted, replaced.size, unchanged, deleted.size)

        start, stop = view.count, view.count + len(written)
        dead_now = replaced if state is not self._state else np.concatenate((replaced, deleted))
        if stop > start or dead_now.size:
            live = view.live.after(dead_now, start, stop, state.generation.chunk_shift)
            state.generation.write(start, written, live.bits)
            self._publish(state.generation, state.generation.view(stop, live))
        # Bits of an older generation stay correct: every row since then was given to ``apply``.
        if self._seen is not None:
            self._seen = grown(self._seen, stop)
            set_bits(self._seen, same)
            set_range(self._seen, start, stop)
        return applied

    def clear(self) -> int:
        """Remove every row at once, and return their number. The next row may have another dim."""
        with self._write_lock:
            removed = self.view.live.count
            if self.view.count:
                with self._publish_lock:
                    self._show(self._new_generation(None))
            return removed

    def begin_sweep(self) -> None:
        """Note from now on the rows that ``apply`` is given; a second call starts over."""
        with self._write_lock:
            self._seen = empty_bitmap(self.view.count)

    def end_sweep(self) -> int:
        """Remove all rows that ``apply`` was not given since ``begin_sweep``; returns how many.

        Raises ``RuntimeError`` without ``begin_sweep``.
        """
        with self._write_lock:
            if self._seen is None:
                raise RuntimeError("end_sweep without begin_sweep")
            generation, view = self._state.generation, self._state.view
            seen, self._seen = grown(self._seen, view.count), None
            slots = live_slots(view.live.bits, view.count)
            unseen = slots[~test_bits(seen, slots)]
            if unseen.size:
                live = view.live.after(unseen, view.count, view.count, generation.chunk_shift)
                self._publish(generation, generation.view(view.count, live))
            return int(unseen.size)

    # Saving: in any one thread, alongside the writer.

    def save(self) -> Saved:
        """Make the present view durable; see ``CapturedIndex.save``."""
        return self.capture().save()

    def capture(self) -> CapturedIndex:
        """The present view, which can be saved while passes go on."""
        return CapturedIndex(self._saver, self._state)


def _name(directory: Path) -> str:
    return f"{directory.parent.name}/{directory.name}"
