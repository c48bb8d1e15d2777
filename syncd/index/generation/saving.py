"""Saving one dataset's index: what was saved last, and whether anything has changed since."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from syncd.index.codes.codes import Codes, LiveCodes
from syncd.index.generation.generation import Generation
from syncd.index.saved import Saved, SavedIndex
from syncd.index.storage.bitmap import Bitmap
from syncd.index.view import View


@dataclass(frozen=True, slots=True)
class State:
    """What an index replaces at once: a view, and the columns that it shows."""

    generation: Generation
    view: View

    @property
    def codes(self) -> Codes | None:
        """What its searches use, without the live bits."""
        return None if self.view.codes is None else self.view.codes.codes

    def with_codes(self, codes: Codes | None) -> State:
        """The same rows, searched with these codes."""
        live = None if codes is None else LiveCodes(codes, self.view.live.bits)
        return State(self.generation, replace(self.view, codes=live))


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells a state from any other, without keeping its rows in memory: clearing bits makes
    another bitmap, else only the count grows.
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
        """Whether this is its mark."""
        same_rows = self.generation == state.generation.number and self.count == state.view.count
        return same_rows and self.bits is state.view.live.bits and self.codes is state.codes


class Saver:
    """Writes states of one index; any thread, one at a time. ``code_number`` gives the last number
    that a codes' file has.
    """

    def __init__(self, chunk_bytes: int, code_number: Callable[[], int]) -> None:
        self._chunk_bytes = chunk_bytes
        self._code_number = code_number
        self._last: tuple[Mark, SavedIndex] | None = None
        self._live_sequence = 0
        self._lock = threading.Lock()

    def loaded(self, state: State, saved: SavedIndex, *, whole: bool) -> None:
        """``state`` is what was saved as ``saved``, but for what could not be read where it is not
        ``whole``.
        """
        self._last = (Mark.of(state), saved) if whole else None
        self._live_sequence = saved.live_sequence

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
            return done


@dataclass(frozen=True, slots=True)
class CapturedIndex:
    """One view of an index, whole, however far the index moves on."""

    _saver: Saver
    _state: State

    @property
    def directory(self) -> Path:
        """Where the index keeps its files."""
        return self._state.generation.directory

    def save(self) -> Saved:
        """Make the view durable; what is written is what came since the last save, nothing when
        nothing did.

        Raises ``DataDirectoryError`` when the disk is full or fails: nothing is lost, and the next
        call goes on from there.
        """
        return self._saver.save(self._state)


def _has_files(state: State, saved: SavedIndex) -> bool:
    """Whether nobody has removed a file since it was saved: then it is written again."""
    return all((state.generation.directory / name).exists() for name in saved.file_names)
