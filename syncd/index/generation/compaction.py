"""Dead slots given back: the live rows of one generation moved into another, beside readers, saves
and the writer.

Rows keep their order, so a new slot is the place of the old one among those that were moved. First
what a view shows is copied, then, again and again, what passes have changed meanwhile; each such
round is shorter than the one before, and only the last one keeps the writer waiting. The new
generation's files are named like no other's and belong to no checkpoint until the rows are
published: a crash or a failure leaves the old ones.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np

from syncd.errors import DataDirectoryError
from syncd.index.build.plan import encode
from syncd.index.codes.codes import Codes
from syncd.index.generation.generation import Generation
from syncd.index.generation.stored_rows import StoredRows
from syncd.index.rows.keys import hash_keys
from syncd.index.storage.bitmap import (
    Bitmap,
    Live,
    Slots,
    bitmap_bytes,
    clear_bits,
    empty_bitmap,
    grown,
    live_slots,
    prefix,
    set_bits,
    set_range,
    test_bits,
)
from syncd.index.storage.stopping import Cancelled, Stop
from syncd.index.view import View

BLOCK_BYTES = 1 << 20
LAST_ROUND_SLOTS = 1000
"""For so many new slots the writer may have to wait: about a millisecond."""
MOST_ROUNDS = 20


class Move:
    """The rows of one generation on their way into ``target``, which nobody else knows yet."""

    def __init__(self, view: View, target: Generation) -> None:
        self.target = target
        self._view = view
        """What was followed last, up to ``_stop``."""
        self._stop = 0
        self._old: Slots = np.empty(0, dtype=np.int64)
        """The old slot of each new one, ascending."""
        self._live = empty_bitmap(0)

    def follow(self, view: View, stop: Stop) -> None:
        """Bring the target to what ``view``, of the same generation and not older, shows; raises
        ``Cancelled`` and ``DataDirectoryError``.
        """
        self._bury(view)
        fresh = live_slots(view.live.bits, view.count)
        fresh = fresh[np.searchsorted(fresh, self._stop) :]
        step = max(8, BLOCK_BYTES // (4 * (view.dim or 1)))
        start = self._old.size
        for offset in range(0, fresh.size, step):
            if stop():
                raise Cancelled
            self.copy(view, fresh[offset : offset + step], start + offset)
        self._old = np.concatenate((self._old, fresh))
        self._view, self._stop = view, view.count

    def copy(self, view: View, slots: Slots, start: int) -> None:
        """Put some rows at the new slots from ``start`` on, full chunks onto the disk; raises
        ``DataDirectoryError`` where that cannot be.
        """
        stop = start + slots.size
        self._live = grown(self._live, stop)
        set_range(self._live, start, stop)
        keys = view.stored_keys.take(slots)
        hashes = hash_keys(view.key_kind, keys)
        lines = None if view.attributes is None else view.attributes.stored(slots)
        rows = StoredRows(view.stored_vectors(slots), view.prints.take(slots), keys, hashes, lines)
        self.target.write(start, rows, self._live)
        self.target.seal(stop)
        if not self.target.is_sealed(stop):  # or all of them would pile up in memory
            raise DataDirectoryError(
                f"there is no room to write the rows of {self.target.directory} a second time",
                hint="free some space on its disk; until then the slots of dead rows stay there",
            )

    def behind(self, view: View) -> int:
        """How many slots ``view`` has that were not looked at."""
        return view.count - self._stop

    def view(self) -> View:
        """What the target holds now."""
        count = self._old.size
        return self.target.view(
            count, Live.of(prefix(self._live, count), count, self.target.chunk_shift)
        )

    def seen(self, seen: Bitmap) -> Bitmap:
        """Bits of old slots as bits of the new ones."""
        moved = empty_bitmap(self._old.size)
        known = np.flatnonzero(self._old < 8 * seen.size)
        set_bits(moved, known[test_bits(seen, self._old[known])])
        return moved

    def encoded(self, codes: Codes, number: int, stop: Stop) -> Codes:
        """New codes of the rows that were moved, with the codebook and the measurements of the old
        ones; raises ``Cancelled``.
        """
        view = self.view()
        fewer, measured = self._view.count - view.count, codes.calibration
        codebook = replace(
            codes.codebook, trained_slots=codes.codebook.trained_slots - fewer, file=[]
        )
        part = encode(view, codebook, 0, view.count & ~7, number, stop)
        calibration = msgspec.structs.replace(measured, slots=measured.slots - fewer)
        return Codes(self.target.number, codebook, (part,), calibration, codes.unevenness_trained)

    def _bury(self, view: View) -> None:
        """Take out what was copied and has died since."""
        before = self._view
        if view.live.bits is before.live.bits:
            return
        size = bitmap_bytes(self._stop)
        changed = np.flatnonzero(before.live.bits[:size] != view.live.bits[:size])
        slots = (changed[:, None] * 8 + np.arange(8)).reshape(-1)
        slots = slots[slots < self._stop]
        gone = slots[test_bits(before.live.bits, slots) & ~test_bits(view.live.bits, slots)]
        places = np.searchsorted(self._old, gone)
        clear_bits(self._live, places)
