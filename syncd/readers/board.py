"""The numbers that the main process and its readers share, in memory without a file.

Invariant: each word has one writer, which writes 8 aligned bytes at once, so no lock is needed. The
memory is gone with the last process that has it, whatever ends the processes.
"""

from __future__ import annotations

import mmap
import os

MAIN = 0
"""Seat of the main process; readers have the seats from 1 on."""
MOST_READERS = 64
SEAT_WORDS = 8
"""Words of one seat: 64 bytes, a line of the cache, so that no two processes write one line."""
CONNECTIONS, OPEN, BUSY, SQL_CONNECTIONS, BEATS = range(5)
"""Words of a seat: number of RPC connections; 1 while the process accepts connections, or will in a
moment; the arena's epoch in which the oldest search under way began, 0 if there is none; number of
connections of PostgreSQL clients; number of times that the event loop has said that it runs.
"""
FIRST_EPOCH = 1
"""An epoch before all that the arena may have now: it holds every block."""
BOARD_BYTES = (MOST_READERS + 1) * SEAT_WORDS * 8


class Board:
    """The shared words, as the process in ``seat`` sees them."""

    def __init__(self, descriptor: int, seat: int) -> None:
        self.descriptor = descriptor
        self.seat = seat
        self._words = memoryview(mmap.mmap(descriptor, BOARD_BYTES)).cast("Q")
        self.rpc = SharedPlaces(self._words, seat, CONNECTIONS)
        self.sql = SharedPlaces(self._words, seat, SQL_CONNECTIONS)

    @classmethod
    def create(cls) -> Board:
        """A new board, all zero, in the main process's hands. Raises ``OSError``."""
        descriptor = os.memfd_create("syncd-readers", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, BOARD_BYTES)
        return cls(descriptor, MAIN)

    def connections_of(self, seat: int) -> int:
        """Number of connections of one process."""
        words, first = self._words, seat * SEAT_WORDS
        return words[first + CONNECTIONS] + words[first + SQL_CONNECTIONS]

    def is_open(self, seat: int) -> bool:
        """Whether one process accepts connections."""
        return bool(self._words[seat * SEAT_WORDS + OPEN])

    def note_open(self, *, is_open: bool) -> None:
        """Note whether this process accepts connections."""
        self._words[self.seat * SEAT_WORDS + OPEN] = is_open

    def busy(self) -> list[int]:
        """For each seat, the epoch in which its oldest search began; 0 if it is idle."""
        return self._words[BUSY::SEAT_WORDS].tolist()

    def note_busy(self, epoch: int) -> None:
        """Note since which epoch this process is busy; 0 if it is idle."""
        self._words[self.seat * SEAT_WORDS + BUSY] = epoch

    def beats_of(self, seat: int) -> int:
        """How often one process has called ``beat``."""
        return self._words[seat * SEAT_WORDS + BEATS]

    def beat(self) -> None:
        """Note that this process's event loop runs."""
        self._words[self.seat * SEAT_WORDS + BEATS] += 1

    def clear(self, seat: int) -> None:
        """Free the seat of a process that has ended."""
        for word in range(SEAT_WORDS):
            self._words[seat * SEAT_WORDS + word] = 0


class SharedPlaces:
    """The connections of one listener in all processes: ``syncd.rpc.stream_server.Places``."""

    def __init__(self, words: memoryview[int], seat: int, word: int) -> None:
        self._words = words
        self._seat = seat
        self._word = word

    def elsewhere(self) -> int:
        """Number of connections that the other processes have."""
        connections = self._words[self._word :: SEAT_WORDS].tolist()
        return sum(connections) - connections[self._seat]

    def note(self, connections: int) -> None:
        """Note the number of connections that this process has."""
        self._words[self._seat * SEAT_WORDS + self._word] = connections

    def yields(self) -> bool:
        """Whether an open process has fewer connections than this one."""
        connections = self._words[self._word :: SEAT_WORDS].tolist()
        is_open = self._words[OPEN::SEAT_WORDS].tolist()
        mine = connections[self._seat]
        return any(one and its < mine for one, its in zip(is_open, connections, strict=True))
