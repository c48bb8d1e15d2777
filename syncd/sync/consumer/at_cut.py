"""A pass at a leader's snapshot, in place of one of its own.

Invariant: the next pass of its own takes up what this one cannot do at the leader's snapshot. So
this pass begins no comparison, reads no page of a scan, and notes no doubts: facts that no snapshot
covers are newer than the leader's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from syncd.sync.consumer.cuts import CutFailed, Imported
from syncd.sync.consumer.passes import Pass
from syncd.sync.consumer.taken import Taken
from syncd.sync.consumer.unrecorded import DOUBT
from syncd.sync.source.followed import FollowedSource


@dataclass(slots=True)
class PassAtCut(Pass):
    """Raises ``CutFailed`` if the indexes cannot be brought to the leader's snapshot."""

    imported: Imported = field(kw_only=True)

    OWN: ClassVar[bool] = False

    def choose(
        self, due: list[FollowedSource]
    ) -> tuple[list[FollowedSource], list[FollowedSource]]:
        """See ``Pass``: the leader has locked the tables already."""
        reached = self.imported.reachable(due, self.position)
        return reached, [each for each in reached if each.source.oid in self.imported.tables]

    def after_locks(self) -> None:
        """Import the snapshot."""
        self.imported.take(self.connection)

    def checked(self, taken: Taken, all_sources: Sequence[FollowedSource]) -> Taken:  # noqa: ARG002
        """Check the facts, and note none."""
        taken.check(consumer=self.consumer, run_id=self.run_id, incarnation=self.incarnation)
        self.imported.check(taken.snapshot, self.position)
        if self.doubts.due or self.doubts.ended or taken.doubts != self.doubts.seen:
            raise CutFailed(DOUBT)
        return taken

    def needs_another_snapshot(self, why: str) -> None:
        """Raise ``CutFailed``: the leader's snapshot is the only one."""
        raise CutFailed(why)
