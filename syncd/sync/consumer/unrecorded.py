"""Doubts: changes that a writer could not record, because another session had locked the outbox.

Such a writer takes a transaction id and then moves the sequence ``syncd.doubts``. The move is
visible at once, before the transaction ends. Until its end the writer holds a lock on the sequence.

Invariant: the first pass whose snapshot sees the end of such a transaction doubts every source.
Then each source is compared with its table as of this snapshot or a later one. Each transaction
that moved the sequence is covered, because a pass reads in this order: the holders of the
sequence's lock, if that is ``due``, the snapshot, the sequence's value.

- It moved after the previous pass read the value: the value differs.
- It moved before that, and its lock was read once: its id is in ``open`` until a snapshot sees its
  end or its lock is gone. Until then the locks are read before each snapshot.
- It moved and ended between two reads of the locks: a pass in between found another value, and
  ``unseen`` has the sources compared once more behind the next read of the locks.

A doubt that was not settled before a stop is settled after the next start.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from syncd.types import Snapshot

DOUBT = "a writer could not record its changes, because the outbox was locked"
UNSETTLED = -1
"""Value in a checkpoint in place of the sequence's: the next start compares every source."""


@dataclass(slots=True)
class Doubts:
    """The state of the sequence as one consumer knows it."""

    seen: int = 0
    """Value when it was last read."""
    open: frozenset[int] = frozenset()
    """Ids of transactions that moved it, held its lock at the last look, and have not ended yet."""
    ended: bool = False
    """Whether the last look missed the lock of a transaction that had held it before."""
    unseen: bool = False
    """Whether a transaction may have moved it whose lock no look has seen."""
    was_unseen: bool = False
    """``unseen`` before the last note."""
    connected: bool = True
    """Whether the connection is new: a transaction that is open may have moved it before."""
    looked: bool = False
    """Whether the locks were read after the sequence's value."""
    moved: bool = False
    """Whether every source must be compared from the pass's snapshot on."""

    @property
    def due(self) -> bool:
        """Whether the next pass must first read the holders of the sequence's lock."""
        return self.connected or self.unseen or bool(self.open)

    def begin_pass(self, holders: Iterable[int]) -> None:
        """Note the transactions that hold the sequence's lock, read before a pass's snapshot."""
        holding = frozenset(holders)
        self.ended |= not self.open <= holding
        self.open, self.looked, self.connected = holding, True, False

    def note(self, value: int, snapshot: Snapshot) -> None:
        """Note a pass's snapshot, and the sequence's value, read behind it."""
        ended = {xid for xid in self.open if snapshot.sees(xid)}
        other = value != self.seen
        self.moved = other or self.unseen or self.ended or bool(ended)
        self.open -= ended
        self.was_unseen = self.unseen
        self.unseen = other or (self.unseen and not self.looked)
        self.seen, self.looked, self.ended = value, False, False

    @property
    def begins_again(self) -> bool:
        """Whether a comparison would begin again in the next pass, for the first time.

        Only the first time: while writers keep moving the sequence, comparisons go on to their end.
        """
        return self.unseen and not self.was_unseen

    @property
    def saved(self) -> int:
        """The value that a checkpoint keeps."""
        return UNSETTLED if self.due or self.ended else self.seen
