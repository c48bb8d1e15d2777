"""The main process's side: it publishes each view of one index in the arena.

The open chunks of the columns are copied, row after row as they are published; full chunks are
files, which readers map. The runs of the key map lie in the arena themselves.

Invariant: every block that the published word leads to is kept until the word points elsewhere.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import structlog
from numpy.typing import NDArray

from syncd.index.codes.codes import Codes
from syncd.index.generation.generation import Generation
from syncd.index.generation.saving import State
from syncd.index.rows.key_map import HashMultimapView, Run
from syncd.index.shared.publication import Publication, PublishedCodes, PublishedColumn
from syncd.index.storage.arena import UNIT, Arena
from syncd.index.storage.bitmap import Bitmap, bitmap_bytes
from syncd.index.storage.columns import ColumnView
from syncd.index.view import View

_uids = itertools.count(1)

logger = structlog.get_logger()


@dataclass(slots=True)
class _Mirror:
    """The copy of an open chunk: its first ``rows`` rows are copied."""

    chunk: NDArray[Any]
    rows: int = 0


class Exporter:
    """Publishes one index under a word of its own. Calls come one at a time."""

    def __init__(self, arena: Arena, word: int) -> None:
        self.arena = arena
        self.word = word
        self.uid = next(_uids)
        self._generation: Generation | None = None
        self._mirrors: list[dict[int, _Mirror]] = []
        self._buffer: tuple[Run, Run, int] | None = None
        self._bits: tuple[Bitmap, NDArray[np.uint8], int] | None = None
        self._dead: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._codes: tuple[Codes, int, NDArray[Any]] | None = None
        self._numbers = itertools.count(1)
        self.written: set[str] = set()
        """Names of the codes' files that were written for readers, until they are removed."""
        self._kept: list[Any] = []
        """Everything that the published word leads to."""

    def place(self, array: NDArray[Any]) -> NDArray[Any]:
        """The array in the arena: itself if it lies there, else a copy."""
        return array if self.arena.offset(array) >= 0 else self.arena.put(array)

    def note_codes(self, codes: Codes, published: PublishedCodes) -> None:
        """Note codes whose files are written: views that have them can be published with them."""
        block = self.arena.put_bytes(msgspec.json.encode(published))
        self.written |= {file.name for file in published.files}
        self._codes = codes, next(self._numbers), block

    def publish(self, state: State) -> None:
        """Publish a view. Without memory for it, readers have no view until the next one."""
        try:
            kept, content = self._describe(state)
            block = self.arena.put_bytes(content)
        except MemoryError as error:
            logger.error(
                "not_published", directory=str(state.generation.directory), error=str(error)
            )
            self.withdraw()
            return
        self.arena.point(self.word, block)
        self._kept = [kept, block]

    def withdraw(self) -> None:
        """Let readers hand over until the next view."""
        self.arena.point(self.word, None)
        self._kept = []

    def _describe(self, state: State) -> tuple[list[Any], bytes]:
        generation, view = state.generation, state.view
        if generation is not self._generation:
            self._generation, self._bits, self._buffer = generation, None, None
            self._mirrors = [{} for _ in generation.shared_columns(view)]
        columns = []
        kept: list[Any] = []
        for mirrors, (column, rows) in zip(
            self._mirrors, generation.shared_columns(view), strict=True
        ):
            columns.append(self._column(mirrors, column, rows, kept))
        if self._dead is None or self._dead[0] is not view.live.dead:
            self._dead = view.live.dead, self.arena.put(view.live.dead)
        bits, dead = self._live(view), self._dead[1]
        kept += [bits, dead]
        runs = []
        for run in view.key_map.runs:
            hashes, values = map(self.place, run)
            kept += [hashes, values]
            runs.append((self.arena.offset(hashes), self.arena.offset(values), hashes.size))
        buffered = view.key_map.buffered
        buffer = self._key_buffer(view.key_map)
        kept += buffer
        codes = None
        noted = self._codes  # another thread may note newer codes now
        if noted is not None and noted[0] is state.codes:
            _, number, block = noted
            kept.append(block)
            codes = number, self.arena.offset(block) // UNIT
        publication = Publication(
            uid=self.uid,
            directory=str(generation.directory),
            generation=generation.number,
            metric=view.format.metric,
            half=view.format.half,
            key_kind=view.key_kind,
            dim=view.dim,
            chunk_bytes=generation.chunk_bytes,
            attached=view.columns,
            count=view.count,
            live=view.live.count,
            bits=(self.arena.offset(bits), bits.size),
            dead=(self.arena.offset(dead), dead.size),
            columns=tuple(columns),
            runs=tuple(runs),
            buffer=(self.arena.offset(buffer[0]), self.arena.offset(buffer[1]), buffered),
            has_codes=state.codes is not None,
            codes=codes,
        )
        return kept, msgspec.json.encode(publication)

    def _column(
        self, mirrors: dict[int, _Mirror], column: ColumnView, rows: int, kept: list[Any]
    ) -> PublishedColumn:
        mapped = 0
        for chunk in column.chunks:
            if chunk.flags.writeable:  # only the mapping of a file is not
                break
            mapped += 1
        for number in [number for number in mirrors if number < mapped]:
            del mirrors[number]
        blocks = []
        for number in range(mapped, len(column.chunks)):
            chunk = column.chunks[number]
            used = min(rows - (number << column.shift), len(chunk))
            if used <= 0:
                break
            mirror = mirrors.get(number)
            if mirror is None or len(mirror.chunk) < used:
                mirror = mirrors[number] = _Mirror(self.arena.empty(chunk.shape, chunk.dtype))
            mirror.chunk[mirror.rows : used] = chunk[mirror.rows : used]
            mirror.rows = max(mirror.rows, used)
            kept.append(mirror.chunk)
            blocks.append((self.arena.offset(mirror.chunk), len(mirror.chunk)))
        return PublishedColumn(mapped, tuple(blocks))

    def _key_buffer(self, key_map: HashMultimapView) -> Run:
        """The buffer of the key map in the arena: entries that follow are added to the same one."""
        hashes, values = key_map.buffer
        if self._buffer is None or self._buffer[0] is not key_map.buffer:
            copies = tuple(self.arena.empty(each.shape, each.dtype) for each in (hashes, values))
            self._buffer = key_map.buffer, (copies[0], copies[1]), 0
        source, (its_hashes, its_values), copied = self._buffer
        its_hashes[copied : key_map.buffered] = hashes[copied : key_map.buffered]
        its_values[copied : key_map.buffered] = values[copied : key_map.buffered]
        self._buffer = source, (its_hashes, its_values), max(copied, key_map.buffered)
        return its_hashes, its_values

    def _live(self, view: View) -> NDArray[np.uint8]:
        """The live bits in the arena.

        If no bit was cleared, the new slots' bits are added to the published ones: readers look at
        no bit past their view's count.
        """
        bits, size = view.live.bits, bitmap_bytes(view.count)
        if self._bits is not None:
            before, block, count = self._bits
            if before is bits and count <= view.count and size <= block.size:
                first = count >> 3
                block[first:size] = bits[first:size]
                self._bits = bits, block, view.count
                return block
        block = self.arena.empty((bits.size,), np.uint8)
        block[:size] = bits[:size]
        self._bits = bits, block, view.count
        return block
