"""A scan: it reads a whole source, page by page in the order of its keys, one page per pass.

A page is read at the newest snapshot, so it may be newer than the source's cursor. That is safe: a
later reading of a row is always right. Pages are short, so that changes of other sources do not
wait for long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from syncd.sync.source.rows import Rows
from syncd.types import DatasetName, Key

PAGE_ROWS = (1000, 100, 16_000)
"""Rows of the first, the shortest and the longest page."""
PAGE_SECONDS = 0.06
"""Time that a page should take: changes of other sources wait for it."""
MANY_DATASETS = 500
"""Number of datasets from which a page takes longer: it has a row or two for each of them.

To write rows to one dataset takes 30 µs, whether it is one row or three.
"""
LONGEST_PAGE_SECONDS = 0.24
"""Time that a page takes if it is dealt out to thousands of datasets."""
PAGE_BYTES = 8 << 20
"""Largest page in bytes: a page is held in memory."""


@dataclass(slots=True)
class Scan:
    """The state of a scan of ``only`` some datasets, or of all; ``forced`` dimensions apply."""

    only: frozenset[DatasetName] | None = None
    forced: dict[DatasetName, int] = field(default_factory=dict)
    after: Key | None = None
    rows: int = 0
    """Number of live rows that were read."""
    passed: int = 0
    """Number of the table's rows in the pages that were read, live or not."""
    expected: int | None = None
    """Approximate number of rows to read; 0 if it is unknown, None before the first estimate."""
    page_rows: int = field(default_factory=lambda: PAGE_ROWS[0])
    resumable: bool = False
    beside: bool = False
    """Whether it fills the ``replacement`` of a dataset, whose present index answers meanwhile."""
    dimensions: dict[DatasetName, Counter[int]] = field(default_factory=dict)
    quarantined: set[Key] = field(default_factory=set)
    """Keys that were in quarantine when it began and were not read since."""
    doubt: str = ""
    """Reason why the indexes are compared, unless they are believed."""
    believed: bool = False
    """Whether the indexes are believed to be right: then their state stays ``ready``."""

    def covers(self, name: DatasetName) -> bool:
        """Whether it reads the rows of a dataset."""
        return self.only is None or name in self.only

    def wrong_dimensions(self, dims: Mapping[DatasetName, int | None]) -> dict[DatasetName, int]:
        """Most frequent dimension of each dataset whose index has another one, ``dims``.

        A ``forced`` dimension is not wrong.
        """
        wrong: dict[DatasetName, int] = {}
        for name, seen in self.dimensions.items():
            if seen:
                most_frequent = seen.most_common(1)[0][0]
                if most_frequent not in (dims[name], self.forced.get(name)):
                    wrong[name] = most_frequent
        return wrong

    def note_page(self, until: Key | None, rows: Rows, seconds: float, datasets: int) -> None:
        """Advance behind a page, and set the length of the next one.

        Other changes wait while a page is read, and a page is held in memory. ``datasets`` is the
        number of datasets of the source.
        """
        _, smallest, largest = PAGE_ROWS
        wanted = min(PAGE_SECONDS * max(1.0, datasets / MANY_DATASETS), LONGEST_PAGE_SECONDS)
        self.after = until
        self.rows += len(rows)
        self.passed += self.page_rows
        size = rows.size
        if seconds < wanted / 2 and size < PAGE_BYTES / 2:
            self.page_rows = min(self.page_rows * 2, largest)
        elif size > PAGE_BYTES or seconds > wanted:
            self.page_rows = max(self.page_rows // 2, smallest)
