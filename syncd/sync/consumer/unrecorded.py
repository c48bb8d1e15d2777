"""Doubts: changes that a writer could not record, because somebody had locked the outbox.

Such a writer moves the sequence ``syncd.doubts``, which everybody sees at once, before the transaction ends. Invariant: after the sequence has
moved, every source is compared with its table, and once more after the last transaction that was open then has ended. A doubt that was not
settled before a stop is settled after the next start.
"""

from __future__ import annotations

from dataclasses import dataclass

DOUBT = "a writer could not record its changes, because the outbox was locked"
UNSETTLED = -1
"""Saved in a checkpoint in place of a value of the sequence: the next start compares every source."""


@dataclass(slots=True)
class Doubts:
    """What one consumer knows of the sequence."""

    seen: int = 0
    """Its value when it was last read."""
    unsettled: bool = False
    """Whether a transaction that moved it may still be open."""
    may_settle: bool = False
    """Whether none was open any more when the pass began."""
    moved: bool = False
    """Whether every source must be compared from the pass's snapshot on."""

    def begin_pass(self, writers_open: bool) -> None:
        """Before a pass takes its snapshot; ``writers_open``: whether a transaction that has moved the sequence is open."""
        self.may_settle = self.unsettled and not writers_open

    def note(self, value: int) -> None:
        """The sequence's value, read behind the pass's snapshot."""
        self.moved = value != self.seen or self.may_settle
        self.unsettled = value != self.seen or (self.unsettled and not self.may_settle)
        self.seen, self.may_settle = value, False

    @property
    def saved(self) -> int:
        """What a checkpoint keeps."""
        return UNSETTLED if self.unsettled else self.seen
