"""Is the last whole verify too old, and why? A verify that can never end is drift that is never found.

A source counts as compared when all of its table was read, for its first index or by a verify. The time is in the checkpoint, so restarts do not
make it younger.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from syncd.sync.consumer.progress import Progress
from syncd.sync.source.followed import FollowedSource

if TYPE_CHECKING:
    from syncd.sync.background.verified import Work

LATE_INTERVALS = 2
NAMED = 3
"""Sources that a reason names."""


@dataclass(frozen=True, slots=True)
class Overdue:
    """``at``: since when no source was left out; None before the first. ``reason`` says why the next is late; empty while it is not."""

    at: datetime | None
    reason: str = ""


def compared_at(sources: Sequence[FollowedSource]) -> datetime | None:
    """When the source that was not compared for longest was compared; None where none was read to its end yet."""
    times = [
        each.compared_at
        for each in sources
        if each.source.table is not None and each.compared_at is not None
    ]
    return min(times, default=None)


def since(followed: FollowedSource) -> datetime:
    """When a source was last compared, in an order that begins with those that never were."""
    return followed.compared_at or datetime.min.replace(tzinfo=UTC)


def overdue(
    progress: Progress, work: Work | None, obstacles: Mapping[int, str], interval_seconds: float
) -> Overdue:
    """See the module. ``obstacles`` are why sources could not be compared at the last attempt, by id."""
    sources, now = list(progress.sources.values()), datetime.now(UTC)
    at = compared_at(sources)
    late = [
        each
        for each in sources
        if each.source.table is not None
        and each.compared_at is not None
        and (now - each.compared_at).total_seconds() > LATE_INTERVALS * interval_seconds
    ]
    if not interval_seconds or not late:
        return Overdue(at)
    reasons = [
        f"{each.source.name}: {why}"
        for each in late
        if (why := obstacles.get(each.source.id) or each.failure)
    ]
    if not progress.connected:
        reasons = [progress.unreachable().message]
    elif work is not None and not reasons:
        minutes = (time.monotonic() - work.begun) / 60
        reasons = [
            f"one is under way for {minutes:.0f} minutes, at row {work.rows} of about {work.expected}"
        ]
    if not reasons:
        reasons = [
            f"none came to its end over {late[0].source.name}, perhaps because syncd was stopped before"
        ]
    more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
    return Overdue(at, "; ".join(reasons[:NAMED]) + more)
