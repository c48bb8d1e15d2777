"""The outcome of a pass, and the handover that another task may ask of it."""

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
    """The outcome of a pass.

    ``snapshot`` is the one that the pass took, or the previous one if it took none. ``more`` says
    whether the next pass must follow at once.
    """

    snapshot: Snapshot
    newest_outbox_id: int = 0
    changed_rows: int = 0
    outbox_rows: int = 0
    newer_rows: int = 0
    """Outbox rows that were written since the previous pass read the outbox's last id."""
    more: bool = False
    looks_wait: bool = False
    """Whether whole looks at the catalogue were left to the next pass."""
    handed_over: bool = False
    sources: list[Source] | None = None
    took_snapshot: bool = True
    put_off: str = ""
    """Text about the session that has locked the outbox, so that there was no pass."""
    locked: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Handover:
    """A request for indexes and tables at one snapshot.

    A pass calls ``take`` while its transaction is open. Then the sources with the ids ``wanted``
    are at the pass's snapshot, or have failed. The arguments are a snapshot that another
    transaction can import, the position, and the sources.
    """

    wanted: frozenset[int]
    take: Callable[[str, Position, Sequence[FollowedSource]], None]

    def at(
        self, snapshot: Snapshot, all_sources: Sequence[FollowedSource]
    ) -> list[FollowedSource] | None:
        """The wanted sources, if each is at the snapshot or has failed; None otherwise.

        A source that has been locked for long is left out.
        """
        found = [each for each in all_sources if each.source.id in self.wanted]
        wanted = [each for each in found if not each.is_held_up]
        if any(
            not each.is_failed and (each.lags or each.cursor.position.snapshot != snapshot)
            for each in wanted
        ):
            return None
        return wanted


def alert_of_rebuild(registry: Registry, lacking: Sequence[FollowedSource]) -> None:
    """Alert of sources that are read as a whole, with the reason."""
    names = [each.source.name for each in lacking]
    registry.alerts.add(
        "must_rebuild",
        f"{NO_LONGER_HELD}; every row of {named(names)} is compared",
        sources=names[:NAMED],
        count=len(names),
    )


def by_cursor(sources: Sequence[FollowedSource]) -> dict[Cursor, list[FollowedSource]]:
    """Sources by cursor: those at the same cursor share one reading of the outbox.

    Usually that is all of them.
    """
    groups: dict[Cursor, list[FollowedSource]] = {}
    for each in sources:
        groups.setdefault(each.cursor, []).append(each)
    return groups
