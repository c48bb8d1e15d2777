"""The state of a followed source: its cursor, datasets, quarantine, scan, and last failure.

Other tasks and threads read it while a pass changes it.
"""

from __future__ import annotations

from datetime import datetime

from syncd.errors import Trouble
from syncd.postgres.outbox import Cursor
from syncd.postgres.source import Source
from syncd.sync.registry.datasets import Dataset, Registry
from syncd.sync.registry.states import Condition, Facts, state_of
from syncd.sync.source.known_catalogue import KnownCatalogue
from syncd.sync.source.quarantined import Quarantine
from syncd.sync.source.scan import Scan
from syncd.sync.source.source_datasets import SourceDatasets
from syncd.sync.source.unconfirmed import Unconfirmed
from syncd.types import DatasetName, Key

HELD_UP_SECONDS = 5.0
"""Delay from which a source counts as held up; its first failure was about 6 s before."""


class SourceState:
    """A source, and the known state of its indexes."""

    def __init__(self, source: Source, registry: Registry, cursor: Cursor) -> None:
        self.source = source
        self.registry = registry
        self.cursor = cursor
        self.datasets = SourceDatasets(source, registry, self)
        self.quarantine = Quarantine(source)
        self.unconfirmed = Unconfirmed(cursor)
        self.catalogue = KnownCatalogue()
        self.scan: Scan | None = None
        self.predecessor: SourceState | None = None
        """Previous source of the same table; its datasets answer until this one is read."""
        self.successor: SourceState | None = None
        self.failure: Trouble | None = None
        """Reason why the last attempt to read it failed; None if it did not."""
        self.is_failed = False
        """Whether its datasets do not answer because of the failure."""
        self.retry_at = 0.0
        self.retry_delay_seconds = 0.0
        self.was_ready = False
        """Whether it was read to its end since the start."""
        self.must_rebuild = False
        """Whether the outbox no longer held the changes that it needs."""
        self.dirty_at = 0.0
        """Time of the last pass that had work for it."""
        self.moved_at: float | None = None
        self.reread: set[Key] = set()
        """Keys of rows that must be read again."""
        self.reread_unkeyed = False
        """Whether the rows without a key must be read again."""
        self.compared_at: datetime | None = None
        """Time when its whole table was last read, for the indexes or for a comparison."""
        self.careful = False
        """Whether an expression has failed on a row, so that rows are read with savepoints."""

    @property
    def scanning(self) -> bool:
        """Whether its position proves nothing before its indexes are compared with the table."""
        if self.catalogue.weakness is not None or self.predecessor is not None:
            return True
        return self.scan is not None and self.scan.only is None and not self.scan.believed

    @property
    def lags(self) -> bool:
        """Whether there are known changes that are not applied yet."""
        return (
            self.reading
            or self.cursor.window is not None
            or self.failure is not None
            or self.rereads
        )

    @property
    def rereads(self) -> bool:
        """Whether unchanged rows must be read again."""
        return bool(self.reread) or self.reread_unkeyed

    @property
    def needs_every_change(self) -> bool:
        """Whether a shard also needs the changes of keys that hash into other shards.

        A row without a key that gets one has the key of any shard.
        """
        return not self.source.outbox_tells_shard or bool(self.quarantine.unkeyed)

    @property
    def is_held_up(self) -> bool:
        """Whether several attempts to read it have failed."""
        return self.failure is not None and self.retry_delay_seconds >= HELD_UP_SECONDS

    @property
    def reading(self) -> bool:
        """Whether rows are read for which the indexes do not answer yet.

        A rebuild does not count while the present index answers, and neither does a comparison of
        indexes that are believed to be right.
        """
        return self.scan is not None and not self.scan.beside and not self.scan.believed

    @property
    def is_believed(self) -> bool:
        """Whether there is a scan, and its indexes are believed to be right."""
        return self.scan is not None and self.scan.believed

    def is_read_for(self, name: DatasetName | None) -> bool:
        """Whether rows are read for which a dataset does not answer yet; None: one without rows."""
        if self.scan is None or not self.reading:
            return False
        return self.scan.only is None or name in self.scan.only

    def dataset(self, name: DatasetName) -> Dataset | None:
        """Its dataset of this name, created if necessary; None if another source has one."""
        before = None if self.predecessor is None else self.predecessor.datasets
        return self.datasets.get_or_create(name, before)

    def empty(self, name: DatasetName) -> Dataset:
        """An empty dataset that answers for a name without rows."""
        return self.datasets.empty(name)

    def expected_rows(self, dataset: Dataset) -> int:
        """Approximate number of rows of a dataset at the end of the scan.

        The rows that are still to be read are taken to be like those that were.
        """
        scan, rows = self.scan, dataset.index.count
        if scan is None or not scan.expected or not scan.passed:
            return rows
        return round(rows * max(scan.expected / scan.passed, 1.0))

    def condition(self, dataset: Dataset) -> Condition:
        """State of one of its datasets, with the reason; safe from any thread during a pass."""
        standing, scan, catalogue = dataset.standing, self.scan, self.catalogue
        doubt = "" if catalogue.doubt is None or catalogue.believed else catalogue.doubt
        if scan is not None and not scan.believed and scan.covers(dataset.name):
            doubt = scan.doubt or doubt
        return state_of(
            Facts(
                failed=standing.failed,
                caught_up=standing.caught_up,
                must_rebuild=self.must_rebuild,
                began_empty=standing.began_empty,
                replaced=self.successor is not None,
                rebuilt=dataset.replacement is not None,
                weakness=catalogue.weakness,
                doubt=doubt,
            )
        )
