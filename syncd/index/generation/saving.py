"""Saves one dataset's index, as far as it changed since the last save.

Invariant: a state that was saved, and whose files still exist, is not written again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from syncd.index.codes.codes import Codes, LiveCodes
from syncd.index.generation.generation import Generation
from syncd.index.saved import Saved, SavedIndex
from syncd.index.storage.bitmap import Bitmap, bitmap_bytes
from syncd.index.view import View


@dataclass(frozen=True, slots=True)
class State:
    """The part of an index that is replaced at once: a view, and the columns that it shows."""

    generation: Generation
    view: View

    @property
    def codes(self) -> Codes | None:
        """The codes of the view, without live bits."""
        return None if self.view.codes is None else self.view.codes.codes

    @property
    def heap_bytes(self) -> int:
        """Bytes of memory of rows, keys, maps and codes; mapped files are not counted."""
        codes = 0 if self.codes is None else self.codes.nbytes
        return self.generation.heap_bytes + self.view.live.bits.nbytes + codes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the present rows, live bits and codes in files."""
        codes = 0 if self.codes is None else self.codes.disk_bytes
        return self.generation.disk_bytes + bitmap_bytes(self.view.count) + codes

    def with_codes(self, codes: Codes | None) -> State:
        """The same rows, searched with these codes."""
        if codes is None and self.view.codes is None:
            return self
        live = None if codes is None else LiveCodes(codes, self.view.live.bits)
        return State(self.generation, replace(self.view, codes=live))


@dataclass(frozen=True, slots=True)
class Mark:
    """Identity of a state, which keeps none of its rows in memory.

    Clearing bits makes another bitmap; other changes increase the count.
    """

    generation: int
    count: int
    bits: Bitmap
    codes: Codes | None

    @classmethod
    def of(cls, state: State) -> Mark:
        """The mark of a state."""
        return cls(state.generation.number, state.view.count, state.view.live.bits, state.codes)

    def is_of(self, state: State) -> bool:
        """Whether this is the mark of ``state``."""
        same_rows = self.generation == state.generation.number and self.count == state.view.count
        return same_rows and self.bits is state.view.live.bits and self.codes is state.codes


class Saver:
    """Writes states of one index. Any thread may call it, one at a time.

    ``code_number`` returns the last number of a codes file.
    """

    def __init__(self, chunk_bytes: int, code_number: Callable[[], int]) -> None:
        self._chunk_bytes = chunk_bytes
        self._code_number = code_number
        self._last: tuple[Mark, SavedIndex] | None = None
        self._live_sequence = 0
        self._named: set[str] = set()
        """Names of the files that any checkpoint may name: they are removed with it."""
        self._lock = threading.Lock()

    def loaded(self, state: State, saved: SavedIndex, *, whole: bool) -> None:
        """Take ``state`` as saved by ``saved``, unless parts could not be read (not ``whole``)."""
        self._last = (Mark.of(state), saved) if whole else None
        self._live_sequence = saved.live_sequence
        self._named.update(saved.file_names)

    def remove_unnamed(self, directory: Path, names: Iterable[str]) -> None:
        """Remove those files that no checkpoint can name."""
        with self._lock:
            for name in names:
                if name not in self._named:
                    with contextlib.suppress(OSError):
                        (directory / name).unlink()

    def save(self, state: State) -> Saved:
        """See ``CapturedIndex.save``."""
        with self._lock:
            if (
                self._last is not None
                and self._last[0].is_of(state)
                and _has_files(state, self._last[1])
            ):
                return Saved(self._last[1], 0)
            self._live_sequence += 1
            done = state.generation.save(
                state.view, self._live_sequence, self._code_number(), self._chunk_bytes
            )
            self._last = (Mark.of(state), done.saved)
            self._named.update(done.saved.file_names)
            return done


@dataclass(frozen=True, slots=True)
class CapturedIndex:
    """One whole view of an index; later passes do not change it."""

    _saver: Saver
    _state: State

    @property
    def directory(self) -> Path:
        """The directory of the index's files."""
        return self._state.generation.directory

    def save(self) -> Saved:
        """Make the view durable. Only changes since the last save are written.

        Raises ``DataDirectoryError`` if the disk is full or fails. Nothing is lost then, and the
        next call continues.
        """
        return self._saver.save(self._state)


def _has_files(state: State, saved: SavedIndex) -> bool:
    """Whether all saved files still exist; if not, the state is saved again."""
    return all((state.generation.directory / name).exists() for name in saved.file_names)
