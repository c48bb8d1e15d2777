"""The known facts of one source's catalogue, and the doubts about its indexes that follow.

Invariant: a doubt is kept until a comparison begins for it. Of several doubts, the first one under
which the indexes are not believed is kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import structlog

from syncd.errors import Trouble
from syncd.postgres.catalogue import Catalogue, parse_catalogue

MANY_LEAVES = 200
"""With more partitions, a pass looks only at the table itself (500 partitions take 1.2 ms)."""

logger = structlog.get_logger()


@dataclass(slots=True)
class KnownCatalogue:
    """Facts of one source's catalogue, and their consequences. Times are ``time.monotonic``'s."""

    seen: str = ""
    """Facts as they were last read, as text."""
    mark: str = ""
    """The mark of the table that belongs to ``seen``; empty if it is not known."""
    before: str = ""
    """Facts before columns were altered; empty once the table could be read since then.

    A later start learns from them how the columns were renamed.
    """
    facts: Catalogue | None = None
    """``seen``, parsed."""
    altered: str = ""
    """Text about altered columns, for the error if the table cannot be read."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Present name of each renamed column, by its old name."""
    rewritten: bool = False
    """Whether the table has other files, unless a truncation turns out to be the reason."""
    weakness: Trouble | None = None
    """Reason why the triggers do not record every write, with the fix; None if they do."""
    doubt: str | None = None
    """Reason why the table must be compared after the scan under way; None if there is none."""
    believed: bool = True
    """Whether the indexes are believed to be right in spite of the doubt."""
    said: str = ""
    """Last logged doubt."""
    looked_at: float = -math.inf
    """Time of the last look."""
    compare_at: float = -math.inf
    """Time of the next comparison while there is a weakness."""
    repair_at: float = math.inf
    """Time of the next repair of the triggers."""
    remember_at: float = math.inf
    """Time of the next update of the names that the schema keeps."""

    def remember(self, seen: str) -> None:
        """Take over the facts of a checkpoint."""
        self.seen, self.facts = seen, parse_catalogue(seen) if seen else None

    def note_doubt(self, reason: str, believed: bool) -> None:
        """Keep a doubt until a comparison begins for it."""
        if reason != self.said:
            logger.log(20 if believed else 30, "source_doubted", reason=reason)
            self.said = reason
        if self.doubt is None or (self.believed and not believed):
            self.doubt = reason
        self.believed &= believed

    def settle(self) -> None:
        """Drop the doubt: its comparison begins."""
        self.doubt, self.believed = None, True

    @property
    def has_plain_rules(self) -> bool:
        """Whether the rules are known to name only columns of the table."""
        return self.facts is not None and self.facts.is_plain

    @property
    def leaves(self) -> int:
        """Number of partitions without partitions of their own."""
        leaves = self.facts.leaves if self.facts is not None else None
        return leaves.count if leaves is not None else 0

    @property
    def has_few_partitions(self) -> bool:
        """Whether the table is partitioned, and a pass can look at each partition."""
        partitioned = self.facts is not None and self.facts.kind == "p"
        return partitioned and self.leaves <= MANY_LEAVES
