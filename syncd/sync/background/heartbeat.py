"""The heartbeat: does what is committed in the database arrive in the indexes?

Each report is a transaction on a connection of its own; its id is remembered, and the heartbeat has arrived once every source's position sees it. So
it goes through the server, the pass's snapshot and the passes themselves, and a database that answers pings while nothing arrives is noticed. It
writes no outbox row of its own: a row would wake every consumer, and fill the outbox of a database that is at rest.
"""

from __future__ import annotations

import time
from collections import deque

from syncd.sync.consumer.consumer import Consumer

BEATS_REMEMBERED = 1000
SILENCE_SECONDS = 12.0
"""A report comes every five seconds; without one for this long, nothing is known to arrive."""


class Heartbeat:
    """The reports that were committed and are not yet seen."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.pending: deque[tuple[int, float]] = deque(maxlen=BEATS_REMEMBERED)
        self.sent_at: float | None = None

    def sent(self, xid: int) -> None:
        """A report was committed as this transaction."""
        self.sent_at = time.monotonic()
        self.pending.append((xid, self.sent_at))

    def lost(self) -> None:
        """A report failed. The next may be to another server, where the ids stand for other transactions."""
        self.pending.clear()

    @property
    def late_seconds(self) -> float:
        """How long a heartbeat has been on its way beyond the ordinary; 0 where all is well, or none was sent yet."""
        consumer, now = self.consumer, time.monotonic()
        if self.sent_at is None:
            return 0.0
        positions = [
            each.cursor.position for each in consumer.sources.values() if not each.is_failed
        ]
        snapshots = [position.snapshot for position in positions or [consumer.position]]
        while self.pending and all(snapshot.sees(self.pending[0][0]) for snapshot in snapshots):
            self.pending.popleft()
        if self.pending:  # a report wakes nobody: a poll may pass before it is looked for
            return max(now - self.pending[0][1] - consumer.poll_seconds, 0.0)
        return max(now - self.sent_at - SILENCE_SECONDS, 0.0)
