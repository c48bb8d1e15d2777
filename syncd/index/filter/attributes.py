"""The attached columns of a dataset's rows: stored as PostgreSQL sent them, and as arrays for
filters.

The columns of a row are one line of JSON: an array in the order of the columns. The lines are in an
append-only column, like keys, and are saved, checked and loaded with the other columns. ``include``
and a deep verify read the lines.

Invariant: the lines are the truth, the arrays follow from them. Arrays of a column, or of a path
into a jsonb column, are made when the first filter names it, and are kept in memory. A million
lines take about a second; after that only new rows cost. A dataset without filters pays nothing. A
filter's bitmap is also kept, because the values of a slot never change.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path as FilePath
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from syncd.index.filter.language import Filter, Path
from syncd.index.filter.terms import Terms
from syncd.index.filter.values import INSTANTS, Numbers, Values, number
from syncd.index.storage.bitmap import Bitmap, Slots, bitmap_bytes
from syncd.index.storage.blobs import Blobs, BlobsView
from syncd.index.storage.columns import Column
from syncd.types import AttachedColumn, ColumnKind

Lines = NDArray[Any]
"""Rows' columns in stored form: ``bytes`` objects (n,), each one line of JSON with its newline."""

MAX_BITMAPS = 64
"""Most bitmaps that are kept. A bitmap of a million slots takes 125 KB."""

MAX_JSON_PATHS = 64
"""Most paths into jsonb whose arrays are kept, because any client may name any path."""

READ_ROWS = 8192
EVALUATED_ROWS = 1 << 17
"""Slots per evaluation of a filter: arrays of this many bytes stay in the second-level cache."""

MAX_INTEGER_DIGITS = 4000
"""Python does not convert longer digit strings to int."""

UNREAD_ROW_ELEMENTS = 2000
"""Cost of a line that must be read first, in elements of vectors compared in the same time."""


def store_lines(rows: Sequence[str] | Sequence[bytes]) -> Lines:
    """The stored form of JSON arrays."""
    lines = np.empty(len(rows), dtype=object)
    lines[:] = [(row.encode() if isinstance(row, str) else row) + b"\n" for row in rows]
    return lines


def same_values(one: bytes, other: bytes) -> bool:
    """Whether two lines have equal values, such as 1.0 and 1.00."""
    return one == other or _decoded(one) == _decoded(other)


