"""Live rows of one source that cannot be indexed, by key.

A row without a key has a label instead. A label does not tell which row has changed, so a reading
of all rows without a key replaces the previous ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from syncd.postgres.source import Source
from syncd.sync.source.rows import EXPRESSION_FAILED, NULL_KEY, Rows
from syncd.types import DatasetName, Key, QuarantineReason, dataset_name

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A live row that cannot be indexed."""

    dataset: DatasetName
    reason: str
    since: datetime
    fingerprint: int


class Quarantine(dict[Key, Quarantined]):
    """The quarantined rows of one source, by key or label."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.source = source
        self.unkeyed: set[Key] = set()
        """Labels of the rows without a key."""

    def put(
        self, key: Key, dataset: DatasetName, reason: QuarantineReason, fingerprint: int
    ) -> None:
        """Note a row; ``apply`` removes any indexed version of it from the index."""
        self[key] = Quarantined(dataset, reason, datetime.now(UTC), fingerprint)
        logger.debug(
            "row_quarantined", source=self.source.name, dataset=dataset, key=key, reason=reason
        )

    def put_failing(self, keys: Iterable[Key]) -> None:
        """Note rows on which an expression fails; ``apply`` was given their keys."""
        for key in keys:
            self.put(key, DatasetName(""), EXPRESSION_FAILED, fingerprint=0)

    def take_up(self, key: Key, row: Quarantined) -> None:
        """Note a row of a checkpoint."""
        self[key] = row
        if row.reason == NULL_KEY:
            self.unkeyed.add(key)

    def replace_unkeyed(self, rows: Rows) -> set[Key]:
        """Note all rows without a key, by label, in place of the earlier ones.

        Returns the labels of both.
        """
        before = {label: self.pop(label, None) for label in self.unkeyed}
        self.unkeyed.clear()
        for label, project, dataset, fingerprint in zip(
            rows.keys, rows.projects, rows.datasets, rows.fingerprints, strict=True
        ):
            name = (
                DatasetName("")
                if project is None or dataset is None
                else dataset_name(project, dataset)
            )
            known = before.get(label)
            self.unkeyed.add(label)
            if known is not None and (known.dataset, known.fingerprint) == (name, fingerprint):
                self[label] = known
            else:
                self.put(label, name, NULL_KEY, fingerprint)
        return before.keys() | self.unkeyed

    def clear(self) -> None:
        """Remove all rows."""
        super().clear()
        self.unkeyed.clear()

    def keys_with(
        self, reason: QuarantineReason, names: set[DatasetName] | None = None
    ) -> list[Key]:
        """Keys of the rows with this reason, in some datasets or in all."""
        return [
            key
            for key, row in self.items()
            if row.reason == reason and (names is None or row.dataset in names)
        ]

    @property
    def failing(self) -> list[Key]:
        """Keys of the rows on which an expression failed when they were last read."""
        return self.keys_with(EXPRESSION_FAILED)
