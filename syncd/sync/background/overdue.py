"""Whether the last whole verify is too old, and why. If a verify never ends, drift is never found.

A source counts as compared when its whole table was read, for its first index or by a verify. The
time is saved in the checkpoint, so that a restart does not make it younger.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from syncd.sync.background.verified import Work
from syncd.sync.consumer.progress import Progress
from syncd.sync.source.followed import FollowedSource

LATE_INTERVALS = 2
"""A verify is late after this many intervals."""
NAMED = 3
"""Largest number of sources that a reason names."""


@dataclass(frozen=True, slots=True)
class Overdue:
    """Whether a whole verify is late.

    ``at`` is the time of the last one that left out no source; None before the first. ``reason``
    says why the next one is late; empty: it is not late.
    """

    at: datetime | None
    reason: str = ""


def compared_at(sources: Sequence[FollowedSource]) -> datetime | None:
    """Oldest time of a last comparison among the sources; None if none was read to its end yet."""
    times = [
        each.compared_at
        for each in sources
        if each.source.table is not None and each.compared_at is not None
    ]
    return min(times, default=None)


def since(followed: FollowedSource) -> datetime:
    """Time of a source's last comparison, as a sort key: sources never compared come first."""
    return followed.compared_at or datetime.min.replace(tzinfo=UTC)


def overdue(
    progress: Progress, work: Work | None, obstacles: Mapping[int, str], interval_seconds: float
) -> Overdue:
    """Whether a whole verify is late, and why.

    ``obstacles`` are the reasons why sources could not be compared at the last attempt, by id.
    """
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
            f"one has run for {minutes:.0f} minutes, at row {work.rows} of about {work.expected}"
        ]
    if not reasons:
        reasons = [
            f"none over {late[0].source.name} was completed; "
            "perhaps syncd was stopped before its end"
        ]
    more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
    return Overdue(at, "; ".join(reasons[:NAMED]) + more)
