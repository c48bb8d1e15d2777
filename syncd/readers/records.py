"""What the main process publishes beside the views: blocks of the arena, as JSON."""

from __future__ import annotations

import msgspec

from syncd.types import DatasetName, KeyKind

SERVICE_WORD = 1
"""The word that leads to ``ServiceRecord``: the first one that is taken."""


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """A dataset that answers: where its index and its source's position are published.

    A word may come to belong to another index or source, so each has a number of its own.
    """

    name: DatasetName
    index_word: int
    index_uid: int
    source_word: int
    source_uid: int
    key_kind: KeyKind
    key_kinds: list[KeyKind]


class SourceRecord(msgspec.Struct, frozen=True, array_like=True):
    """A source: its position, and whether known changes are not applied yet.

    ``moved_at`` (``time.monotonic``, one clock for all processes) is when it was last in step.
    """

    uid: int
    snapshot: str
    outbox_id: int
    lags: bool
    moved_at: float | None


class ServiceRecord(msgspec.Struct, frozen=True, array_like=True):
    """Whether there is a connection, and when the last pass was done (``time.monotonic``).

    See ``Progress.hangs_seconds``: a reader looks at the clock itself, because the main process
    publishes nothing while a pass waits for the server.
    """

    connected: bool
    last_pass_at: float
    hangs_seconds: float

    def is_answered(self, now: float) -> bool:
        """See ``Progress.is_answered``."""
        return self.connected and now - self.last_pass_at < self.hangs_seconds
