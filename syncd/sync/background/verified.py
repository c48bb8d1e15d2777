"""What a verify found, and how far the one under way is."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from syncd.sync.background.comparison import DatasetReport, SourceReport
from syncd.types import Position


@dataclass(frozen=True, slots=True)
class Verified:
    """What a verify found."""

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
    """What one verify has done: rows of the tables that it has read, and about how many there are.

    Each has its own: the thread of one that was cancelled may still count.
    """

    expected: int
    rows: int = 0
    begun: float = field(default_factory=time.monotonic)
    patience_seconds: float = math.inf
    """How long a source may take to be in step."""

    def note(self, rows: int) -> None:
        """A comparison goes on."""
        self.rows += rows
