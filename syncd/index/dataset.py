"""One dataset's index: one writer applies passes, any number of threads search, one more may save.

The index equals the last applied pass. Its only shared state is one reference to an immutable view,
replaced once a pass; there is no lock between the writer and readers. A pass that fails leaves the
view as it was: what it wrote past the count is written over.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from syncd.errors import DamagedFile, DataDirectoryError, DimensionMismatch, InvalidVector
from syncd.index.build.plan import Plan, build, plan_build, wants_codes
from syncd.index.codes.codes import Codes
from syncd.index.codes.files import load_codes
from syncd.index.generation.compaction import LAST_ROUND_SLOTS, MOST_ROUNDS, Move
from syncd.index.generation.generation import Generation
from syncd.index.generation.saving import CapturedIndex, Saver, State
from syncd.index.generation.stored_rows import Upserts
from syncd.index.rows.vectors import VectorFormat, Vectors
from syncd.index.saved import Saved, SavedIndex
from syncd.index.search.plan import SearchResult, plan_search, point_for
from syncd.index.storage.bitmap import (
    Bitmap,
    empty_bitmap,
    grown,
    live_slots,
    set_bits,
    set_range,
    test_bits,
)
from syncd.index.storage.columns import CHUNK_BYTES
from syncd.index.storage.stopping import Stop
from syncd.index.view import KeyPage, Prints, View
from syncd.types import AttachedColumn, Key, KeyKind, Metric

IndexKind = Literal["exact", "building", "codes"]


class Applied(NamedTuple):
    """Rows that one pass changed in a dataset.

    ``unchanged`` rows were written again with the values that they had.
    """

    inserted: int
    updated: int
    unchanged: int
    deleted: int


class DatasetIndex:
    """Rows of one dataset by key and by distance; made by ``create`` or ``load``."""

    def __init__(self, state: State, name: str, chunk_bytes: int) -> None:
        self._state = state
        self._name = name
        self._chunk_bytes = chunk_bytes
        self._saver = Saver(chunk_bytes, lambda: self._code_number)
        self._seen: Bitmap | None = None
        # held by each change, and by the last step of a compaction
        self._write_lock = threading.Lock()
        # The writer publishes passes, a builder swaps codes: each takes up what the other put there
        # last.
        self._publish_lock = threading.Lock()
        self._generation_numbers = itertools.count(state.generation.number + 1)
        self._code_number = 0
        self.codes_damage = ""
        """Why codes that were saved could not be loaded; they are built again."""

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
        """An empty index that will keep its files in ``directory``; ``name`` is for messages. Its
        rows have ``columns``.

        The directory is made with the first file, so that a full disk is met by ``save`` alone.
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

        Raises ``DamagedFile`` when a file is missing, shorter than saved, or has another checksum.
        Vector files of a dataset above 64 MiB are mapped and left for ``scrub``.
        """
        format_ = VectorFormat(saved.metric, saved.half)
        generation = Generation(
            directory,
            saved.generation,
            format_,
            saved.key_kind,
            saved.dim,
            saved.chunk_bytes,
            saved.columns,
        )
        view = generation.load(saved)
        codes, damage = None, ""
        try:
            if saved.codes is not None:
                codes = load_codes(
                    directory,
                    saved.codes,
                    {file.name: file for file in saved.files},
                    metric=saved.metric,
                    dim=saved.dim or 0,
                    generation=saved.generation,
                )
        except (
            DamagedFile,
            DataDirectoryError,
        ) as error:  # everything in them can be computed from the vectors
            damage = str(error)
        index = cls(
            State(generation, view).with_codes(codes), name or _name(directory), saved.chunk_bytes
        )
        index._saver.loaded(index._state, saved, whole=not damage)
        index._code_number = saved.code_number
        index.codes_damage = damage
        return index

    # Reading: from any thread, without a lock. Take ``view`` once where several answers must be of
    # one pass.

    @property
    def view(self) -> View:
        """The last pass, whole and immutable."""
        return self._state.view

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
        """For each query of (q, dim) the ``k`` nearest rows, by exact distance as pgvector computes
        it.

        Of those, the share ``recall`` is found in the mean, or all with ``exact``, or where no
        codes reach it. ``exclude`` is left out; rows beyond ``max_distance`` too. Raises
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

    def get(self, keys: Sequence[Key], vectors: bool) -> list[tuple[Key, Vectors | None]]:
        """See ``View.get``."""
        return self.view.get(keys, vectors)

    def keys(self, after: Key | None, limit: int) -> KeyPage:
        """See ``View.keys``."""
        return self.view.keys(after, limit)

    def contains(self, keys: Sequence[Key]) -> NDArray[np.bool_]:
        """See ``View.contains``."""
        return self.view.contains(keys)

    @property
    def count(self) -> int:
        """Rows that a search can find."""
        return self.view.live.count

    @property
    def tombstones(self) -> int:
        """Slots whose row was updated or deleted."""
        return self.view.count - self.view.live.count

    @property
    def dim(self) -> int | None:
        """The dimension, None before the first row."""
        return self.view.dim

    @property
    def bytes_memory(self) -> int:
        """Memory of rows, keys and maps; files that are mapped are not counted."""
        state = self._state
        codes = state.view.codes
        return (
            state.generation.heap_bytes
            + state.view.live.bits.nbytes
            + (0 if codes is None else codes.codes.nbytes)
        )

    @property
    def bytes_disk(self) -> int:
        """Bytes of the present rows in files."""
        state = self._state
        codes = 0 if state.view.codes is None else state.view.codes.codes.disk_bytes
        return state.generation.disk_bytes + ((state.view.count + 7) >> 3) + codes

    @property
    def verified(self) -> bool:
        """Whether every byte that was loaded has been compared with its checksum."""
        return self._state.generation.checked

    def scrub(self, stop: Stop = lambda: False) -> None:
        """Compare with their checksums the vector files that ``load`` left out, until ``stop`` says
        so; raises ``DamagedFile``.
        """
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
        """Bring one pass into the index; readers see all of it at once, or, if this raises,
        nothing.

        ``vectors`` is (n, dim) float32, one row an upsert; of a repeated key the last counts.
        ``prints`` (n,) int64 are the rows' fingerprints, 0 where left out; ``columns`` are JSON
        arrays of the attached columns' values, one a row, NULLs where left out. A row whose stored
        vector, columns and fingerprint are the same keeps its slot; deletes of unknown keys are
        ignored. Raises ``DimensionMismatch``, ``InvalidVector``, ``InvalidParams`` for a key of
        another kind, ``ValueError`` for a key in both lists or lengths that differ.
        """
        with self._write_lock:
            return self._apply(upserts, vectors, deletes, prints, columns)

    def _apply(
        self,
        upserts: Sequence[Key],
        vectors: Vectors,
        deletes: Sequence[Key],
        prints: Prints | None,
        columns: Sequence[str] | Sequence[bytes] | None,
    ) -> Applied:
        state, view = self._state, self._state.view
        given = Upserts.of(upserts, vectors, prints, columns, view.columns)
        if deletes and not set(given.keys).isdisjoint(deletes):
            raise ValueError("a key is both upserted and deleted")
        deleted = view.find(list(dict.fromkeys(deletes)))
        deleted = deleted[deleted >= 0]
        dim = given.vectors.shape[1]
        if len(given.keys) and dim != view.dim:
            if dim == 0:
                raise InvalidVector("the vector has no element")
            if view.dim is not None and view.live.count > deleted.size:
                raise DimensionMismatch(self._name, expected=view.dim, got=dim)
            state = self._new_generation(dim)
            view = state.view
        rows = given.store(view.format, view.key_kind)
        old, changed = rows.compare(view)
        fresh = np.flatnonzero(changed)
        replaced = old[fresh][old[fresh] >= 0]
        applied = Applied(
            fresh.size - replaced.size, replaced.size, len(rows) - fresh.size, deleted.size
        )

        start, stop = view.count, view.count + fresh.size
        dead_now = replaced if state is not self._state else np.concatenate((replaced, deleted))
        if stop > start or dead_now.size:
            live = view.live.after(dead_now, start, stop, state.generation.chunk_shift)
            state.generation.write(start, rows.select(fresh), live.bits)
            self._publish(state.generation, state.generation.view(stop, live))
        # bits left from an older generation say what is true: each row since was given
        if self._seen is not None:
            self._seen = grown(self._seen, stop)
            set_bits(self._seen, old[~changed])
            set_range(self._seen, start, stop)
        return applied

    def clear(self) -> int:
        """Remove every row at once; returns how many there were. The next row may have another
        dimension.
        """
        with self._write_lock:
            removed = self.view.live.count
            if self.view.count:
                with self._publish_lock:
                    self._state = self._new_generation(None)
            return removed

    def begin_sweep(self) -> None:
        """Note from now on which rows ``apply`` is given, changed or not; a sweep under way starts
        over.
        """
        with self._write_lock:
            self._seen = empty_bitmap(self.view.count)

    def end_sweep(self) -> int:
        """Remove the rows that ``apply`` was not given since ``begin_sweep``, at once; returns how
        many.

        Raises ``RuntimeError`` when no sweep was begun.
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

    # Building: any one thread, beside the writer, readers and saves.

    def plan_build(self, recall: float = 0.95) -> Plan | None:
        """What to build now for searches that want this recall; None when all is well."""
        return plan_build(self.view, recall)

    def build(self, plan: Plan, stop: Stop = lambda: False) -> bool:
        """Build what was planned from the present view, and use it; returns whether it still could
        be used.

        May take minutes. Raises ``Cancelled`` soon after ``stop`` says so; ``DataDirectoryError``
        and ``DamagedFile`` where rows cannot be moved.
        """
        if plan.kind == "compact":
            return self._compact(stop)
        state = self._state
        codes = build(state.view, plan, state.generation.number, self._next_code_number, stop)
        return self.swap_codes(state.codes, codes)

    def _compact(self, stop: Stop) -> bool:
        source = self._state
        # Or damage that nobody has noticed yet would be copied into files that are vouched for.
        source.generation.scrub(stop)
        target = self._new_generation(source.view.dim).generation
        move, moved = Move(source.view, target), False
        try:
            move.follow(source.view, stop)
            before = source.view.codes
            codes = (
                None
                if before is None
                else move.encoded(before.codes, self._next_code_number(), stop)
            )
            for _ in range(MOST_ROUNDS):
                state = self._state
                if (
                    state.generation is not source.generation
                    or move.behind(state.view) <= LAST_ROUND_SLOTS
                ):
                    break
                move.follow(state.view, stop)
            moved = self._move_in(source, move, codes)
        finally:
            if not moved:
                target.discard()
        return moved

    def _move_in(self, source: State, move: Move, codes: Codes | None) -> bool:
        """The last round, and the new generation in the place of the old one; False where that was
        emptied meanwhile.
        """
        with self._write_lock:
            state = self._state
            if state.generation is not source.generation:
                return False
            move.follow(state.view, lambda: False)
            if self._seen is not None:
                self._seen = move.seen(self._seen)
            with self._publish_lock:
                self._state = State(move.target, move.view()).with_codes(codes)
        return True

    def swap_codes(self, before: Codes | None, codes: Codes | None) -> bool:
        """Search with these codes from now on; False, and nothing happens, where what they were
        built from is not there any more.
        """
        with self._publish_lock:
            state = self._state
            same_rows = codes is None or codes.generation == state.generation.number
            if not same_rows or state.codes is not before:
                return False
            self._state = state.with_codes(codes)
        self.codes_damage = ""
        return True

    def kind(self, recall: float = 0.95) -> IndexKind | None:
        """How searches that want this recall are answered: ``building`` is exact meanwhile; None
        before the first row.
        """
        view = self.view
        if view.dim is None:
            return None
        if view.codes is None:
            return "building" if wants_codes(view) else "exact"
        return "exact" if point_for(view, 10, recall) is None else "codes"

    def recall(self, target: float = 0.95) -> float:
        """The recall@10 that was measured for searches that want ``target``."""
        point = point_for(self.view, 10, target)
        return 1.0 if point is None else point.recall

    def _next_code_number(self) -> int:
        self._code_number += 1
        return self._code_number

    # Saving: any one thread, beside the writer.

    def save(self) -> Saved:
        """Make the present view durable; see ``CapturedIndex.save``."""
        return self.capture().save()

    def capture(self) -> CapturedIndex:
        """The present view, to be saved while passes go on."""
        return CapturedIndex(self._saver, self._state)

    def _publish(self, generation: Generation, view: View) -> None:
        self._replace(generation, view)
        if generation.seal(view.count):  # the same rows again, so that their memory can go
            self._replace(generation, generation.view(view.count, view.live))

    def _replace(self, generation: Generation, view: View) -> None:
        """Publish a view with the codes of the view before, if that is of the same generation."""
        with self._publish_lock:
            before, state = self._state, State(generation, view)
            self._state = (
                state.with_codes(before.codes) if before.generation is generation else state
            )

    def _new_generation(self, dim: int | None) -> State:
        old, view = self._state.generation, self._state.view
        number = next(self._generation_numbers)
        generation = Generation(
            old.directory, number, view.format, view.key_kind, dim, self._chunk_bytes, view.columns
        )
        return State(generation, generation.empty_view())


def _name(directory: Path) -> str:
    return f"{directory.parent.name}/{directory.name}"
