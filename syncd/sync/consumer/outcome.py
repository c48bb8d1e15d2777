"""What a pass did, and what somebody may ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from syncd.postgres.outbox import Cursor
from syncd.postgres.source import Source
from syncd.sync.registry.alerts import NAMED, named
from syncd.sync.registry.datasets import Registry
from syncd.sync.source.followed import FollowedSource
from syncd.types import Position, Snapshot

NO_LONGER_HELD = "the outbox no longer holds the changes since its position"


@dataclass(slots=True)
class PassOutcome:
    """What a pass did: the snapshot it took, or the one before where it came to none, and whether there is more to do at once."""

    snapshot: Snapshot
    newest_outbox_id: int = 0
    changed_rows: int = 0
    outbox_rows: int = 0
    more: bool = False
    handed_over: bool = False
    sources: list[Source] | None = None
    took_snapshot: bool = True
    put_off: str = ""
    """Who has locked the outbox, so that there was no pass."""
    locked: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Handover:
    """Somebody who wants the indexes and the tables at one snapshot: ``take`` is called in a pass that has brought the sources of the ids
    ``wanted`` to it, or has found that they fail, while its transaction is still open.

    ``take`` is given a snapshot that another transaction can import, the position, and the sources.
    """

    wanted: frozenset[int]
    take: Callable[[str, Position, Sequence[FollowedSource]], None]


def alert_of_rebuild(registry: Registry, lacking: Sequence[FollowedSource]) -> None:
    """Somebody should know why sources are read as a whole."""
    names = [each.source.name for each in lacking]
    registry.alerts.add(
        "must_rebuild",
        f"{NO_LONGER_HELD}; every row is compared of {named(names)}",
        sources=names[:NAMED],
        count=len(names),
    )


def by_cursor(sources: Sequence[FollowedSource]) -> dict[Cursor, list[FollowedSource]]:
    """Sources that stand at the same place share one reading of the outbox; in ordinary times that is all of them."""
    groups: dict[Cursor, list[FollowedSource]] = {}
    for each in sources:
        groups.setdefault(each.cursor, []).append(each)
    return groups
