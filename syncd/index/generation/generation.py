"""The columns of one dataset from its first row to its last: written, sealed, saved and loaded
together.

Invariant: the files of two generations never share a name. A dataset that becomes empty starts a
new generation, and the old checkpoint's files stay unchanged until no manifest names them. So a
dataset without rows may take another dimension.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.index.codes.codes import Codes, LiveCodes
from syncd.index.codes.files import load_codes, save_codes
from syncd.index.filter.attributes import Attributes
from syncd.index.generation.stored_rows import StoredRows
from syncd.index.rows.key_map import HashMultimap, HashMultimapView, Place
from syncd.index.rows.keys import hash_keys, key_columns
from syncd.index.rows.vectors import VectorFormat
from syncd.index.saved import Saved, SavedIndex
from syncd.index.storage.arena import ArenaView
from syncd.index.storage.bitmap import Bitmap, Live, bitmap_bytes, live_slots, prefix, test_bits
from syncd.index.storage.columns import Column, ColumnView
from syncd.index.storage.files import SavedFile, make_durable, read_file, write_at
from syncd.index.view import View
from syncd.types import AttachedColumn, KeyKind

CHECK_AT_LOAD_BYTES = 64 << 20
"""Most bytes of vectors that ``load`` compares with their checksums (0.1 s).

