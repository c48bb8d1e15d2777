"""One dataset's index: one writer applies passes, any number of threads search, one thread saves.

Invariant: the index equals the last applied pass. The only shared state is one reference to an
immutable view, replaced once per pass; writer and readers share no lock. A pass that fails leaves
the view unchanged: rows that it wrote past the count are overwritten later.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import structlog

from syncd.errors import DataDirectoryError, DimensionMismatch, InvalidVector
from syncd.index.asked import AskedQueries, Sample
from syncd.index.build.ahead import Ahead
from syncd.index.build.plan import Plan, build, plan_ahead, plan_build, wants_codes
from syncd.index.build.reached import Measured, measure_reached
from syncd.index.codes.codes import Codes
from syncd.index.codes.files import save_codes
from syncd.index.generation.compaction import Move
from syncd.index.generation.generation import Generation
from syncd.index.generation.saving import CapturedIndex, Saver, State
from syncd.index.generation.stored_rows import StoredRows, Upserts
from syncd.index.rows.vectors import VectorFormat, Vectors
from syncd.index.saved import Saved, SavedIndex
from syncd.index.search.exact import use_one_thread
from syncd.index.search.plan import SearchResult, plan_search, point_for
from syncd.index.shared.exporting import Exporter
from syncd.index.shared.publication import PublishedCodes
from syncd.index.storage.bitmap import (
    NO_SLOTS,
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
from syncd.index.view import Prints, View
from syncd.types import AttachedColumn, IndexKind, Key, KeyKind, Metric, RecallOf

logger = structlog.get_logger()


class Applied(NamedTuple):
    """Numbers of rows of one applied pass; ``unchanged`` rows had their present values already."""

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
        # Held by each change, and by the last round of a compaction.
        self._write_lock = threading.Lock()
        # The writer publishes passes, a builder swaps codes: each keeps the other's last change.
        self._publish_lock = threading.Lock()
        self._generation_numbers = itertools.count(state.generation.number + 1)
        self._code_number = 0
        self._exporter: Exporter | None = None
        self._ahead: Ahead | None = None
        self.asked = AskedQueries()
        """A sample of the queries that were asked since there are codes."""
        self.codes_damage = ""
        """Why saved codes could not be loaded; they are built again."""

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

    @property
    def queries_changed(self) -> bool:
        """Whether recall is to be measured because other queries are asked than before."""
        view = self.view
        return view.codes is not None and self.asked.is_due(
            view.dim or 0, view.codes.codes.calibration.of
        )

    # Building: in any one thread, alongside the writer, readers and saves.

    def plan_build(self, recall: float = 0.95, *, for_queries: bool = True) -> Plan | None:
        """See ``syncd.index.build.plan.plan_build``.

        Without ``for_queries`` other queries are no reason to measure recall.
        """
        return plan_build(self.view, recall, self.asked if for_queries else None)

    def plan_ahead(self, expected: int) -> Plan | None:
        """The rows to encode now, while the index gets about ``expected`` rows; None if few."""
        return plan_ahead(self.view, self._ahead, expected)

    def build(self, plan: Plan, stop: Stop = lambda: False) -> bool:
        """Build ``plan`` from the present view, and use it; returns whether it could still be used.

        It may take minutes. Raises ``Cancelled`` soon after ``stop()`` is true;
        ``DataDirectoryError`` and ``DamagedFile`` if rows cannot be moved.
        """
        if plan.kind == "compact":
            return self._compact(stop)
        state, exporter = self._state, self._exporter
        ahead, self._ahead = self._ahead, None
        if not state.view.live.count and plan.kind in ("train", "measure", "ahead"):
            return False  # the dataset was emptied after the plan was made
        if plan.kind == "ahead":
            self._ahead = self._encoded_ahead(state, ahead, plan, stop)
            return True
        if ahead is not None and not ahead.is_usable(state.view, state.generation.number):
            ahead = None
        sample = self.sampled(state.view) if plan.kind in ("train", "measure") else None
        codes = build(
            state.view, plan, state.generation.number, self._next_code_number, stop, sample, ahead
        )
        self._write_codes(exporter, codes, state.generation)
        used = self.swap_codes(state.codes, codes)
        self._share_codes(exporter)
        self._remove_old_codes(state.generation)
        if used and sample is not None:
            self.asked.measured(sample)
        return used

    def _encoded_ahead(self, state: State, ahead: Ahead | None, plan: Plan, stop: Stop) -> Ahead:
        """``ahead`` with the rows of ``plan``; begun again if it is of rows that are gone."""
        use_one_thread()
        generation, view = state.generation.number, state.view
        if ahead is None or ahead.generation != generation or ahead.encoder.stop > view.count:
            return Ahead.begun(view, generation, self._next_code_number(), plan.rows, stop)
        ahead.encoder.encode(view, view.count & ~7, stop)
        return ahead

    def sampled(self, view: View) -> Sample | None:
        """Queries that were asked, if they are enough and of the view's dimension."""
        sample = self.asked.sample(view.count)
        return None if sample is None or sample.queries.shape[1] != view.dim else sample

    def _compact(self, stop: Stop) -> bool:
        source, exporter = self._state, self._exporter
        # Without this check, unnoticed damage would be copied into files with new checksums.
        source.generation.scrub(stop)
        target = self._new_generation(source.view.dim).generation
        move, moved = Move(source.view, target), False
        try:
            move.follow(source.view, stop)
            before = source.codes
            codes = None
            if before is not None:
                codes = move.encoded(before, self._next_code_number(), stop)
                self._write_codes(exporter, codes, target)
            move.catch_up(source.generation, lambda: self._state, stop)
            moved = self._move_in(source, move, codes)
        finally:
            if not moved:
                target.discard()
        self._share_codes(exporter)
        return moved

    def _move_in(self, source: State, move: Move, codes: Codes | None) -> bool:
        """The last round: put the new generation in the place of the old one.

        Returns False if the dataset was emptied meanwhile.
        """
        with self._write_lock:
            state = self._state
            if state.generation is not source.generation:
                return False
            move.follow(state.view, lambda: False)
            if self._seen is not None:
                self._seen = move.seen(self._seen)
            with self._publish_lock:
                self._show(State(move.target, move.view()).with_codes(codes))
        return True

    def swap_codes(self, before: Codes | None, codes: Codes | None) -> bool:
        """Use these codes from now on.

        Returns False, and changes nothing, if the rows or the codes that they were built from are
        replaced.
        """
        with self._publish_lock:
            state = self._state
            same_rows = codes is None or codes.generation == state.generation.number
            if not same_rows or state.codes is not before:
                return False
            self._show(state.with_codes(codes))
        self.codes_damage = ""
        return True

    def kind(self, recall: float = 0.95) -> IndexKind | None:
        """How searches with this recall are answered; None before the first row.

        ``building`` answers exactly until the codes are built.
        """
        view = self.view
        if view.dim is None:
            return None
        if view.codes is None:
            return "building" if wants_codes(view) else "exact"
        return "exact" if point_for(view, 10, recall) is None else "codes"

    def recall(self, target: float = 0.95) -> float:
        """The measured recall@10 of searches that want ``target``."""
        point = point_for(self.view, 10, target)
        return 1.0 if point is None else point.recall

    def recall_p5(self, target: float = 0.95) -> float | None:
        """The 5th percentile of that recall; None if an earlier version measured it."""
        point = point_for(self.view, 10, target)
        return 1.0 if point is None else point.p5

    @property
    def recall_of(self) -> RecallOf | None:
        """Queries on which the codes were measured; None without codes: searches are exact."""
        codes = self.view.codes
        return None if codes is None else codes.codes.calibration.of

    def measure_reached(
        self, k: int, targets: Sequence[float], stop: Stop = lambda: False
    ) -> Measured:
        """Recall@k that searches reach now: over the queries that were asked, if they are enough,
        else over rows. It may take seconds, in any thread. Raises ``Cancelled``.
        """
        view = self.view
        return measure_reached(view, self._name, self.sampled(view), k, targets, stop)

    def _next_code_number(self) -> int:
        self._code_number += 1
        return self._code_number

    # Saving: in any one thread, alongside the writer.

    def save(self) -> Saved:
        """Make the present view durable; see ``CapturedIndex.save``."""
        return self.capture().save()

    def capture(self) -> CapturedIndex:
        """The present view, which can be saved while passes go on."""
        return CapturedIndex(self._saver, self._state)

    def _publish(self, generation: Generation, view: View) -> None:
        self._replace(generation, view)
        if generation.seal(view.count):  # the same rows again: frees their memory
            self._replace(generation, generation.view(view.count, view.live))

    def _replace(self, generation: Generation, view: View) -> None:
        """Publish a view with the previous view's codes, if both are of the same generation."""
        with self._publish_lock:
            before = self._state
            codes = before.codes if before.generation is generation else None
            self._show(State(generation, view).with_codes(codes))

    def _show(self, state: State) -> None:
        """Replace the state, for this process and for readers. Needs the publish lock."""
        self._state = state
        if self._exporter is not None:
            self._exporter.publish(state)

    # Sharing with other processes.

    def share(self, exporter: Exporter) -> None:
        """Publish the present view and all later ones; in any thread, alongside the writer.

        It copies the key map, and each open chunk.
        """
        written = self._state
        self._write_codes(exporter, written.codes, written.generation)
        with self._write_lock, self._publish_lock:
            state = self._state
            state.generation.move_key_map(exporter.place)
            view = state.generation.view(state.view.count, state.view.live)
            self._exporter = exporter
            self._show(State(state.generation, view).with_codes(state.codes))
        if state.codes is not written.codes:  # they were built meanwhile
            self._share_codes(None)

    def withdraw(self) -> None:
        """Publish no more: readers hand over."""
        with self._publish_lock:
            exporter, self._exporter = self._exporter, None
            if exporter is not None:
                exporter.withdraw()

    def _share_codes(self, written_for: Exporter | None) -> None:
        """Have readers get the present codes, unless they were written for the present exporter.

        They were not if the index was shared while they were built.
        """
        exporter, state = self._exporter, self._state
        if exporter is written_for:
            return
        self._write_codes(exporter, state.codes, state.generation)
        with self._publish_lock:
            self._show(self._state)

    def _write_codes(
        self, exporter: Exporter | None, codes: Codes | None, generation: Generation
    ) -> None:
        """Write the files of codes for readers. If the disk is full, readers do without."""
        if exporter is None or codes is None:
            return
        try:
            with generation.codes_lock:
                saved, files, _ = save_codes(generation.directory, codes)
        except DataDirectoryError as error:
            logger.error("codes_not_written", dataset=self._name, error=str(error), hint=error.hint)
            return
        exporter.note_codes(codes, PublishedCodes(saved, tuple(files)))

    def _remove_old_codes(self, generation: Generation) -> None:
        """Remove the files of replaced codes that were written for readers only."""
        exporter = self._exporter  # another thread may withdraw it now
        if exporter is not None:
            present = self._state.codes
            kept = set() if present is None else {file.name for file in present.files}
            old = exporter.written - kept
            self._saver.remove_unnamed(generation.directory, old)
            exporter.written -= old

    def _new_generation(self, dim: int | None) -> State:
        old, view = self._state.generation, self._state.view
        number = next(self._generation_numbers)
        kind, chunk_bytes = view.key_kind, self._chunk_bytes
        new = Generation(old.directory, number, view.format, kind, dim, chunk_bytes, view.columns)
        if self._exporter is not None:
            new.move_key_map(self._exporter.place)
        return State(new, new.empty_view())


def _name(directory: Path) -> str:
    return f"{directory.parent.name}/{directory.name}"
