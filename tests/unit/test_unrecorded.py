"""In any order of events, the end of a doubted transaction has the sources compared.

The first pass that sees the end has them compared.
"""

from __future__ import annotations

import random

import pytest

from syncd.sync.consumer.unrecorded import UNSETTLED, Doubts
from syncd.types import Snapshot


class World:
    """Transactions that write, move the sequence and end, and a consumer that reads both."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.doubts = Doubts()
        self.value = 0
        self.next_xid = 100
        self.open: set[int] = set()
        self.moved: set[int] = set()
        self.locked: set[int] = set()
        self.owed: set[int] = set()
        for _ in range(self.random.choice([0, 5])):  # before the consumer's start
            self.happen()
        self.doubts.seen = self.value

    def happen(self) -> None:
        """Do a few steps of other sessions."""
        for _ in range(self.random.choice([0, 0, 1, 2, 4])):
            match self.random.randrange(4):
                case 0:
                    self.open.add(self.next_xid)
                    self.next_xid += 1
                case 1 if self.open:
                    xid = self.random.choice(sorted(self.open))
                    self.value += 1
                    self.moved.add(xid)
                    self.locked.add(xid)
                case 2 if self.open:  # it is visible before its locks are gone
                    xid = self.random.choice(sorted(self.open))
                    self.open.discard(xid)
                    if xid in self.moved:
                        self.owed.add(xid)
                case 3:
                    self.locked &= self.open

    def look(self) -> None:
        """Look once if that is due, then take up to two snapshots."""
        if self.doubts.connected:
            self.owed.clear()  # the first reading of the tables sees their changes
        if self.doubts.due:
            self.doubts.begin_pass(set(self.locked))
        for _ in range(self.random.choice([0, 1, 1, 1, 2])):
            self.happen()
            due = set(self.owed)
            snapshot = Snapshot(
                min(self.open, default=self.next_xid), self.next_xid, frozenset(self.open)
            )
            self.happen()
            self.doubts.note(self.value, snapshot)
            assert self.doubts.moved or not due
            self.owed -= due
            self.happen()


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_no_end_of_a_doubted_transaction_goes_by_without_a_comparison(first: int) -> None:
    for seed in range(first, first + 500):
        world = World(seed)
        for _ in range(60):
            world.happen()
            world.look()


def test_a_transaction_that_stays_open_costs_no_comparison() -> None:
    doubts = Doubts()
    snapshot = Snapshot(5, 9, frozenset({5}))
    compared = []
    for _ in range(5):
        assert doubts.due
        doubts.begin_pass([5])
        doubts.note(1, snapshot)
        compared.append(doubts.moved)
    assert compared == [True, True, False, False, False]
    assert doubts.saved == UNSETTLED
    doubts.begin_pass([5])
    doubts.note(1, Snapshot(9, 9, frozenset()))
    assert doubts.moved
    assert doubts.saved == 1
    assert not doubts.due, "nothing is looked for while no transaction has moved the sequence"
    doubts.note(2, Snapshot(9, 9, frozenset()))
    assert doubts.due
