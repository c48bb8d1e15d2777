"""Which slots are live: one bit per slot, in the bit order of FAISS's ``IDSelectorBitmap``
(little-endian).

Invariant: a published bit never changes in place. Clearing bits copies the bitmap first (3 µs for a
million slots), so a view keeps the liveness of its own pass. A view ignores all bits at or past its
count, so bits of new slots are set without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Bitmap = NDArray[np.uint8]
Slots = NDArray[np.int64]

NO_SLOTS: Slots = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Live:
    """The live slots after one pass; immutable, a change returns a new object.

    ``bits`` has one bit per slot, and ``count`` is the number of live slots. ``dead`` (chunks,)
    int64 is the number of dead slots in each chunk.
    """

    bits: Bitmap
    count: int
    dead: NDArray[np.int64]

    @classmethod
    def of(cls, bits: Bitmap, stop: int, shift: int) -> Live:
        """Count the bits below ``stop`` per chunk of ``1 << shift`` slots; later bits are zero."""
        counts = count_bits(bits, 1 << shift)
        slots = np.full(len(counts), 1 << shift, dtype=np.int64)
        if slots.size:
            slots[-1] = stop - ((len(counts) - 1) << shift)
        return cls(bits, int(counts.sum()), slots - counts)

    @classmethod
    def nothing(cls) -> Live:
        """The state of an empty dataset."""
        return cls(empty_bitmap(0), 0, np.zeros(0, dtype=np.int64))

    def after(self, gone: Slots, start: int, stop: int, shift: int) -> Live:
        """A copy with the slots ``gone`` dead and the new slots ``start <= slot < stop`` live."""
        bits = cleared(self.bits, gone, stop)
        set_range(bits, start, stop)
        if not gone.size and self.dead.size << shift >= stop:
            return Live(bits, self.count + stop - start, self.dead)
        dead = np.bincount(gone >> shift, minlength=-(-stop >> shift)).astype(np.int64, copy=False)
        dead[: self.dead.size] += self.dead
        return Live(bits, self.count + stop - start - gone.size, dead)


def empty_bitmap(slots: int) -> Bitmap:
    """A bitmap with room for ``slots`` slots, all dead."""
    return np.zeros(bitmap_bytes(slots), dtype=np.uint8)


def bitmap_bytes(slots: int) -> int:
    """Number of bytes that hold ``slots`` bits."""
    return (slots + 7) >> 3


def grown(bitmap: Bitmap, slots: int) -> Bitmap:
    """``bitmap`` itself if it has room for ``slots``, else a copy with at least twice the room."""
    needed = bitmap_bytes(slots)
    if needed <= bitmap.size:
        return bitmap
    larger = np.zeros(max(needed, 2 * bitmap.size, 8), dtype=np.uint8)
    larger[: bitmap.size] = bitmap
    return larger


def set_range(bitmap: Bitmap, start: int, stop: int) -> None:
    """Make the slots ``start <= slot < stop`` live, in place."""
    first, last = (start + 7) >> 3, stop >> 3
    if first > last:  # inside one byte
        bitmap[start >> 3] |= ((1 << (stop - start)) - 1) << (start & 7)
        return
    if start & 7:
        bitmap[start >> 3] |= (0xFF << (start & 7)) & 0xFF
    bitmap[first:last] = 0xFF
    if stop & 7:
        bitmap[last] |= (1 << (stop & 7)) - 1


def set_bits(bitmap: Bitmap, slots: Slots) -> None:
    """Make ``slots`` live, in place; several may share a byte."""
    np.bitwise_or.at(bitmap, slots >> 3, _bits(slots))


def clear_bits(bitmap: Bitmap, slots: Slots) -> None:
    """Make ``slots`` dead, in place; several may share a byte."""
    np.bitwise_and.at(bitmap, slots >> 3, ~_bits(slots))


def cleared(live: Bitmap, dead: Slots, slots: int) -> Bitmap:
    """``live`` with room for ``slots``; a copy with the ``dead`` slots cleared, if any."""
    larger = grown(live, slots)
    if dead.size:
        larger = larger.copy() if larger is live else larger
        clear_bits(larger, dead)
    return larger


def test_bits(bitmap: Bitmap, slots: Slots) -> NDArray[np.bool_]:
    """Whether each of ``slots`` is live, (n,) bool."""
    bits: NDArray[np.uint8] = bitmap[slots >> 3] & _bits(slots)
    return bits.astype(np.bool_)


def live_slots(bitmap: Bitmap, stop: int) -> Slots:
    """Every live slot below ``stop``, ascending."""
    bits = np.unpackbits(bitmap[: bitmap_bytes(stop)], count=stop, bitorder="little")
    return np.flatnonzero(bits.view(np.bool_))  # on bool, a quarter of the time


def count_bits(bitmap: Bitmap, slots: int) -> NDArray[np.int64]:
    """Number of set bits in each run of ``slots`` slots; ``slots`` is a multiple of 8.

    Bits past the last slot must be zero.
    """
    if not bitmap.size:
        return np.zeros(0, dtype=np.int64)
    return np.add.reduceat(
        np.bitwise_count(bitmap), np.arange(0, bitmap.size, slots >> 3), dtype=np.int64
    )


def prefix(bitmap: Bitmap, stop: int) -> Bitmap:
    """A copy of the bits below ``stop``; the other bits of its last byte are zero."""
    copy = bitmap[: bitmap_bytes(stop)].copy()
    if stop & 7:
        copy[-1] &= (1 << (stop & 7)) - 1
    return copy


def _bits(slots: Slots) -> NDArray[np.uint8]:
    return np.left_shift(np.uint8(1), (slots & 7).astype(np.uint8))