class Attributes:
    """The attached columns of one generation. One thread writes.

    Any thread may read the slots that a view covers.
    """

    def __init__(
        self, columns: Sequence[AttachedColumn], directory: FilePath, prefix: str, chunk_bytes: int
    ) -> None:
        self.columns = tuple(columns)
        self.lines = Blobs(
            Column(directory, f"{prefix}columns", "json", "u1", None, chunk_bytes),
            Column(directory, f"{prefix}column-ends", "u64", "<u8", None, chunk_bytes),
        )
        self._lock = threading.Lock()
        self._arrays: dict[Path, Values] = {}
        self._bitmaps: dict[bytes, tuple[int, Bitmap]] = {}
        self._decoders: dict[tuple[int, ...], msgspec.json.Decoder[Any]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory of arrays and bitmaps."""
        bitmaps = sum(bits.nbytes for _, bits in list(self._bitmaps.values()))
        return bitmaps + sum(array.nbytes for array in list(self._arrays.values()))

    def view(self) -> AttributesView:
        """The present columns, which the writer publishes."""
        return AttributesView(self, self.lines.view())

    def passing(self, lines: BlobsView, count: int, wanted: Filter) -> Bitmap:
        """A bitmap of the first ``count`` slots that pass the filter; ``lines`` is their view."""
        known, bits = self._bitmaps.get(wanted.text, (0, _NO_BITS))
        if known >= count:
            return bits
        with self._lock:
            known, bits = self._bitmaps.get(wanted.text, (0, _NO_BITS))
            if known >= count:  # another thread was first
                return bits
            arrays = self._extended(wanted.paths, lines, count)
            start = known & ~7
            larger = np.empty(bitmap_bytes(count), dtype=np.uint8)
            larger[: start >> 3] = bits[: start >> 3]
            for first in range(start, count, EVALUATED_ROWS):
                chosen = wanted.root.true(arrays, slice(first, min(first + EVALUATED_ROWS, count)))
                packed = np.packbits(chosen, bitorder="little")
                larger[first >> 3 : (first >> 3) + packed.size] = packed
            self._bitmaps.pop(wanted.text, None)
            while len(self._bitmaps) >= MAX_BITMAPS:
                del self._bitmaps[next(iter(self._bitmaps))]
            self._bitmaps[wanted.text] = count, larger
            return larger

    def cost(self, count: int, wanted: Filter) -> int:
        """Cost of ``passing``, in elements of vectors that could be compared in the same time."""
        known, _ = self._bitmaps.get(wanted.text, (0, _NO_BITS))
        if known >= count:
            return 0
        # Another thread reads lines now. The event loop must not wait for it, so the cost is the
        # most.
        if self._lock.locked():
            return count * UNREAD_ROW_ELEMENTS
        arrays = [self._arrays.get(path) for path in wanted.paths]
        unread = max((count - (0 if array is None else array.count) for array in arrays), default=0)
        return max(unread, 0) * UNREAD_ROW_ELEMENTS + (count - known) * wanted.conditions * 4

    def _extended(
        self, paths: Iterable[Path], lines: BlobsView, count: int
    ) -> Mapping[Path, Values]:
        """The arrays of ``paths``, extended to at least ``count`` slots."""
        for path in paths:
            # Move the array to the end: the first array is then the least recently used.
            array = self._arrays.pop(path, None)
            self._arrays[path] = (
                values_of(self.columns[path.column].kind) if array is None else array
            )
        behind: dict[int, list[Path]] = {}
        for path in paths:
            if self._arrays[path].count < count:
                behind.setdefault(self._arrays[path].count, []).append(path)
        for start, some in behind.items():
            for first in range(start, count, READ_ROWS):
                self._read(some, lines, first, min(first + READ_ROWS, count))
        arrays = {path: self._arrays[path] for path in paths}
        others = [path for path in self._arrays if path.keys and path not in arrays]
        for path in others[
            : max(0, len(others) + sum(bool(path.keys) for path in paths) - MAX_JSON_PATHS)
        ]:
            del self._arrays[path]
        return arrays

    def _read(self, paths: Sequence[Path], lines: BlobsView, start: int, stop: int) -> None:
        """Append the values of the slots ``start <= slot < stop`` to the arrays of ``paths``."""
        blob, ends = lines.columns
        begin = int(ends.read(start - 1, start)[0]) if start else 0
        content = blob.read(begin, int(ends.read(stop - 1, stop)[0])).tobytes()
        wanted = tuple(sorted({path.column for path in paths}))
        try:
            rows = self._decoder(wanted).decode_lines(content)
            values = {place: [getattr(row, f"column_{place}") for row in rows] for place in wanted}
        except msgspec.DecodeError:  # an integer of thousands of digits
            read = [_decoded(line) for line in content.splitlines()]
            values = {place: [row[place] for row in read] for place in wanted}
        for path in paths:
            found = values[path.column]
            self._arrays[path].extend(
                [_inside(value, path.keys) for value in found] if path.keys else found
            )

    def _decoder(self, wanted: tuple[int, ...]) -> msgspec.json.Decoder[Any]:
        """A decoder for some columns of a line; it skips the others."""
        decoder = self._decoders.get(wanted)
        if decoder is None:
            fields = [
                (f"column_{place}", Any if place in wanted else msgspec.Raw)
                for place in range(wanted[-1] + 1)
            ]
            row = msgspec.defstruct("Row", fields, array_like=True, gc=False)
            exact = any(self.columns[place].kind in ("numeric", "json") for place in wanted)
            decoder = self._decoders[wanted] = msgspec.json.Decoder(
                row, float_hook=number if exact else None
            )
        return decoder


@dataclass(frozen=True, slots=True)
class AttributesView:
    """The attached columns of a dataset at one moment."""

    _attributes: Attributes
    lines: BlobsView

    @property
    def columns(self) -> tuple[AttachedColumn, ...]:
        """The columns for filters and ``include``."""
        return self._attributes.columns

    def passing(self, count: int, wanted: Filter) -> Bitmap:
        """A bitmap of the first ``count`` slots that pass the filter; later bits mean nothing."""
        return self._attributes.passing(self.lines, count, wanted)

    def cost(self, count: int, wanted: Filter) -> int:
        """See ``Attributes.cost``."""
        return self._attributes.cost(count, wanted)

    def stored(self, slots: Slots) -> Lines:
        """The lines of ``slots``, in the same order."""
        return self.lines.take(slots)

    def values(self, paths: Sequence[Path], slots: Slots) -> list[list[Any]]:
        """For each path its values at ``slots``, as JSON.

        Whole columns keep every digit that PostgreSQL sent.
        """
        lines = self.lines.take(slots).tolist() if slots.size else []
        whole = [_raw_row.decode(line) for line in lines]
        deep: dict[int, list[Any]] = {}
        found = []
        for path in paths:
            if not path.keys:
                found.append([row[path.column] for row in whole])
                continue
            if path.column not in deep:
                deep[path.column] = [_with_raw_numbers(bytes(row[path.column])) for row in whole]
            found.append([_inside(value, path.keys) for value in deep[path.column]])
        return found


_NO_BITS: Bitmap = np.empty(0, dtype=np.uint8)
_raw_row = msgspec.json.Decoder(list[msgspec.Raw])
_raw_numbers = msgspec.json.Decoder(float_hook=lambda digits: msgspec.Raw(digits.encode()))


def values_of(kind: ColumnKind) -> Values:
    """Empty arrays for a column of this kind."""
    return (
        Numbers(kind)
        if kind in ("integer", "real", "double", "numeric", *INSTANTS)
        else Terms(kind)
    )


def _decoded(line: bytes) -> Any:
    """Any JSON that PostgreSQL writes, also numbers above the largest float or with thousands of
    digits.
    """
    return json.loads(line, parse_int=_integer, parse_float=number)


def _integer(digits: str) -> int | float | Decimal:
    return int(digits) if len(digits) < MAX_INTEGER_DIGITS else number(digits)


def _with_raw_numbers(document: bytes) -> Any:
    """A document whose numbers are written back as they were read."""
    try:
        return _raw_numbers.decode(document)
    except msgspec.DecodeError:
        return json.loads(
            document,
            parse_int=_raw_integer,
            parse_float=lambda digits: msgspec.Raw(digits.encode()),
        )


def _raw_integer(digits: str) -> msgspec.Raw:
    return msgspec.Raw(digits.encode())


def _inside(value: Any, keys: tuple[str, ...]) -> Any:
    """The value at ``keys`` in a document; None if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