``scrub`` compares larger ones.
"""


class Generation:
    """Columns and key map of one generation.

    A view determines its rows: slots past the view's count have no row.
    """

    def __init__(
        self,
        directory: Path,
        number: int,
        format_: VectorFormat,
        key_kind: KeyKind,
        dim: int | None,
        chunk_bytes: int,
        columns: Sequence[AttachedColumn] = (),
    ) -> None:
        self.directory, self.number, self.dim = directory, number, dim
        self._format, self._key_kind = format_, key_kind
        self.chunk_bytes = chunk_bytes
        self.codes_lock = threading.Lock()
        """Held while files of codes are written: a checkpoint and a publication may write them."""
        prefix = f"{number:04d}-"
        suffix = "f16" if format_.half else "f32"
        self._vectors = Column(
            directory,
            f"{prefix}vectors",
            suffix,
            format_.dtype,
            dim or 1,
            chunk_bytes,
            contiguous=True,
        )
        self._norms = (
            Column(directory, f"{prefix}norms", "f64", "<f8", None, chunk_bytes)
            if format_.has_norms
            else None
        )
        self._prints = Column(directory, f"{prefix}prints", "i64", "<i8", None, chunk_bytes)
        self._keys = key_columns(key_kind, directory, prefix, chunk_bytes)
        self._key_map = HashMultimap()
        self._attributes = Attributes(columns, directory, prefix, chunk_bytes) if columns else None

    @classmethod
    def of_saved(cls, directory: Path, saved: SavedIndex) -> Generation:
        """The generation that ``saved`` records, still without rows."""
        format_ = VectorFormat(saved.metric, saved.half)
        number, kind, dim = saved.generation, saved.key_kind, saved.dim
        return cls(directory, number, format_, kind, dim, saved.chunk_bytes, saved.columns)

    def view(self, count: int, live: Live, codes: Codes | None = None) -> View:
        """A view of the first ``count`` slots, with codes for some of them."""
        return View(
            format=self._format,
            key_kind=self._key_kind,
            dim=self.dim,
            count=count,
            live=live,
            vectors=self._vectors.view,
            norms=None if self._norms is None else self._norms.view,
            prints=self._prints.view,
            stored_keys=self._keys.view(),
            key_map=self._key_map.view,
            codes=None if codes is None else LiveCodes(codes, live.bits),
            attributes=None if self._attributes is None else self._attributes.view(),
        )

    def move_key_map(self, place: Place) -> None:
        """See ``HashMultimap.move``."""
        self._key_map.move(place)

    def shared_columns(self, view: View) -> list[tuple[ColumnView, int]]:
        """The columns of a view that searches read, each with its number of rows."""
        columns = [(view.vectors, view.count)]
        if view.norms is not None:
            columns.append((view.norms, view.count))
        columns += zip(view.stored_keys.columns, self._keys.rows(view.count), strict=True)
        if self._attributes is not None and view.attributes is not None:
            rows = self._attributes.lines.rows(view.count)
            columns += zip(view.attributes.lines.columns, rows, strict=True)
        return columns

    def take_up(
        self,
        columns: Sequence[tuple[int, Sequence[tuple[int, int]]]],
        key_map: HashMultimapView,
        memory: ArenaView,
    ) -> None:
        """Show what another process has published of ``shared_columns``; see ``Column.take_up``."""
        mine = [self._vectors]
        if self._norms is not None:
            mine.append(self._norms)
        mine += self._keys.columns
        if self._attributes is not None:
            mine += self._attributes.lines.columns
        for column, (mapped, opened) in zip(mine, columns, strict=True):
            column.take_up(mapped, opened, memory)
        self._key_map.view = key_map

    def empty_view(self) -> View:
        """A view without rows."""
        return self.view(0, Live.nothing())

    def write(
        self,
        start: int,
        rows: StoredRows,
        live: Bitmap,
    ) -> None:
        """Write rows in memory at the slots from ``start`` on; they count when a view covers them.

        ``live`` is the next view's bitmap: the key map leaves out dead slots when it merges.
        """
        self._vectors.write(start, rows.vectors.rows)
        if self._norms is not None and rows.vectors.norms is not None:
            self._norms.write(start, rows.vectors.norms)
        self._prints.write(start, rows.prints)
        self._keys.write(start, rows.keys)
        if self._attributes is not None and rows.lines is not None:
            self._attributes.lines.write(start, rows.lines)
        slots = np.arange(start, start + len(rows), dtype=np.int64)
        self._key_map.add(rows.hashes, slots, keep=lambda values: test_bits(live, values))

    def seal(self, count: int) -> bool:
        """Move full chunks of published rows to disk if possible; returns whether any moved."""
        sealed = [column.seal(rows) for column, rows in self._columns(count)]
        return any(sealed)

    def is_sealed(self, count: int) -> bool:
        """Whether every full chunk below ``count`` is on disk."""
        return all(column.is_sealed(rows) for column, rows in self._columns(count))

    def discard(self) -> None:
        """Remove the files of a generation that was never published.

        Files that cannot be removed now are leftovers, which the next start removes.
        """
        for path in self.directory.glob(f"{self.number:04d}-*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def save(self, view: View, live_sequence: int, code_number: int, chunk_bytes: int) -> Saved:
        """Make a view's rows durable, with a bitmap under a new name.

        Raises ``DataDirectoryError``; nothing is lost then, and the next call continues.
        """
        files, bytes_written = self._save_columns(view)
        live_name = ""
        if view.count:
            live_name = f"{self.number:04d}-live-{live_sequence:06d}.bits"
            live = prefix(view.live.bits, view.count)
            write_at(self.directory / live_name, 0, live.data, truncate=True)
            make_durable(self.directory / live_name)
            files.append(SavedFile.of(live_name, live))
            bytes_written += live.nbytes
        codes = None
        if view.codes is not None:
            with self.codes_lock:
                codes, code_files, code_bytes = save_codes(self.directory, view.codes.codes)
            files += code_files
            bytes_written += code_bytes
        if files:
            make_durable(self.directory)
        saved = SavedIndex(
            metric=self._format.metric,
            key_kind=self._key_kind,
            half=self._format.half,
            dim=self.dim,
            slots=view.count,
            generation=self.number,
            chunk_bytes=chunk_bytes,
            live_sequence=live_sequence,
            live_name=live_name,
            files=tuple(files),
            code_number=code_number,
            codes=codes,
            columns=() if self._attributes is None else self._attributes.columns,
        )
        return Saved(saved, bytes_written)

    def load(self, saved: SavedIndex) -> View:
        """Load the rows that ``save`` wrote; raises ``DamagedFile``."""
        files = {file.name: file for file in saved.files}
        count = saved.slots
        if not count:
            return self.empty_view()
        live_file = files.get(saved.live_name)
        if live_file is None or live_file.bytes != bitmap_bytes(count):
            raise DamagedFile(
                f"the checkpoint has no bitmap for the {count} slots in {self.directory}"
            )
        live = np.frombuffer(read_file(self.directory / saved.live_name, live_file), dtype=np.uint8)
        self._vectors.load(
            files, count, check=count * self._vectors.row_bytes <= CHECK_AT_LOAD_BYTES
        )
        if self._norms is not None:
            self._norms.load(files, count, check=True)
        self._prints.load(files, count, check=True)
        self._keys.load(files, count)
        if self._attributes is not None:
            self._attributes.lines.load(files, count)
        slots = live_slots(live, count)
        if slots.size:
            stored = self._keys.view().take(slots)
            self._key_map.add(hash_keys(self._key_kind, stored), slots)
        return self.view(count, Live.of(live, count, self.chunk_shift))

    def load_codes(self, saved: SavedIndex) -> tuple[Codes | None, str]:
        """The saved codes, if any, and why they cannot be loaded (empty if they can).

        Damage is not an error: codes can be computed again from the vectors.
        """
        recorded = saved.codes or saved.earlier_codes
        if recorded is None:
            return None, ""
        try:
            codes = load_codes(
                self.directory,
                recorded,
                {file.name: file for file in saved.files},
                metric=saved.metric,
                dim=saved.dim or 0,
                generation=saved.generation,
            )
        except (DamagedFile, DataDirectoryError) as error:
            return None, str(error)
        return codes, ""

    @property
    def chunk_shift(self) -> int:
        """Binary logarithm of the number of slots in a chunk of vectors."""
        return self._vectors.view.shift

    def scrub(self, stop: Callable[[], bool]) -> None:
        """Compare the vector files that ``load`` left out with their checksums, until ``stop()``.

        Raises ``DamagedFile``.
        """
        self._vectors.scrub(stop)

    @property
    def checked(self) -> bool:
        """Whether every loaded byte has been compared with its checksum."""
        return self._vectors.checked

    @property
    def heap_bytes(self) -> int:
        """Bytes of memory of columns and key map; mappings are not counted."""
        attributes = 0 if self._attributes is None else self._attributes.nbytes
        return (
            sum(column.heap_bytes for column, _ in self._columns(0))
            + self._key_map.view.nbytes
            + attributes
        )

    @property
    def disk_bytes(self) -> int:
        """Bytes in the columns' files."""
        return sum(column.disk_bytes for column, _ in self._columns(0))

    def _save_columns(self, view: View) -> tuple[list[SavedFile], int]:
        files, bytes_written = [], 0
        columns = [
            (self._vectors, view.vectors, view.count),
            (self._prints, view.prints, view.count),
        ]
        if self._norms is not None and view.norms is not None:
            columns.append((self._norms, view.norms, view.count))
        key_rows = self._keys.rows(view.count)
        columns += zip(self._keys.columns, view.stored_keys.columns, key_rows, strict=True)
        if self._attributes is not None and view.attributes is not None:
            lines = self._attributes.lines
            columns += zip(
                lines.columns, view.attributes.lines.columns, lines.rows(view.count), strict=True
            )
        for column, column_view, rows in columns:
            saved, written = column.save(column_view, rows)
            files += saved
            bytes_written += written
        return files, bytes_written

    def _columns(self, count: int) -> list[tuple[Column, int]]:
        columns = [(self._vectors, count), (self._prints, count)]
        if self._norms is not None:
            columns.append((self._norms, count))
        columns += zip(self._keys.columns, self._keys.rows(count), strict=True)
        if self._attributes is not None:
            columns += zip(
                self._attributes.lines.columns, self._attributes.lines.rows(count), strict=True
            )
        return columns
