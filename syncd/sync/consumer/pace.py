"""When to take the next pass: at once when something is new and the system is quiet, at a steady beat under load.

Under load the consumer is awake anyway, so it holds the guard itself: then no writer notifies, and NOTIFY's lock on every commit in the database
goes with it. It lets the guard go before it sleeps, and looks once more after that. A writer takes its lock on the outbox before it asks for the
guard, so one who lost the guard to us has either committed by then, or is seen by the look.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

AFTER_ACTIVITY_SECONDS = 3.0
AFTER_ACTIVITY_POLL_SECONDS = 0.03
OPEN_WRITER_DELAYS_SECONDS = (0.005, 0.05)
OPEN_WRITER_PATIENCE_SECONDS = 3.0
OPEN_WRITER_LAST_DELAY_SECONDS = 0.1
LOADED_GAP_SECONDS = 0.03
LOADED_PASSES = 5
QUIET_PASSES = 3
BEAT_SECONDS = (0.01, 0.04)
BEAT_SECONDS_PER_ROW = 0.0002
"""Under load a pass waits longer the more rows the last one found, within ``BEAT_SECONDS``: large passes are cheaper, and writers on the same
cores get the rest."""


@dataclass(slots=True)
class Pace:
    """What the last passes found."""

    active_at: float = -math.inf
    loaded_passes: int = 0
    quiet_passes: int = 0
    rows: int = 0
    writers: frozenset[str] = frozenset()
    writers_since: float = 0.0
    writer_delay: float = OPEN_WRITER_DELAYS_SECONDS[0]
    guard_held: bool = False

    def note_writers(self, writers: frozenset[str]) -> None:
        """Who is still open: look again soon while there are new ones; less often while only the same remain."""
        shortest, longest = OPEN_WRITER_DELAYS_SECONDS
        if writers - self.writers:
            self.writers_since, self.writer_delay = time.monotonic(), shortest
        else:
            self.writer_delay = min(self.writer_delay * 2, longest)
        self.writers = writers

    def note_pass(self, begun: float, *, rows: int) -> None:
        """When a pass began, and how many outbox rows it found."""
        now = time.monotonic()
        self.rows = rows
        if not rows:
            self.quiet_passes += 1
            if not self.guard_held:
                self.loaded_passes = 0
            return
        self.quiet_passes = 0
        self.loaded_passes = (
            self.loaded_passes + 1
            if begun - self.active_at < LOADED_GAP_SECONDS or self.guard_held
            else 0
        )
        self.active_at = now

    @property
    def loaded(self) -> bool:
        """Whether changes come faster than it is worth to be woken for."""
        return self.loaded_passes >= LOADED_PASSES and self.quiet_passes < QUIET_PASSES

    @property
    def beat_seconds(self) -> float:
        """The rest between passes under load."""
        shortest, longest = BEAT_SECONDS
        return min(max(self.rows * BEAT_SECONDS_PER_ROW, shortest), longest)

    def sleep_seconds(self, poll_seconds: float) -> float:
        """How long a wake-up may be waited for when there is no load."""
        now, delay = time.monotonic(), poll_seconds
        if now - self.active_at < AFTER_ACTIVITY_SECONDS:
            delay = min(
                delay, AFTER_ACTIVITY_POLL_SECONDS
            )  # a winner of the guard may roll back, and its notification with it
        if (
            self.writers
        ):  # they may commit without a notification, also while one of them stays open for hours
            patient = now - self.writers_since > OPEN_WRITER_PATIENCE_SECONDS
            delay = min(delay, OPEN_WRITER_LAST_DELAY_SECONDS if patient else self.writer_delay)
        return delay
