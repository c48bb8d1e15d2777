"""Compaction: dead slots are given back by moving the live rows of one generation into a new one.

Readers, saves and the writer go on meanwhile. Rows keep their order, so a new slot is the place of
the old slot among the moved ones. First the rows of a view are copied; then changes by later
passes, in rounds. Each round is shorter than the previous one, and only the last one makes the
writer wait.

Invariant: until its rows are published, the new generation's files have their own names and belong
to no checkpoint. So a crash or a failure leaves the old files in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np

from syncd.errors import DataDirectoryError
from syncd.index.build.plan import encode
from syncd.index.codes.codes import Codes
from syncd.index.generation.generation import Generation
from syncd.index.generation.saving import State
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
"""Most new slots in the last round, for which the writer waits: about a millisecond."""
MOST_ROUNDS = 20


class Move:
    """The rows of one generation on their way into ``target``, which no other object uses yet."""

    def __init__(self, view: View, target: Generation) -> None:
        self.target = target
        self._view = view
        """The last view that was followed, up to ``_stop``."""
        self._stop = 0
        self._old: Slots = np.empty(0, dtype=np.int64)
        """The old slot of each new slot, ascending."""
        self._live = empty_bitmap(0)

    def follow(self, view: View, stop: Stop) -> None:
        """Bring the target to the rows of ``view``, which is of the same generation and not older.

        Raises ``Cancelled`` and ``DataDirectoryError``.
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
        """Copy some rows to the new slots from ``start`` on; full chunks go to disk.

        Raises ``DataDirectoryError`` if they cannot.
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
        if not self.target.is_sealed(stop):  # otherwise all rows would stay in memory
            raise DataDirectoryError(
                f"cannot write the rows of {self.target.directory} a second time: "
                "its disk is full or fails",
                hint="free some space on its disk; until then dead rows keep their space",
            )

    def catch_up(self, source: Generation, current: Callable[[], State], stop: Stop) -> None:
        """Follow the passes of ``source`` until a short round is left; raises like ``follow``.

        It also ends when the dataset has another generation, or after ``MOST_ROUNDS``.
        """
        for _ in range(MOST_ROUNDS):
            state = current()
            if state.generation is not source or self.behind(state.view) <= LAST_ROUND_SLOTS:
                return
            self.follow(state.view, stop)

    def behind(self, view: View) -> int:
        """Number of slots of ``view`` that were not followed yet."""
        return view.count - self._stop

    def view(self) -> View:
        """The rows that the target has now."""
        count = self._old.size
        return self.target.view(
            count, Live.of(prefix(self._live, count), count, self.target.chunk_shift)
        )

    def seen(self, seen: Bitmap) -> Bitmap:
        """Bits of old slots, as bits of the new slots."""
        moved = empty_bitmap(self._old.size)
        known = np.flatnonzero(self._old < 8 * seen.size)
        set_bits(moved, known[test_bits(seen, self._old[known])])
        return moved

    def encoded(self, codes: Codes, number: int, stop: Stop) -> Codes:
        """New codes of the moved rows, with the old codebook and measurements; raises
        ``Cancelled``.
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
        """Mark copied rows dead that died since."""
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
