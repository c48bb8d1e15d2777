"""The heartbeat: do commits in the database arrive in the indexes?

Each report is a transaction on its own connection, and its id is kept. The heartbeat has arrived
when each source's position sees this transaction. So it goes through the server, a pass's snapshot
and the passes. A database that answers pings while no change arrives is noticed.

It writes nothing to the outbox: a row would wake every consumer, and fill the outbox of an idle
database.
"""

from __future__ import annotations

import time
from collections import deque

from syncd.sync.consumer.progress import Progress
from syncd.sync.consumer.session import Session

BEATS_REMEMBERED = 1000
"""Largest number of heartbeats under way; beyond it the oldest are forgotten."""
SILENCE_SECONDS = 12.0
"""Longest time without a report; after it changes count as late. A report is due every 5 s."""


class Heartbeat:
    """The reports that were committed, and that some source's position does not see yet."""

    def __init__(self, progress: Progress, session: Session) -> None:
        self.progress = progress
        self.session = session
        self.pending: deque[tuple[int, float]] = deque(maxlen=BEATS_REMEMBERED)
        self.sent_at: float | None = None

    def sent(self, xid: int) -> None:
        """Note a report that was committed as this transaction."""
        self.sent_at = time.monotonic()
        self.pending.append((xid, self.sent_at))

    def lost(self) -> None:
        """Note a report that failed.

        The next one may go to another server, on which the ids mean other transactions.
        """
        self.pending.clear()

    @property
    def late_seconds(self) -> float:
        """How late the oldest heartbeat is; 0 if none is late, or none was sent yet."""
        progress, now = self.progress, time.monotonic()
        if self.sent_at is None:
            return 0.0
        positions = [
            each.cursor.position for each in progress.sources.values() if not each.is_failed
        ]
        snapshots = [position.snapshot for position in positions or [progress.position]]
        while self.pending and all(snapshot.sees(self.pending[0][0]) for snapshot in snapshots):
            self.pending.popleft()
        if self.pending:  # a report does not wake the consumer: the next pass may be a poll
            return max(now - self.pending[0][1] - self.session.poll_seconds, 0.0)
        return max(now - self.sent_at - SILENCE_SECONDS, 0.0)
