"""Copies rows from many chunks in one numpy call.

The chunks lie anywhere in memory. A *window* is an array over the memory from the first chunk to
the last. Its elements have the size of a row and overlap: one element begins at every multiple of a
number's size from the lowest chunk. So every row of every chunk is an element, and numpy copies any
rows in one call. Copying chunk by chunk or row by row takes two to four times as long.

Invariant: only elements that are rows are ever read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncd.index.storage.bitmap import Slots


class Window:
    """A window over ``chunks`` (rows,) or (rows, width); all but the last have ``1 << shift`` rows.

    The chunks live as long as the window.
    """

    __slots__ = ("_bases", "_chunks", "_mask", "_rows", "_shift", "_width")

    def __init__(self, chunks: Sequence[NDArray[Any]], shift: int) -> None:
        self._chunks = tuple(chunks)
        self._shift, self._mask = shift, (1 << shift) - 1
        first = chunks[0]
        self._width = first[0].size
        addresses = np.array(
            [chunk.__array_interface__["data"][0] for chunk in chunks], dtype=np.int64
        )
        lowest = int(addresses.min())
        self._bases = (addresses - lowest) // first.itemsize
        last_rows = self._bases + [(len(chunk) - 1) * self._width for chunk in chunks]
        self._rows: NDArray[Any] = np.asarray(
            _Memory(lowest, int(last_rows.max()) + 1, first.itemsize, self._width)
        )

    def take(self, rows: Slots) -> NDArray[Any]:
        """A copy of ``rows``, in the same order: shape (n,), or (n, width)."""
        first = self._chunks[0]
        copied = self._rows[self._bases[rows >> self._shift] + (rows & self._mask) * self._width]
        taken: NDArray[Any] = copied.view(first.dtype).reshape(-1, *first.shape[1:])
        return taken


class _Memory:
    """Address range in numpy's array interface, from which numpy makes the window."""

    def __init__(self, address: int, elements: int, itemsize: int, width: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": (elements,),
            "strides": (itemsize,),
            "typestr": f"|V{itemsize * width}",
        }
