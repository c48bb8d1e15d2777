"""Where the full-sized chunks of a column lie in memory.

The chunks of a contiguous column lie one after the other in an ``AddressRange``. FAISS then reads
rows by their number, without a copy. The chunks of another column lie anywhere. So do those of a
contiguous column if the system refuses a range, or if a chunk is not a whole number of pages
(vectors of more than 8,192 float32).

Invariant: an array that was returned keeps its bytes, also after its chunk has moved.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.index.storage.addresses import AddressRange
from syncd.index.storage.files import map_file

RESERVED_CHUNKS = 64
"""Least number of places in a range: 2 GiB of addresses, of the 128 TiB that a process has."""

RESERVED_GROWTH = 8
"""Number of places in a range, per chunk that needs one when the range is made."""

Bytes = NDArray[np.uint8]

logger = structlog.get_logger()


class ChunkPlaces:
    """The places of chunks of ``chunk_bytes`` bytes each; ``path`` gives the file of a chunk."""

    def __init__(self, chunk_bytes: int, path: Callable[[int], Path], *, contiguous: bool) -> None:
        self._chunk_bytes, self._path = chunk_bytes, path
        self._may_reserve = contiguous and chunk_bytes % mmap.PAGESIZE == 0
        self._range: AddressRange | None = None
        self._places = 0

    def make(self, chunks: int, present: Sequence[Bytes], mapped: int) -> list[Bytes] | None:
        """Make places for this many chunks; returns the ``present`` ones if they moved.

        The first ``mapped`` ones are mappings of their files. A larger range replaces one that is
        full; older views keep that one. If the system refuses, the chunks stay where they are.
        """
        if chunks <= self._places or not self._may_reserve:
            return None
        places = max(RESERVED_CHUNKS, RESERVED_GROWTH * chunks)
        size = places * self._chunk_bytes
        try:
            new = AddressRange(size)
            moved = [
                self._mapped_in(new, number)
                if number < mapped
                else self._copied(new, number, chunk)
                for number, chunk in enumerate(present)
            ]
        except (OSError, MemoryError, DamagedFile, DataDirectoryError) as error:
            self._may_reserve = False
            logger.warning(
                "address_range_refused",
                file=str(self._path(0)),
                bytes=size,
                error=str(error),
                hint="searches copy rows until the next start: raise the limit of virtual memory "
                "(ulimit -v)",
            )
            return None
        self._range, self._places = new, places
        return moved

    def allocate(self, number: int) -> Bytes:
        """Memory for a chunk, at its place if there is one. Raises ``MemoryError``."""
        if self._range is not None and number < self._places:
            return self._range.allocate(number * self._chunk_bytes, self._chunk_bytes)
        return np.empty(self._chunk_bytes, dtype=np.uint8)

    def map_file(self, number: int) -> Bytes:
        """A chunk as the read-only mapping of its file, at its place if there is one.

        If the chunk was in memory there, the file has the same bytes. Raises ``DamagedFile`` if the
        file is missing or shorter, and ``DataDirectoryError``.
        """
        if self._range is not None and number < self._places:
            return self._mapped_in(self._range, number)
        return map_file(self._path(number), self._chunk_bytes)

    def map_shared(self, number: int, descriptor: int, offset: int) -> Bytes | None:
        """A chunk as a mapping of shared memory at its place; None without a place.

        Raises ``DataDirectoryError``.
        """
        if self._range is None or number >= self._places or offset % mmap.PAGESIZE:
            return None
        start = number * self._chunk_bytes
        return self._range.map_shared(descriptor, offset, start, self._chunk_bytes, "shared memory")

    def together(self, chunks: int) -> Bytes | None:
        """The first ``chunks`` chunks as one array; None if they lie apart."""
        if self._range is None or chunks > self._places:
            return None
        return self._range.show(0, chunks * self._chunk_bytes)

    def _mapped_in(self, range_: AddressRange, number: int) -> Bytes:
        return range_.map_file(self._path(number), number * self._chunk_bytes, self._chunk_bytes)

    def _copied(self, range_: AddressRange, number: int, chunk: Bytes) -> Bytes:
        copy = range_.allocate(number * self._chunk_bytes, self._chunk_bytes)
        copy[:] = chunk
        return copy
