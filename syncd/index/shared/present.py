"""The present state of one index, for this process and for readers.

Invariant: the state is one reference to an immutable view. It is replaced at once, under one lock,
and published to readers before the lock is released. So states follow each other in one order,
whichever process looks.
"""

from __future__ import annotations

import itertools
import threading

import structlog

from syncd.errors import DataDirectoryError
from syncd.index.codes.codes import Codes
from syncd.index.codes.files import save_codes
from syncd.index.generation.generation import Generation
from syncd.index.generation.saving import Saver, State
from syncd.index.shared.exporting import Exporter
from syncd.index.shared.publication import PublishedCodes
from syncd.index.view import View

logger = structlog.get_logger()


class PresentIndex:
    """The part of ``DatasetIndex`` that owns the state and shares it."""

    def __init__(self, state: State, name: str, chunk_bytes: int) -> None:
        self._state = state
        self._name = name
        self._chunk_bytes = chunk_bytes
        self._saver = Saver(chunk_bytes, lambda: self._code_number)
        # Held by each change, and by the last round of a compaction.
        self._write_lock = threading.Lock()
        # The writer publishes passes, a builder swaps codes: each keeps the other's last change.
        self._publish_lock = threading.Lock()
        self._generation_numbers = itertools.count(state.generation.number + 1)
        self._code_number = 0
        self._exporter: Exporter | None = None
        self.codes_damage = ""
        """Why saved codes could not be loaded; they are built again."""

    @property
    def view(self) -> View:
        """The last pass, whole and immutable."""
        return self._state.view

    # Replacing the state.

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

    def _new_generation(self, dim: int | None) -> State:
        old, view = self._state.generation, self._state.view
        number = next(self._generation_numbers)
        kind, chunk_bytes = view.key_kind, self._chunk_bytes
        new = Generation(old.directory, number, view.format, kind, dim, chunk_bytes, view.columns)
        if self._exporter is not None:
            new.move_key_map(self._exporter.place)
        return State(new, new.empty_view())

    def _next_code_number(self) -> int:
        self._code_number += 1
        return self._code_number

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
