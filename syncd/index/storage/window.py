"""Rows out of many chunks by one call.

The chunks lie anywhere in memory. A *window* is an array over everything from the first of them to
the last, whose elements are whole rows and overlap: one begins at every number. Whatever row lies
at a multiple of a number's size from the lowest chunk is an element, so numpy copies any rows at
once, where going chunk by chunk or row by row takes two to four times as long. Only elements that
are rows are ever touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncd.index.storage.bitmap import Slots


class Window:
    """Over ``chunks`` (rows,) or (rows, width), of ``1 << shift`` rows but for the last; they live
    as long as this does.
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
        """A copy of ``rows``, in their order: shape (n,), or (n, width)."""
        first = self._chunks[0]
        copied = self._rows[self._bases[rows >> self._shift] + (rows & self._mask) * self._width]
        taken: NDArray[Any] = copied.view(first.dtype).reshape(-1, *first.shape[1:])
        return taken


class _Memory:
    """What numpy makes the window of."""

    def __init__(self, address: int, elements: int, itemsize: int, width: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": (elements,),
            "strides": (itemsize,),
            "typestr": f"|V{itemsize * width}",
        }
