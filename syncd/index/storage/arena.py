"""Memory that the main process writes and its readers read: blocks, and words that point to them.

A *block* is written before a word points to it, and is then never changed where readers look. A
*word* is eight aligned bytes, stored and loaded at once: readers see its old or its new value.

Invariant: a block is not used again while a reader may read it. A block dies with the last array of
it in the main process, which keeps the arrays of every block that a word leads to. A reader marks
itself busy before it reads a word, and idle when it has its answer. The numbers for that are
*epochs*, which only grow: a dead block is free when every busy reader became busy after its death.

The memory has no name in any file system: it is gone with its last process.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

ARENA_BYTES = 1 << 40
"""Addresses of the arena; only used pages take memory."""
WORDS = 1 << 16
"""Number of words. Word 0 is the epoch."""
EPOCH = 0
UNIT = 64
"""Blocks begin at multiples of this: a line of the cache."""
OFFSET_BITS = 34
"""Bits of a word that hold a block's offset in units; the others count the word's values.

So a word never has an earlier value again, also if a block is used again.
"""
SEQUENCES = 1 << (64 - OFFSET_BITS)
GRACE_SECONDS = 0.1
"""Least age of a dead block that is used again.

A processor may show a store to others later than a following load: by nanoseconds.
"""
GIVEN_BACK_BYTES = 1 << 18
"""Free blocks of this size give their pages back to the system."""


class Arena:
    """The arena in the main process. Any thread may call it.

    ``busy`` returns, for each reader, 0 if it is idle, else the epoch in which it became busy.
    Raises ``OSError`` if the system refuses the memory.
    """

    def __init__(self, busy: Callable[[], Sequence[int]]) -> None:
        self.descriptor = os.memfd_create("syncd-arena", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, ARENA_BYTES)
        self._map = mmap.mmap(self.descriptor, ARENA_BYTES, flags=mmap.MAP_SHARED | _NORESERVE)
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._address: int = self._bytes.__array_interface__["data"][0]
        self._words = memoryview(self._map)[: 8 * WORDS].cast("Q")
        self._words[EPOCH] = 1
        self._busy = busy
        self._lock = threading.Lock()
        self._end = 8 * WORDS
        self._free: dict[int, list[int]] = {}
        self._dying: deque[tuple[int, int]] = deque()
        self._dead: deque[tuple[int, int, int, float]] = deque()
        self._word_numbers = list(range(WORDS - 1, EPOCH, -1))
        self.used_bytes = 0
        """Bytes of all blocks that are not free."""

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A new block as an array, its content undefined. Raises ``MemoryError``."""
        kind = np.dtype(dtype)
        size = _size_class(max(prod(shape) * kind.itemsize, 1))
        with self._lock:
            self._collect()
            free = self._free.get(size)
            if free:
                start = free.pop()
            else:
                if size % mmap.PAGESIZE == 0:
                    self._end = -(-self._end // mmap.PAGESIZE) * mmap.PAGESIZE
                start = self._end
                if start + size > ARENA_BYTES:
                    raise MemoryError("the memory that readers share is full")
                self._end += size
            self.used_bytes += size
        return np.asarray(_Block(self._dying, self._address, start, size, shape, kind))

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        """A copy of an array in a new block."""
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        copy.flags.writeable = False
        return copy

    def put_bytes(self, content: bytes) -> NDArray[Any]:
        """A new block with this content, and its length in the first eight bytes."""
        block = self.empty((8 + len(content),), np.uint8)
        start = self.offset(block)
        self._map[start : start + block.size] = len(content).to_bytes(8, "little") + content
        return block

    def offset(self, array: NDArray[Any]) -> int:
        """Offset of an array of a block; -1 for an array elsewhere."""
        start: int = array.__array_interface__["data"][0] - self._address
        return start if 0 <= start < ARENA_BYTES else -1

    def new_word(self) -> int | None:
        """Number of a word that points nowhere; None if all are in use."""
        with self._lock:
            return self._word_numbers.pop() if self._word_numbers else None

    def free_word(self, number: int) -> None:
        """Give a word back. Readers may still read it."""
        self.point(number, None)
        with self._lock:
            self._word_numbers.append(number)

    def point(self, number: int, block: NDArray[Any] | None) -> None:
        """Let a word point to a block, which the caller keeps, or nowhere.

        One thread changes a word at a time.
        """
        with self._lock:  # the lock is a barrier: the block's content comes before the word
            sequence = ((self._words[number] >> OFFSET_BITS) + 1) % SEQUENCES
        units = 0 if block is None else self.offset(block) // UNIT
        self._words[number] = sequence << OFFSET_BITS | units

    @property
    def waiting_bytes(self) -> int:
        """Bytes of dead blocks that are not free yet: readers may still read them."""
        return sum(size for _, size, _, _ in list(self._dead))

    def collect(self) -> None:
        """Free the blocks that no reader can read any more."""
        with self._lock:
            self._collect()

    def _collect(self) -> None:
        now = time.monotonic()
        if self._dying:
            epoch = self._words[EPOCH]
            while self._dying:
                start, size = self._dying.popleft()
                self._dead.append((start, size, epoch, now))
            self._words[EPOCH] = epoch + 1
        if not self._dead or now < self._dead[0][3] + GRACE_SECONDS:
            return
        oldest = min((epoch for epoch in self._busy() if epoch), default=self._words[EPOCH])
        while self._dead:
            start, size, epoch, died_at = self._dead[0]
            if epoch >= oldest or now < died_at + GRACE_SECONDS:
                return
            self._dead.popleft()
            if size >= GIVEN_BACK_BYTES:
                self._map.madvise(mmap.MADV_REMOVE, start, size)
            self._free.setdefault(size, []).append(start)
            self.used_bytes -= size


class ArenaView:
    """The arena in a reader, read-only."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map = mmap.mmap(
            descriptor, ARENA_BYTES, flags=mmap.MAP_SHARED | _NORESERVE, prot=mmap.PROT_READ
        )
        self._map.madvise(mmap.MADV_DONTDUMP)
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._words = memoryview(self._map)[: 8 * WORDS].cast("Q")

    @property
    def epoch(self) -> int:
        """The present epoch."""
        return self._words[EPOCH]

    def word(self, number: int) -> int:
        """The value of a word, which changes at each change of the block that it points to."""
        return self._words[number]

    def content(self, word: int) -> bytes | None:
        """The content of ``put_bytes`` that a word's value points to; None if it points nowhere."""
        start = (word & ((1 << OFFSET_BITS) - 1)) * UNIT
        if not start:
            return None
        length = int.from_bytes(self._map[start : start + 8], "little")
        return self._map[start + 8 : start + 8 + length]

    def array(self, start: int, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """The array of a block."""
        kind = np.dtype(dtype)
        stop = start + prod(shape) * kind.itemsize
        return self._bytes[start:stop].view(kind).reshape(shape)


class _Block:
    """A block in numpy's array interface: it dies with the last array made from it."""

    __slots__ = ("__array_interface__", "_dying", "_size", "_start")

    def __init__(
        self,
        dying: deque[tuple[int, int]],
        address: int,
        start: int,
        size: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self._dying, self._start, self._size = dying, start, size
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (address + start, False),
            "shape": shape,
            "typestr": dtype.str,
        }

    def __del__(self) -> None:
        self._dying.append((self._start, self._size))  # it may run anywhere, so it takes no lock


_NORESERVE = 0x4000
"""Not in Python's ``mmap``; the value on Linux."""


def _size_class(size: int) -> int:
    """The size of the block for this many bytes: at most a quarter larger above 256 bytes.

    Blocks of one class replace each other. Those of a page or more are whole pages.
    """
    if size <= 4 * UNIT:
        return -(-size // UNIT) * UNIT
    step = max(1 << (size.bit_length() - 3), UNIT)
    if size >= 4 * mmap.PAGESIZE:
        step = max(step, mmap.PAGESIZE)
    return -(-size // step) * step
