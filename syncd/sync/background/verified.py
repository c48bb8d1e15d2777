"""The result of a verify, and the progress of the verify under way."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from syncd.sync.background.comparison import DatasetReport, SourceReport
from syncd.types import Position


@dataclass(frozen=True, slots=True)
class Verified:
    """The result of a verify."""

    position: Position
    datasets: list[DatasetReport]
    sources: list[SourceReport]
    seconds: float

    @property
    def in_sync(self) -> bool:
        """Whether every index equals its table, and every source could be compared."""
        return all(each.in_sync for each in self.datasets) and all(
            each.outcome in ("compared", "empty") for each in self.sources
        )


@dataclass(slots=True)
class Work:
    """Progress of one verify: rows of the tables that it has read, and about how many there are.

    Each verify has its own, because the thread of a cancelled verify may still count.
    """

    expected: int
    rows: int = 0
    begun: float = field(default_factory=time.monotonic)
    patience_seconds: float = math.inf
    """Longest time that a source may take to be in step."""

    def note(self, rows: int) -> None:
        """Count rows that were compared."""
        self.rows += rows
