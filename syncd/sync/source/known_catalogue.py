"""Facts of one source's catalogue, and the doubts about its indexes that follow from them.

Invariant: a doubt is kept until a comparison takes it up. Of several, the first that is not believed is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import structlog

from syncd.errors import Trouble
from syncd.postgres.catalogue import Catalogue, parse_catalogue

logger = structlog.get_logger()


@dataclass(slots=True)
class KnownCatalogue:
    """What is known of one source's catalogue, and what follows from it."""

    seen: str = ""
    """The facts as they were last read."""
    before: str = ""
    """The facts before columns were altered, until the table could be read since: a later start learns from them how the columns were renamed."""
    facts: Catalogue | None = None
    altered: str = ""
    renamed: dict[str, str] = field(default_factory=dict)
    rewritten: bool = False
    """The table has other files, and the pass has not shown yet whether a truncation is why."""
    weakness: Trouble | None = None
    """Why the triggers do not record every write, and what to do; None if they do."""
    doubt: str | None = None
    """Why the table must be compared, once the scan under way is over."""
    believed: bool = True
    said: str = ""
    looked_at: float = -math.inf
    compare_at: float = -math.inf
    repair_at: float = math.inf
    remember_at: float = math.inf

    def remember(self, seen: str) -> None:
        """Go on from the facts of a checkpoint."""
        self.seen, self.facts = seen, parse_catalogue(seen) if seen else None

    def note_doubt(self, reason: str, believed: bool) -> None:
        """Keep a doubt until a comparison takes it up."""
        if reason != self.said:
            logger.log(20 if believed else 30, "source_doubted", reason=reason)
            self.said = reason
        if self.doubt is None or (self.believed and not believed):
            self.doubt = reason
        self.believed &= believed

    def settle(self) -> None:
        """A comparison begins."""
        self.doubt, self.believed = None, True

    @property
    def leaves(self) -> int:
        """How many partitions there are."""
        return (
            self.facts.leaves.count
            if self.facts is not None and self.facts.leaves is not None
            else 0
        )
