"""A scan: the reading of a whole source, page by page in the order of its keys, with passes in between.

A page is read at the newest snapshot, so that it may be newer than the source's cursor: a later reading of a row is always right. Pages are short
enough that changes of other sources are not kept waiting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from syncd.sync.source.rows import Row
from syncd.types import DatasetName, Key

PAGE_ROWS = (1000, 100, 16_000)  # the first page, the shortest and the longest
PAGE_SECONDS = 0.06
PAGE_BYTES = 8 << 20


@dataclass(slots=True)
class Scan:
    """A reading of the whole source, page by page in key order; ``only`` some datasets, or all. ``forced`` dimensions hold for its rows."""

    only: frozenset[DatasetName] | None = None
    forced: dict[DatasetName, int] = field(default_factory=dict)
    after: Key | None = None
    rows: int = 0
    expected: int | None = None
    """About how many rows there are to read; 0 where nothing tells, None before anybody has asked."""
    page_rows: int = field(default_factory=lambda: PAGE_ROWS[0])
    resumable: bool = False
    beside: bool = False
    """Whether it fills the ``replacement`` of a dataset that goes on answering."""
    dimensions: dict[DatasetName, Counter[int]] = field(default_factory=dict)
    quarantined: set[Key] = field(default_factory=set)
    """Keys that were in quarantine before it began and have not been read since."""
    doubt: str = ""
    """Why the indexes are compared, if they are not believed."""
    believed: bool = False
    """Whether the indexes are believed to be right all the same: then they go on answering as if nothing were."""

    def covers(self, name: DatasetName) -> bool:
        """Whether it reads the rows of a dataset."""
        return self.only is None or name in self.only

    def note_page(self, until: Key | None, rows: Sequence[Row], seconds: float) -> None:
        """Move on behind a page, and make the next one longer or shorter: other changes wait while a page is read, and it is held in memory."""
        _, smallest, largest = PAGE_ROWS
        self.after = until
        self.rows += len(rows)
        size = sum(len(row[3]) + len(row[5] or "") for row in rows)
        if seconds < PAGE_SECONDS / 2 and size < PAGE_BYTES / 2:
            self.page_rows = min(self.page_rows * 2, largest)
        elif size > PAGE_BYTES or seconds > PAGE_SECONDS:
            self.page_rows = max(self.page_rows // 2, smallest)
