"""A batch of rows as a reading of the table returns them, and the reasons to reject a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from syncd.types import QuarantineReason

EXPRESSION_FAILED: QuarantineReason = "expression_failed"
"""Reason for a row on which an expression of the source fails."""
NULL_KEY: QuarantineReason = "null_key"
"""Reason for a row without a key.

Such a row cannot be read by key: all of them are read when one of them may have changed.
"""

ROWS_PER_ZIP = 500
"""Number of rows that become columns at once.

``zip`` makes an iterator per row. This many do not start Python's garbage collection, which doubles
the time for 10,000 rows.
"""

T = TypeVar("T")

Row = tuple[str | int, str | None, str | None, bytes, int, str | None]
"""One row in the order of ``Rows``'s columns, as psycopg returns it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of rows, column by column; place ``i`` of each column belongs to row ``i``."""

    keys: Sequence[str | int]
    """Keys as read; labels for rows without a key."""
    projects: Sequence[str | None]
    datasets: Sequence[str | None]
    vectors: Sequence[bytes]
    fingerprints: Sequence[int]
    columns: Sequence[str | None]
    """Values of the attached columns of each row, as a JSON array."""

    @classmethod
    def of(cls, fetched: Sequence[Row]) -> Rows:
        """The batch of some rows. This takes 0.05 µs per row."""
        if len(fetched) <= ROWS_PER_ZIP:
            return cls(*zip(*fetched, strict=True)) if fetched else NO_ROWS
        columns: tuple[list[Any], ...] = ([], [], [], [], [], [])
        for start in range(0, len(fetched), ROWS_PER_ZIP):
            some = zip(*fetched[start : start + ROWS_PER_ZIP], strict=True)
            for column, values in zip(columns, some, strict=True):
                column.extend(values)
        return cls(*columns)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.keys)

    def by_dataset(self) -> Mapping[tuple[str | None, str | None], Sequence[int]]:
        """Places of the rows of each project and dataset. Most batches have one dataset."""
        projects, datasets, count = self.projects, self.datasets, len(self)
        if count and projects.count(projects[0]) == datasets.count(datasets[0]) == count:
            return {(projects[0], datasets[0]): range(count)}
        places: dict[tuple[str | None, str | None], list[int]] = {}
        for place, name in enumerate(zip(projects, datasets, strict=True)):
            places.setdefault(name, []).append(place)
        return places

    @property
    def size(self) -> int:
        """Bytes of the vectors and the attached columns."""
        return sum(map(len, self.vectors)) + sum(len(values) for values in self.columns if values)


def at(column: Sequence[T], places: Sequence[int]) -> Sequence[T]:
    """Values of a column at distinct, ascending places: the column itself if these are all."""
    return column if len(places) == len(column) else [column[place] for place in places]


NO_ROWS = Rows((), (), (), (), (), ())
