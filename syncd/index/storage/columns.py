"""An append-only column of fixed-width rows, in chunks. A chunk moves to disk when it is full.

Invariant: the bytes of a row below a published count never change. A full chunk is written to its
file; from then on it is read through a read-only mapping. The open (last) chunk is in memory. A
column's first chunk is on the heap and grows geometrically, so 10,000 small datasets hold no file
descriptor and little memory.

The chunks of a *contiguous* column lie one after the other, so its rows are one array. See
``places``.

Rows are written to memory first, so a full disk loses nothing. A chunk that cannot be written stays
in memory and is tried again. One thread calls ``write`` and ``seal``. Another thread may run
``save`` on a view at the same time.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.index.storage.arena import ArenaView
from syncd.index.storage.bitmap import Slots
from syncd.index.storage.files import (
    SavedFile,
    check_content,
    make_durable,
    read_file,
    write_at,
)
from syncd.index.storage.places import ChunkPlaces
from syncd.index.storage.window import Window

CHUNK_BYTES = 32 << 20
"""Most bytes of a chunk: 65,536 rows of 128 float32, or 8,192 rows of 768."""

WRITE_AHEAD_BYTES = 4 << 20
"""Most bytes of the open chunk that are not in its file.

Above this they are written, so that no single pass has to write a whole chunk (60 ms).
"""


@dataclass(frozen=True, slots=True)
class ColumnView:
    """The chunks of a column at one moment.

    Rows at or past the count that was published with the view are not written yet.
    """

    chunks: tuple[NDArray[Any], ...]
    shift: int
    rows: NDArray[Any] | None = None
    """All chunks as one array, (n,) or (n, width); None if they lie apart."""
    window: Window | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if len(self.chunks) == 1:
            object.__setattr__(self, "rows", self.chunks[0])
        elif self.rows is None and self.chunks:
            object.__setattr__(self, "window", Window(self.chunks, self.shift))

    def blocks(self, count: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Each chunk's first row number and its written rows, without a copy."""
        for number, chunk in enumerate(self.chunks):
            first = number << self.shift
            if first >= count:
                return
            yield first, chunk[: count - first]

    def take(self, rows: Slots) -> NDArray[Any]:
        """A copy of ``rows``, in the same order: shape (n,), or (n, width)."""
        if self.rows is not None:  # ``take`` needs half the time of an index
            return self.rows.take(rows, axis=0)
        if self.window is None:
            raise IndexError("the column has no row")
        return self.window.take(rows)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The rows ``start <= row < stop``: without a copy, unless they lie apart."""
        if self.rows is not None:
            return self.rows[start:stop]
        first, last = start >> self.shift, max(start, stop - 1) >> self.shift
        offset = first << self.shift
        if first == last:
            return self.chunks[first][start - offset : stop - offset]
        return np.concatenate(self.chunks[first : last + 1])[start - offset : stop - offset]


@dataclass(slots=True)
class _ChunkFile:
    """The part of a chunk that is in its file: its first ``rows`` rows, with the checksum
    ``crc32``.

    ``durable`` is true after an fsync.
    """

    rows: int = 0
    crc32: int = 0
    durable: bool = True


class Column:
    """One column of a dataset: the files ``<stem>-000000.<suffix>`` and the rows not yet in them.

    A row is one number if ``width`` is None, else ``width`` numbers.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        suffix: str,
        dtype: str,
        width: int | None,
        chunk_bytes: int = CHUNK_BYTES,
        *,
        contiguous: bool = False,
    ) -> None:
        self._path = partial(_chunk_path, directory, stem, suffix)
        self._dtype, self._width = np.dtype(dtype), width
        self.row_bytes = self._dtype.itemsize * (1 if width is None else width)
        # A power of two, at least 8, so that a chunk's live bits start at a byte.
        self._shift = max(3, (chunk_bytes // self.row_bytes).bit_length() - 1)
        self._chunk_rows = 1 << self._shift
        full_bytes = self._chunk_rows * self.row_bytes
        self._places = ChunkPlaces(full_bytes, self._path, contiguous=contiguous)
        self._chunks: list[NDArray[Any]] = []
        self._mapped = 0  # number of chunks, from the first on, that are mappings of their files
        self._files: list[_ChunkFile] = []
        self._unchecked: list[int] = []
        self._files_lock = threading.Lock()
        self._view = ColumnView((), self._shift)
        self._taken: tuple[int, tuple[tuple[int, int], ...]] | None = None

    @property
    def view(self) -> ColumnView:
        """The present chunks, which the writer publishes with a count."""
        return self._view

    @property
    def heap_bytes(self) -> int:
        """Bytes of memory of the chunks that are not mappings."""
        return sum(chunk.nbytes for chunk in self._chunks[self._mapped :])

    @property
    def disk_bytes(self) -> int:
        """Bytes in the column's files."""
        return sum(file.rows for file in self._files) * self.row_bytes

    def write(self, start: int, rows: NDArray[Any]) -> None:
        """Write ``rows`` in memory at ``start``, which is at or past the published count.

        No reader sees them until a published count covers them.
        """
        while len(rows):
            number, offset = start >> self._shift, start & (self._chunk_rows - 1)
            part = rows[: self._chunk_rows - offset]
            self._room(number, offset + len(part))[offset : offset + len(part)] = part
            rows, start = rows[len(part) :], start + len(part)

    def seal(self, count: int) -> bool:
        """Write full chunks below the published ``count`` and replace them by mappings; returns
        whether any.

        Much of the open chunk is written ahead. If the disk is full, or ``save`` is writing, the
        next call tries again: the writer does not wait for it.
        """
        full = count >> self._shift
        rows = count - (full << self._shift)
        ahead = rows > 0 and (rows - self._files[full].rows) * self.row_bytes >= WRITE_AHEAD_BYTES
        if not (ahead or full > self._mapped) or not self._files_lock.acquire(blocking=False):
            return False
        before = self._mapped
        try:
            while self._mapped < full:
                number = self._mapped
                self._write_file(number, self._chunks[number], self._chunk_rows)
                self._chunks[number] = self._map(number)
                self._mapped += 1
            if ahead:
                self._write_file(full, self._chunks[full], rows)
        except (DataDirectoryError, DamagedFile):
            pass  # the rows stay in memory; save() reports the error if it persists
        finally:
            self._files_lock.release()
        if self._mapped == before:
            return False
        self._view = self._new_view()
        return True

    def is_sealed(self, count: int) -> bool:
        """Whether every full chunk below ``count`` is a mapping of its file."""
        return self._mapped >= count >> self._shift

    def save(self, view: ColumnView, count: int) -> tuple[list[SavedFile], int]:
        """Make the first ``count`` rows durable; returns their files and the number of bytes
        written.

        Raises ``DataDirectoryError``; the rows in memory stay unchanged.
        """
        saved, written = [], 0
        for number in range(-(-count >> self._shift)):
            rows = min(self._chunk_rows, count - (number << self._shift))
            with self._files_lock:
                file = self._files[number]
                written += self._write_file(number, view.chunks[number], rows)
                # If the writer sealed the chunk meanwhile, the file holds more rows than this
                # checkpoint may vouch for. After a crash the file is loaded with `count` rows, and
                # new rows overwrite the others. So the checksum covers this checkpoint's rows only.
                crc32 = (
                    file.crc32
                    if file.rows == rows
                    else zlib.crc32(_content(view.chunks[number][:rows]))
                )
                saved.append(
                    SavedFile(
                        name=self._path(number).name, bytes=rows * self.row_bytes, crc32=crc32
                    )
                )
                pending, file.durable = not file.durable, True
            if pending:
                self._make_durable(number)
        return saved, written

    def load(self, saved: dict[str, SavedFile], count: int, *, check: bool) -> None:
        """Load ``count`` saved rows. Full chunks are mapped; ``scrub`` checks them later unless
        ``check``.

        Raises ``DamagedFile`` if a file is missing, shorter than saved, or has another checksum.
        """
        chunks = -(-count >> self._shift)
        if count >= self._chunk_rows:
            self._make_places(chunks)
        for number in range(chunks):
            path, rows = self._path(number), min(self._chunk_rows, count - (number << self._shift))
            file = saved.get(path.name)
            if file is None:
                raise DamagedFile(f"the checkpoint has no entry for {path}")
            if file.bytes != rows * self.row_bytes:
                raise DamagedFile(
                    f"the checkpoint records {file.bytes} bytes for {path}, which has {rows} rows"
                )
            if rows == self._chunk_rows:
                self._chunks.append(self._map(number))
                self._mapped += 1
                if check:
                    check_content(path, _content(self._chunks[number]), file.crc32)
                else:
                    self._unchecked.append(number)
            else:
                chunk = self._shaped(np.frombuffer(read_file(path, file), dtype=np.uint8))
                if number:
                    chunk, part = self._full_chunk(number), chunk
                    chunk[:rows] = part
                self._chunks.append(chunk)
            self._files.append(_ChunkFile(rows, file.crc32))
        self._view = self._new_view()

    def take_up(self, mapped: int, opened: Sequence[tuple[int, int]], memory: ArenaView) -> None:
        """Show the chunks that another process has published, instead of rows of one's own.

        The first ``mapped`` chunks are files. The others are blocks of ``memory``: the offset of
        each, and its number of rows. Raises ``DamagedFile`` and ``DataDirectoryError``.
        """
        taken = (mapped, tuple(opened))
        if taken == self._taken:
            return
        if mapped + len(opened) > 1:
            del self._chunks[self._mapped :]
            self._make_places(mapped + len(opened))
        while self._mapped < mapped:
            del self._chunks[self._mapped :]
            self._chunks.append(self._map(self._mapped))
            self._mapped += 1
        del self._chunks[mapped:]
        for number, (offset, rows) in enumerate(opened, mapped):
            content = (
                self._places.map_shared(number, memory.descriptor, offset)
                if rows == self._chunk_rows
                else None
            )
            if content is None:
                content = memory.array(offset, (rows * self.row_bytes,), np.uint8)
            self._chunks.append(self._shaped(content))
        self._taken = taken
        self._view = self._new_view()

    def scrub(self, stop: Callable[[], bool]) -> None:
        """Check the chunks that ``load`` left unchecked, until ``stop()``; raises ``DamagedFile``.

        Safe alongside every other method: sealed chunks never change.
        """
        while self._unchecked and not stop():
            number = self._unchecked[-1]
            check_content(
                self._path(number), _content(self._chunks[number]), self._files[number].crc32
            )
            self._unchecked.pop()

    @property
    def checked(self) -> bool:
        """Whether every loaded chunk has been compared with its checksum."""
        return not self._unchecked

    def _room(self, number: int, rows: int) -> NDArray[Any]:
        """The chunk, with room for ``rows``.

        The first chunk grows by replacement, because older views keep reading the smaller array.
        The second and later chunks get their full size at once: the first one filled up as well.
        """
        if number < len(self._chunks) and len(self._chunks[number]) >= rows:
            return self._chunks[number]
        old = self._chunks[number] if number < len(self._chunks) else None
        room = max(rows, 8) if old is None else max(rows, 2 * len(old), 8)
        if number or room >= self._chunk_rows:
            chunk = self._full_chunk(number)
        else:
            shape = (room,) if self._width is None else (room, self._width)
            chunk = np.empty(shape, dtype=self._dtype)
        if old is None:
            self._files.append(_ChunkFile())
            self._chunks.append(chunk)
        else:
            chunk[: len(old)] = old
            self._chunks[number] = chunk
        self._view = self._new_view()
        return chunk

    def _full_chunk(self, number: int) -> NDArray[Any]:
        """Memory for a chunk of full size, at its place if the column has a range."""
        self._make_places(number + 1)
        return self._shaped(self._places.allocate(number))

    def _make_places(self, chunks: int) -> None:
        """See to it that this many chunks have a place; the present ones of full size may move."""
        full = [chunk for chunk in self._chunks if len(chunk) == self._chunk_rows]
        moved = self._places.make(chunks, [_bytes(chunk) for chunk in full], self._mapped)
        if moved is not None:
            self._chunks[: len(moved)] = [self._shaped(content) for content in moved]

    def _new_view(self) -> ColumnView:
        together = self._places.together(len(self._chunks)) if len(self._chunks) > 1 else None
        rows = None if together is None else self._shaped(together)
        return ColumnView(tuple(self._chunks), self._shift, rows)

    def _write_file(self, number: int, chunk: NDArray[Any], rows: int) -> int:
        """Extend a chunk's file to ``rows`` rows and return the bytes written. Needs the lock.

        The chunk's state is unchanged if this raises.
        """
        file = self._files[number]
        if file.rows and not self._path(number).exists():
            # The file was removed from outside: write it from its beginning, because otherwise it
            # would have a hole. A mapping of the removed file is still readable.
            file.rows, file.crc32, file.durable = 0, 0, False
        if rows <= file.rows:
            return 0
        content = _content(chunk[file.rows : rows])
        write_at(self._path(number), file.rows * self.row_bytes, content)
        file.crc32, file.rows, file.durable = zlib.crc32(content, file.crc32), rows, False
        return len(content)

    def _make_durable(self, number: int) -> None:
        try:
            make_durable(self._path(number))
        except DataDirectoryError:
            with self._files_lock:
                # After a failed fsync the kernel forgets which pages were dirty: only writing again
                # makes them durable. A mapped chunk cannot be written from memory, so the file must
                # still hold the rows that were written.
                file = self._files[number]
                if number < self._mapped:
                    check_content(
                        self._path(number), _content(self._chunks[number][: file.rows]), file.crc32
                    )
                file.rows, file.crc32, file.durable = 0, 0, False
            raise

    def _map(self, number: int) -> NDArray[Any]:
        return self._shaped(self._places.map_file(number))

    def _shaped(self, content: NDArray[np.uint8]) -> NDArray[Any]:
        rows = content.view(self._dtype)
        return rows if self._width is None else rows.reshape(-1, self._width)


def _chunk_path(directory: Path, stem: str, suffix: str, number: int) -> Path:
    return directory / f"{stem}-{number:06d}.{suffix}"


def _content(rows: NDArray[Any]) -> memoryview:
    return _bytes(rows).data


def _bytes(rows: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
