"""The time of the next pass: at once after a change in a quiet system, at a steady beat under load.

Under load the consumer is awake anyway, so it holds the guard itself. Then no writer notifies. That
also avoids the lock that NOTIFY takes at each commit in the database.

The consumer releases the guard before it sleeps, and looks once more after that. A writer takes its
lock on the outbox, and has its transaction id, before it asks for the guard. So a writer that lost
the guard to the consumer has committed by then, or it is known to be open.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from syncd.shard import Shard
from syncd.types import Snapshot

PEEK_SECONDS = (0.1, 1.0)
"""Shortest and longest time between two reads of the outbox's sequence.

A read costs 0.3 ms of a core after a rest, service and server together: a tenth of a small pass.
"""
PEEK_SHARE = 0.1
"""Time until the next read, as a share of the time since the last change.

A writer that won the guard may roll back, which cancels its notification. Then a change of another
writer waits for such a read. This is most likely while several writers are active.
"""
DEAF_PEEK_SECONDS = 0.1
"""Longest time between two reads while notifications may not arrive."""
DEAF_SECONDS = 60.0
"""After this long without a change, the longest time is that of ``PEEK_SECONDS`` in any case."""
OPEN_WRITER_DELAYS_SECONDS = (0.005, 0.05)
"""First and longest delay until the next look while writers are open; it doubles at each look."""
OPEN_WRITER_PATIENCE_SECONDS = 3.0
"""After this long with the same open writers, the delay is the last one."""
OPEN_WRITER_LAST_DELAY_SECONDS = 0.1
"""Delay until the next look while only writers are open that stay open for long."""
LOADED_GAP_SECONDS = 0.03
"""Passes that find changes with a shorter gap count as load."""
LOADED_PASSES = 5
"""Load begins after this many such passes in a row."""
QUIET_PASSES = 3
"""Load ends after this many passes in a row without changes."""
BEAT_SECONDS = (0.004, 0.04)
"""Shortest and longest rest between two passes under load."""
BEAT_SECONDS_PER_ROW = 0.0002
"""Rest per row of the previous pass, within ``BEAT_SECONDS``.

Large passes are cheaper, and the rest leaves time to writers on the same cores.
"""
FLOOR_SECONDS_PER_SHARD = 0.002
"""Least time between the beginnings of two passes of a shard, for each shard of its layout.

A pass takes about 1 ms of the server, whatever it finds. So the shards of a layout together take at
most half a core for it, whatever their number.
"""
LONGEST_FLOOR_SECONDS = 1.0
"""Longest such time: after it a pass is due in any case."""


def floor_seconds(shard: Shard) -> float:
    """Least time between the beginnings of two passes; 0 for a syncd that has all rows."""
    if shard.is_whole:
        return 0.0
    return min(FLOOR_SECONDS_PER_SHARD * shard.of, LONGEST_FLOOR_SECONDS)


def xid_near(low: int, other: int) -> int:
    """The transaction id with these low 32 bits that is nearest to another id."""
    return other + ((low - other + 2**31) & 0xFFFFFFFF) - 2**31


@dataclass(slots=True)
class Pace:
    """The results of the last passes, as far as they decide when the next one is due."""

    active_at: float = -math.inf
    """Time when the last pass began that found changes."""
    hears: bool = True
    """Whether the last change was not found by a look: then notifications arrive."""
    loaded_passes: int = 0
    quiet_passes: int = 0
    rows: int = 0
    """Outbox rows of the last pass."""
    open: frozenset[int] = frozenset()
    """Ids of transactions that may have written to the outbox; no pass has seen their end."""
    unsettled: bool = False
    """Whether outbox rows were written that no pass has seen, outside the ``open`` transactions."""
    writers: frozenset[int] = frozenset()
    """Those of the ``open`` transactions that had written to the outbox at the last look."""
    writers_since: float = 0.0
    writer_delay: float = OPEN_WRITER_DELAYS_SECONDS[0]
    guard_held: bool = False

    def note_writers(self, holding: Iterable[int], writing: Iterable[int], next_xid: int) -> bool:
        """Note which transactions hold a lock on their own id, and which of them on the outbox.

        The ids are low 32 bits of ids near ``next_xid``. Returns whether a pass is due: one of
        ``open`` has ended, or rows were unsettled. The next pass sees these rows, unless their
        transaction is open now. The next look at open writers comes soon if there are new ones, and
        later if there are none.
        """
        shortest, longest = OPEN_WRITER_DELAYS_SECONDS
        held = {xid_near(low, next_xid) for low in holding}
        due = self.unsettled or not self.open <= held
        self.unsettled = False
        self.open = frozenset(xid_near(low, next_xid) for low in writing)
        if self.open - self.writers:
            self.writers_since, self.writer_delay = time.monotonic(), shortest
        else:
            self.writer_delay = min(self.writer_delay * 2, longest)
        self.writers = self.open
        return due

    def note_snapshot(self, snapshot: Snapshot, *, all_seen: bool) -> None:
        """Note the transactions that a pass's snapshot does not see: each may be a writer.

        The next pass after a writer's end sees its outbox rows. If the writer has lost the guard,
        it does not wake the consumer, so the consumer must look. A snapshot does not name the
        transactions that began after the last one that had ended. ``all_seen`` says whether the
        pass has seen every row that was written since the previous one read the outbox's last id.
        """
        unseen = (xid for xid in self.open if not snapshot.sees(xid))
        self.open = snapshot.in_progress.union(unseen)
        self.writers &= self.open
        self.unsettled |= not all_seen

    def note_pass(self, begun: float, *, rows: int, by_look: bool) -> None:
        """Note when a pass began, and the number of outbox rows that it found.

        ``by_look`` says whether it began because of a look, and not of a notification.
        """
        now = time.monotonic()
        self.rows = rows
        if not rows:
            self.quiet_passes += 1
            if not self.guard_held:
                self.loaded_passes = 0
            return
        self.quiet_passes, self.hears = 0, not by_look
        self.loaded_passes = (
            self.loaded_passes + 1
            if begun - self.active_at < LOADED_GAP_SECONDS or self.guard_held
            else 0
        )
        self.active_at = now

    @property
    def loaded(self) -> bool:
        """Whether changes come so fast that it is cheaper to poll than to be notified."""
        return self.loaded_passes >= LOADED_PASSES and self.quiet_passes < QUIET_PASSES

    @property
    def beat_seconds(self) -> float:
        """Rest until the next pass under load."""
        shortest, longest = BEAT_SECONDS
        return min(max(self.rows * BEAT_SECONDS_PER_ROW, shortest), longest)

    def sleep_seconds(self, poll_seconds: float, *, listens: bool) -> float:
        """Longest time to wait for a wake-up without load.

        ``listens`` says whether a connection listens to notifications.
        """
        now = time.monotonic()
        quiet, (shortest, longest) = now - self.active_at, PEEK_SECONDS
        if not (listens and self.hears) and quiet < DEAF_SECONDS:
            longest = min(longest, DEAF_PEEK_SECONDS)
        delay = min(max(quiet * PEEK_SHARE, shortest), longest, poll_seconds)
        if self.open - self.writers or self.unsettled:
            delay = min(delay, OPEN_WRITER_DELAYS_SECONDS[0])
        elif self.writers:  # one of them may be open for hours
            patient = now - self.writers_since > OPEN_WRITER_PATIENCE_SECONDS
            delay = min(delay, OPEN_WRITER_LAST_DELAY_SECONDS if patient else self.writer_delay)
        return delay
