"""Byte strings of any length by slot: text keys, and lines of attached columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncd.index.storage.bitmap import Slots
from syncd.index.storage.columns import Column, ColumnView
from syncd.index.storage.files import SavedFile

Bytes = NDArray[Any]
"""(n,) array of ``bytes`` objects."""


@dataclass(frozen=True, slots=True)
class BlobsView:
    """The values at one moment. The value of ``slot`` is ``blob[ends[slot - 1]:ends[slot]]``."""

    blob: ColumnView
    ends: ColumnView

    @property
    def columns(self) -> tuple[ColumnView, ...]:
        """The views of both columns, in the order of ``Blobs.columns``."""
        return (self.blob, self.ends)

    def take(self, slots: Slots) -> Bytes:
        """The values of ``slots``, (n,), in the same order."""
        ends = self.ends.take(slots).tolist()
        starts = self.ends.take(np.maximum(slots - 1, 0)).tolist()
        values = np.empty(slots.size, dtype=object)
        for row, slot in enumerate(slots.tolist()):
            start = starts[row] if slot else 0
            values[row] = self.blob.read(start, ends[row]).tobytes() if ends[row] > start else b""
        return values


class Blobs:
    """Byte strings by slot, in two columns: all the bytes, and where each value ends.

    One thread writes.
    """

    def __init__(self, blob: Column, ends: Column) -> None:
        self._blob, self._ends = blob, ends
        self.columns = (blob, ends)

    def rows(self, count: int) -> tuple[int, ...]:
        """Number of rows in each column when ``count`` values are stored."""
        return (self._end(count), count)

    def write(self, start: int, stored: Bytes) -> None:
        """Write values at the slots from ``start`` on."""
        values = stored.tolist()
        blob_start = self._end(start)
        ends = blob_start + np.cumsum(
            np.fromiter(map(len, values), dtype=np.uint64, count=len(values)), dtype=np.uint64
        )
        self._blob.write(blob_start, np.frombuffer(b"".join(values), dtype=np.uint8))
        self._ends.write(start, ends)

    def load(self, saved: dict[str, SavedFile], count: int) -> None:
        """Load ``count`` saved values and check them; raises ``DamagedFile``."""
        self._ends.load(saved, count, check=True)
        self._blob.load(saved, self._end(count), check=True)

    def view(self) -> BlobsView:
        """The present values, which the writer publishes."""
        return BlobsView(self._blob.view, self._ends.view)

    def _end(self, count: int) -> int:
        return int(self._ends.view.read(count - 1, count)[0]) if count else 0
