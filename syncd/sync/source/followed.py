"""One source that is followed: its cursor, datasets, quarantine, and the scan under way.

Invariant: the indexes are at the cursor. Three events put that in doubt: a lost commit, a write
that no trigger recorded, and changes that the outbox no longer holds. Then rows are read again, and
until then the datasets that depend on them are not ``ready``.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime

import structlog

from syncd.errors import Trouble
from syncd.postgres.outbox import Cursor
from syncd.postgres.source import Source
from syncd.supervision import describe
from syncd.sync.source.rows import Rows
from syncd.sync.source.scan import Scan
from syncd.sync.source.source_state import SourceState
from syncd.sync.source.unconfirmed import Unconfirmed
from syncd.types import DatasetName, Position

FIRST_RETRY_SECONDS = 0.05
"""Delay after the first failure; it doubles with each further one."""
LAST_RETRY_SECONDS = 15.0
"""Longest delay between two attempts."""

logger = structlog.get_logger()


class FollowedSource(SourceState):
    """A source and its changes. Only the consumer's task, or its worker thread, makes them."""

    def reread_misfits(self, names: set[DatasetName]) -> None:
        """Have the rows read again whose dimension differed from their dataset's."""
        self.reread |= set(self.quarantine.keys_with("dimension_mismatch", names))

    def try_taken_names(self) -> None:
        """Have the rows read again whose dataset's name belonged to another source, now gone."""
        self.reread |= set(self.quarantine.keys_with("dataset_taken"))

    def reread_failing(self) -> None:
        """Have the failing rows and those without a key read again.

        No outbox row tells that an expression works again.
        """
        self.reread |= set(self.quarantine.failing)
        self.reread_unkeyed = True

    def reject_unkeyed(self, rows: Rows) -> None:
        """Put all rows without a key into quarantine, by label; earlier ones leave it."""
        replaced = self.quarantine.replace_unkeyed(rows)
        self.reread_unkeyed = False
        if self.scan is not None:
            self.scan.quarantined -= replaced

    def clear(self) -> None:
        """Apply a truncation: every row is a tombstone."""
        self.unconfirmed.everything = True
        self.quarantine.clear()
        for dataset in self.datasets.values():
            dataset.index.clear()
            if dataset.replacement is not None:
                dataset.replacement.clear()
            self.datasets.emptied.note(dataset)

    def begin_rebuild(self, name: DatasetName) -> None:
        """Build another index for one dataset, whose present index answers until ``end_scan``.

        There must be no other scan.
        """
        self.datasets[name].replacement = self.datasets.create(name).index
        self.scan = Scan(frozenset({name}), beside=True)
        self.registry.counters.rebuilt(name, "request")
        logger.info("rebuild_begun", dataset=name)

    def begin_scan(
        self,
        only: frozenset[DatasetName] | None = None,
        forced: dict[DatasetName, int] | None = None,
        *,
        reason: str = "reconcile",
    ) -> None:
        """Read the source again, all of it or some datasets; rows that are not found are removed.

        ``reason`` is a label of the rebuild's metric: one of our words, never a row's text.
        """
        for dataset in self.datasets.values():
            if only is None or dataset.name in only:
                dataset.standing.begin(empty=not dataset.index.count)
        if only is None:
            self.datasets.emptied.standing.begin(empty=True)
        self.unconfirmed.everything = True
        self.sweep(Scan(only, forced or {}), reason)

    def sweep(self, scan: Scan, reason: str) -> None:
        """Begin a scan; rows that it does not find are removed at its end."""
        only = scan.only
        for dataset in self.datasets.values():
            dataset.replacement = None
        scan.resumable = only is None and not self.datasets
        scan.quarantined = {
            key for key, row in self.quarantine.items() if only is None or row.dataset in only
        }
        for dataset in self.datasets.values():
            if only is None or dataset.name in only:
                self.registry.counters.rebuilt(dataset.name, reason)
                dataset.index.begin_sweep()
                dataset.sweeping = True
        self.scan = scan

    def rebuild(self, position: Position) -> None:
        """Start from ``position`` and compare every row: the outbox no longer holds all changes."""
        self.cursor = Cursor(position)
        self.must_rebuild = True
        self.begin_scan(reason="must_rebuild")

    def end_scan(self) -> int:
        """Close a scan, and remove the rows that it did not find; returns their number.

        A dataset whose dimension turned out to be wrong is read again: the most frequent dimension
        counts, and the rows that have it are in quarantine now.
        """
        assert self.scan is not None
        scan, self.scan = self.scan, None
        removed = 0
        for key in scan.quarantined:
            self.quarantine.pop(key, None)
        for dataset in self.datasets.values():
            if dataset.replacement is not None:
                dataset.replacement.asked = dataset.index.asked
                dataset.index, dataset.replacement = dataset.replacement, None
                logger.info("rebuilt", dataset=dataset.name, rows=dataset.index.count)
            if dataset.sweeping:
                removed += dataset.index.end_sweep()
                dataset.sweeping = False
            self.datasets.emptied.note(dataset)
        if scan.only is None:
            self.compared_at = datetime.now(UTC)
        if self.source.dimension is None:
            dims = {name: self.datasets[name].index.dim for name in scan.dimensions}
            if wrong := scan.wrong_dimensions(dims):
                for name in wrong:
                    self.datasets[name].index = self.datasets.create(name).index
                self.begin_scan(frozenset(wrong), wrong, reason="dimension")
        return removed

    def doubt(self, reason: str, *, believed: bool = False) -> None:
        """Have the indexes compared with the table, for a reason that no trigger records.

        Datasets that answer continue to answer; if they are ``believed`` to be right, they also
        stay ``ready``. A comparison under way goes on to its end, and another one follows. So
        repeated doubts never keep a comparison from ending.
        """
        self.catalogue.note_doubt(reason, believed)
        if self.scan is None or (self.scan.only is None and self.scan.after is None):
            self.compare()
        elif not believed:
            self.scan.believed = False
            self.scan.doubt = self.scan.doubt or reason

    def compare(self) -> None:
        """Begin the comparison of a doubt. Datasets that answer continue to answer."""
        reason = self.catalogue.doubt or ""
        believed = self.catalogue.believed and (self.scan is None or self.scan.believed)
        for dataset in self.datasets.values():
            if not dataset.standing.answers:
                dataset.standing.begin(empty=not dataset.index.count)
        if not self.datasets.emptied.standing.answers:
            self.datasets.emptied.standing.begin(empty=True)
        # if believed, every change came through the outbox: differences are noted when found
        self.unconfirmed.everything |= not believed
        self.sweep(Scan(believed=believed, doubt="" if believed else reason), "doubt")
        self.catalogue.settle()

    def doubt_unlogged(self) -> None:
        """Doubt an unlogged table after a lost connection: a crash may have emptied it."""
        if self.catalogue.facts is not None and self.catalogue.facts.unlogged:
            self.doubt(f"{self.source.name}: it is unlogged, and the server may have crashed")

    def apply_marker(self, op: str) -> None:
        """Apply a marker: a truncation, or a trigger that could not record keys."""
        if op == "t":
            self.clear()
            self.catalogue.rewritten = False
        elif op == "r":
            self.doubt(f"{self.source.name}: a trigger could not record which rows changed")

    def caught_up(self) -> None:
        """Note that all changes up to the pass's snapshot are applied: the datasets answer.

        They replace those of a predecessor.
        """
        if self.cursor.window is None and self.scan is None and self.catalogue.doubt is not None:
            self.compare()  # before the failure ends: the source is not ready in between
        if self.failure is not None:
            logger.info("source_recovered", source=self.source.name)
        self.failure, self.is_failed = None, False
        self.retry_at, self.retry_delay_seconds = 0.0, 0.0
        if self.cursor.window is not None:
            return
        self.moved_at = time.monotonic()
        if self.careful and self.scan is None:
            self.careful = bool(self.quarantine.failing)
        if not self.is_read_for(None):  # else no dataset catches up, of perhaps thousands
            for dataset in self.datasets.values():
                if not dataset.standing.caught_up and not self.is_read_for(dataset.name):
                    dataset.standing.catch_up()
                    self.registry.publish(dataset)
            self.datasets.emptied.standing.catch_up()
        if self.reading:
            return
        if self.scan is None:
            self.catalogue.before = ""
        self.must_rebuild = False
        if not self.was_ready:
            rows = sum(dataset.index.count for dataset in self.datasets.values())
            logger.info(
                "source_ready", source=self.source.name, datasets=len(self.datasets), rows=rows
            )
        self.was_ready = True
        if self.predecessor is not None:
            self.predecessor.datasets.remove_all()
            self.predecessor = None
        self.datasets.retire_emptied()

    def behind(self, trouble: Trouble, *, now: float) -> None:
        """Note that the source could not be read just now, for example because of a lock.

        It answers at its cursor, and is tried again after a growing delay.
        """
        if trouble != self.failure:
            logger.warning(
                "source_delayed", source=self.source.name, reason=trouble.reason, fix=trouble.fix
            )
        self.retry_later(trouble, now=now)

    def failed(self, trouble: Trouble, *, now: float) -> None:
        """Note that reading or applying failed: the datasets stop answering and say why.

        The source is tried again after a growing delay.
        """
        if trouble != self.failure:
            logger.error(
                "source_failed", source=self.source.name, reason=trouble.reason, fix=trouble.fix
            )
        self.retry_later(trouble, now=now)
        self.is_failed = True
        for dataset in self.datasets.values():
            dataset.standing.fail(trouble)
        self.datasets.emptied.standing.fail(trouble)

    def failed_unexpectedly(self, error: Exception, *, now: float) -> None:
        """Note an unexpected error, perhaps halfway through a change.

        The table is compared when the source can be read again.
        """
        trouble = Trouble(
            f"unexpected {describe(error)}; it is tried again",
            "syncd check",
            "see the log of syncd serve, and",
        )
        if trouble != self.failure:
            logger.error("source_failed_unexpectedly", source=self.source.name, exc_info=error)
        self.failed(trouble, now=now)
        self.catalogue.note_doubt(f"{self.source.name}: an unexpected error", believed=False)

    def retry_later(self, trouble: Trouble, *, now: float) -> None:
        """Leave the source out of passes for a while."""
        self.failure = trouble
        self.retry_delay_seconds = min(
            max(self.retry_delay_seconds * 2, FIRST_RETRY_SECONDS), LAST_RETRY_SECONDS
        )
        self.retry_at = now + self.retry_delay_seconds

    def begin_confirming(self) -> Unconfirmed:
        """Note that a checkpoint captures the present state.

        Returns the changes that are unconfirmed so far, for ``not_confirmed``.
        """
        taken, self.unconfirmed = self.unconfirmed, Unconfirmed(self.unconfirmed.confirmed)
        self.unconfirmed.everything = self.reading
        self.unconfirmed.confirmed = self.cursor
        return taken

    def not_confirmed(self, taken: Unconfirmed) -> None:
        """Note that the nonce was not committed: the captured changes are still unconfirmed."""
        self.unconfirmed.confirmed = taken.confirmed
        self.unconfirmed.everything |= taken.everything
        self.unconfirmed.note(taken.keys)

    def return_to_confirmed(self) -> None:
        """Read all again since the last confirmed position: a lost connection may lose commits."""
        self.cursor = self.unconfirmed.confirmed
        if self.unconfirmed.everything:
            self.begin_scan()
            return
        self.reread |= self.unconfirmed.keys
        if self.scan is not None and self.scan.beside:  # the new index may hold lost changes
            self.begin_rebuild(*self.scan.only or ())

    def replaces(self, predecessor: SourceState | None) -> None:
        """Replace a source of the same table, whose datasets serve until this one is read."""
        self.predecessor = predecessor
        if predecessor is not None:
            predecessor.successor = self
            if predecessor.predecessor is not None:  # it never served, but its own predecessor
                predecessor.datasets.take_over(predecessor.predecessor.datasets)

    def rename(self, source: Source) -> None:
        """Take the present name of the same table, and the present types of its columns."""
        self.source = self.quarantine.source = self.datasets.source = source
        for dataset in self.datasets.values():
            dataset.source = source

    def stop(self) -> None:
        """Remove the datasets of a source that was detached."""
        self.datasets.remove_all()
        if self.predecessor is not None:
            self.predecessor.datasets.remove_all()
