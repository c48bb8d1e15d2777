"""One source as it is being followed: its cursor, its datasets, its quarantine, and a scan when one is under way.

Invariant: the indexes stand at the cursor. Whatever puts that in doubt (a lost commit, a write that no trigger recorded, changes that the outbox no
longer holds) has rows read again, and until they have been, the datasets that depend on them do not claim to be ready.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

import structlog

from syncd.errors import Trouble
from syncd.postgres.outbox import Cursor
from syncd.postgres.source import Source
from syncd.supervision import describe
from syncd.sync.registry.datasets import Dataset, Registry
from syncd.sync.registry.states import Condition, Facts, Standing, state_of
from syncd.sync.source.emptied import Emptied
from syncd.sync.source.key_homes import Directory
from syncd.sync.source.known_catalogue import KnownCatalogue
from syncd.sync.source.quarantined import Quarantine
from syncd.sync.source.rows import Rows
from syncd.sync.source.scan import Scan
from syncd.sync.source.unconfirmed import Unconfirmed
from syncd.types import DatasetName, Key, Position

FIRST_RETRY_SECONDS = 0.05
LAST_RETRY_SECONDS = 15.0
HELD_UP_SECONDS = 5.0
"""Of delay between two attempts; the first was some six seconds before."""

logger = structlog.get_logger()


class FollowedSource:
    """See the module. Only the consumer's task, or a worker thread that it waits for, may change it."""

    def __init__(self, source: Source, registry: Registry, cursor: Cursor) -> None:
        self.source = source
        self.registry = registry
        self.cursor = cursor
        self.datasets: dict[DatasetName, Dataset] = {}
        self.directory = Directory(source.key_kind)
        self.emptied = Emptied()
        self.quarantine = Quarantine(source)
        self.scan: Scan | None = None
        self.predecessor: FollowedSource | None = None
        self.successor: FollowedSource | None = None
        self.failure: Trouble | None = None
        self.is_failed = False
        self.was_ready = False
        self.must_rebuild = False
        self.retry_at = 0.0
        self.dirty_at = 0.0
        self.moved_at: float | None = None
        self.retry_delay_seconds = 0.0
        self.reread: set[str] = set()
        self.reread_unkeyed = False
        """Whether the rows without a key are to be read again."""
        self.unconfirmed = Unconfirmed(cursor)
        self.catalogue = KnownCatalogue()
        self.compared_at: datetime | None = None
        """When all of the table was last read, for the indexes or to compare them with it."""
        self.careful = False
        """Whether an expression has failed on a row, so that readings take precautions."""

    @property
    def scanning(self) -> bool:
        """Whether what the indexes hold must be compared with the table before anybody can rely on the position."""
        if self.catalogue.weakness is not None or self.predecessor is not None:
            return True
        return self.scan is not None and self.scan.only is None and not self.scan.believed

    @property
    def lags(self) -> bool:
        """Whether there is more to apply, as far as is known."""
        return (
            self.reading
            or self.cursor.window is not None
            or self.failure is not None
            or self.rereads
        )

    @property
    def rereads(self) -> bool:
        """Whether there are rows to be read again, beside those that changed."""
        return bool(self.reread) or self.reread_unkeyed

    @property
    def is_held_up(self) -> bool:
        """Whether it could not be read again and again."""
        return self.failure is not None and self.retry_delay_seconds >= HELD_UP_SECONDS

    @property
    def reading(self) -> bool:
        """Whether rows are being read that the indexes do not answer for yet. A rebuild beside one that answers does not count, nor a comparison
        of indexes that are believed to be right."""
        return self.scan is not None and not self.scan.beside and not self.scan.believed

    def adopt(self, dataset: Dataset) -> None:
        """Take a dataset that was loaded from a checkpoint."""
        self.datasets[dataset.name] = dataset
        self.directory.adopt([dataset])
        self.registry.publish(dataset)
        self.emptied.note(dataset)

    def reread_misfits(self, names: set[DatasetName]) -> None:
        """Read again the rows that had another dimension than their dataset."""
        self.reread |= {str(key) for key in self.quarantine.keys_with("dimension_mismatch", names)}

    def try_taken_names(self) -> None:
        """A dataset of another source has gone: read again the rows that its name was taken from."""
        self.reread |= {str(key) for key in self.quarantine.keys_with("dataset_taken")}

    def reject_unkeyed(self, rows: Rows) -> None:
        """These are all rows that have no key, by their labels: they are in quarantine, and those that were there before are not."""
        replaced = self.quarantine.replace_unkeyed(rows)
        self.reread_unkeyed = False
        if self.scan is not None:
            self.scan.quarantined -= replaced

    def reread_failing(self) -> None:
        """Read again the rows that an expression failed on, and those without a key: nothing but that tells whether it is still so."""
        self.reread |= {str(key) for key in self.quarantine.failing}
        self.reread_unkeyed = True

    def some_indexed(self, count: int) -> list[Key]:
        """Keys of indexed rows from all over the datasets."""
        most = sorted(self.datasets.values(), key=lambda each: each.index.count)[-3:]
        return [key for dataset in most for key in dataset.index.view.some_keys(count)]

    def dataset(self, name: DatasetName) -> Dataset | None:
        """This source's dataset of a name; ``None`` if another source has formed one of this name.

        One that is formed now answers from the end of the pass: a search that came between its name and its rows would find it empty.
        """
        mine = self.datasets.get(name)
        if mine is not None:
            return mine
        listed, before = self.registry.by_name.get(name), self.predecessor
        stands = listed is not None or (
            name in self.registry.retired and name not in self.emptied.names
        )
        replaces = before is not None and (
            (listed is not None and before.datasets.get(name) is listed)
            or name in before.emptied.names
        )
        if stands and not replaces:
            return None
        mine = self.registry.create(name, self.source, self)
        if name in self.emptied.names:  # it is formed again
            self.emptied.names.discard(name)
            mine.standing = replace(self.emptied.standing)
        self.datasets[name] = mine
        self.directory.adopt([mine])
        if not stands:
            self.registry.publish(mine)
        return mine

    def empty(self, name: DatasetName) -> Dataset:
        """The dataset that answers for a name without rows: an empty index, made for this question."""
        return replace(
            self.registry.create(name, self.source, self), standing=self.emptied.standing
        )

    def load_emptied(self, names: Iterable[str]) -> None:
        """Take up the names of a checkpoint."""
        for name in map(DatasetName, names):
            if name not in self.registry.by_name and name not in self.registry.retired:
                self.emptied.names.add(name)
                self.registry.retired[name] = self
        self.emptied.standing = Standing(began_empty=False)

    def retire_emptied(self) -> None:
        """Remove the indexes of datasets that have been empty for a while. Called between passes."""
        if self.reading or self.predecessor is not None:
            return  # a reading may still find rows of theirs
        for dataset in self.emptied.due(self.datasets):
            self.emptied.names.add(dataset.name)
            self.registry.retire(dataset, self)
            del self.datasets[dataset.name]
            self.directory.forget(dataset.name)

    def condition(self, dataset: Dataset) -> Condition:
        """State of one of its datasets, and the reason. From any thread: a pass may go on meanwhile."""
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

    def clear(self) -> None:
        """The table was truncated: every row is a tombstone."""
        self.unconfirmed.everything = True
        self.quarantine.clear()
        for dataset in self.datasets.values():
            dataset.index.clear()
            if dataset.replacement is not None:
                dataset.replacement.clear()
            self.emptied.note(dataset)

    def begin_rebuild(self, name: DatasetName) -> None:
        """Build one dataset anew, beside the index that answers; ``end_scan`` swaps them. No other scan may be under way."""
        dataset = self.datasets[name]
        dataset.replacement = self.registry.create(name, self.source, self).index
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
        """Read the source again, wholly or for some datasets; at its end, rows that were not found are tombstones.

        ``reason`` is what the rebuild is counted under: a word of our own, never a row's text.
        """
        for dataset in self.datasets.values():
            if only is None or dataset.name in only:
                dataset.standing.begin(empty=not dataset.index.count)
        if only is None:
            self.emptied.standing.begin(empty=True)
        self.unconfirmed.everything = True
        self.sweep(Scan(only, forced or {}), reason)

    def sweep(self, scan: Scan, reason: str) -> None:
        """Begin a scan: rows that it does not find are tombstones at its end."""
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
        """The outbox no longer holds all changes since the cursor: start from ``position``, and compare every row."""
        self.cursor = Cursor(position)
        self.must_rebuild = True
        self.begin_scan(reason="must_rebuild")

    def end_scan(self) -> int:
        """Close a scan: what it did not find goes. Returns how many rows went. A dataset whose dimension turned out wrong is read again."""
        assert self.scan is not None
        scan, self.scan = self.scan, None
        removed = 0
        for key in scan.quarantined:
            self.quarantine.pop(key, None)
        for dataset in self.datasets.values():
            if dataset.replacement is not None:
                dataset.index, dataset.replacement = dataset.replacement, None
                logger.info("rebuilt", dataset=dataset.name, rows=dataset.index.count)
            if dataset.sweeping:
                removed += dataset.index.end_sweep()
                dataset.sweeping = False
            self.emptied.note(dataset)
        wrong: dict[DatasetName, int] = {}
        for name, seen in scan.dimensions.items():
            most_frequent = seen.most_common(1)[0][0] if seen else None
            settled = (
                None,
                self.source.dimension,
                self.datasets[name].index.dim,
                scan.forced.get(name),
            )
            if self.source.dimension is None and most_frequent not in settled:
                wrong[name] = most_frequent
        if scan.only is None:
            self.compared_at = datetime.now(UTC)
        if wrong:  # the most frequent length decides, and its rows are in quarantine now
            for name in wrong:
                self.datasets[name].index = self.registry.create(name, self.source, self).index
            self.begin_scan(frozenset(wrong), wrong, reason="dimension")
        return removed

    def doubt(self, reason: str, *, believed: bool = False) -> None:
        """Have the indexes compared with the table: they may differ for a reason that no trigger records.

        Datasets that answer go on answering; ``believed`` to be right, they also stay ``ready``. A
        comparison under way goes on to its end and is followed by another, so that doubts that keep
        coming never keep it from ending.
        """
        self.catalogue.note_doubt(reason, believed)
        if self.scan is None or (self.scan.only is None and self.scan.after is None):
            self.compare()
        elif not believed:
            self.scan.believed = False
            self.scan.doubt = self.scan.doubt or reason

    def compare(self) -> None:
        """Begin the comparison that a doubt asks for. Datasets that answer go on answering."""
        reason = self.catalogue.doubt or ""
        believed = self.catalogue.believed and (self.scan is None or self.scan.believed)
        for dataset in self.datasets.values():
            if not dataset.standing.answers:
                dataset.standing.begin(empty=not dataset.index.count)
        if not self.emptied.standing.answers:
            self.emptied.standing.begin(empty=True)
        # if believed, every change has come through the outbox: a difference that is found is noted then
        self.unconfirmed.everything |= not believed
        self.sweep(Scan(believed=believed, doubt="" if believed else reason), "doubt")
        self.catalogue.settle()

    def doubt_unlogged(self) -> None:
        """The connection was lost, or there was none: a crash of the server may have emptied an unlogged table."""
        if self.catalogue.facts is not None and self.catalogue.facts.unlogged:
            self.doubt(f"{self.source.name}: it is unlogged, and the server may have crashed")

    def apply_marker(self, op: str) -> None:
        """A truncation, or a trigger that could not record keys."""
        if op == "t":
            self.clear()
            self.catalogue.rewritten = False
        elif op == "r":
            self.doubt(f"{self.source.name}: a trigger could not record which rows changed")

    def caught_up(self) -> None:
        """Everything up to the pass's snapshot is applied: the datasets answer, in place of a predecessor's."""
        if self.cursor.window is None and self.scan is None and self.catalogue.doubt is not None:
            self.compare()  # before the failure ends: no one sees the source ready in between
        if self.failure is not None:
            logger.info("source_recovered", source=self.source.name)
        self.failure, self.is_failed, self.retry_at, self.retry_delay_seconds = (
            None,
            False,
            0.0,
            0.0,
        )
        if self.cursor.window is not None:
            return
        self.moved_at = time.monotonic()
        if self.careful and self.scan is None:
            self.careful = bool(self.quarantine.failing)
        for dataset in self.datasets.values():
            if not dataset.standing.caught_up and not self.is_read_for(dataset.name):
                dataset.standing.catch_up()
                self.registry.publish(dataset)
        if not self.is_read_for(None):
            self.emptied.standing.catch_up()
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
            self.predecessor.remove_datasets()
            self.predecessor = None
        self.retire_emptied()

    def is_read_for(self, name: DatasetName | None) -> bool:
        """Whether rows are being read that a dataset does not answer for yet; None: one without rows."""
        if self.scan is None or not self.reading:
            return False
        return self.scan.only is None or name in self.scan.only

    @property
    def is_believed(self) -> bool:
        """Whether the scan under way, if there is one, is of indexes that are believed to be right."""
        return self.scan is not None and self.scan.believed

    def behind(self, trouble: Trouble, *, now: float) -> None:
        """The source could not be read just now (a lock): it answers from where it is, and is tried again after a growing delay."""
        if trouble != self.failure:
            logger.warning(
                "source_delayed", source=self.source.name, reason=trouble.reason, fix=trouble.fix
            )
        self.retry_later(trouble, now=now)

    def failed(self, trouble: Trouble, *, now: float) -> None:
        """Reading or applying failed: the datasets say so and stop answering, and it is tried again after a growing delay."""
        if trouble != self.failure:
            logger.error(
                "source_failed", source=self.source.name, reason=trouble.reason, fix=trouble.fix
            )
        self.retry_later(trouble, now=now)
        self.is_failed = True
        for dataset in self.datasets.values():
            dataset.standing.fail(trouble)
        self.emptied.standing.fail(trouble)

    def failed_unexpectedly(self, error: Exception, *, now: float) -> None:
        """An error that nobody has thought of, perhaps half-way through a change: the table is compared once the source can be read again."""
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
        """A checkpoint takes the state as it is now; returns what ``confirm`` or ``not_confirmed`` is to be given."""
        taken, self.unconfirmed = self.unconfirmed, Unconfirmed(self.unconfirmed.confirmed)
        self.unconfirmed.everything = self.reading
        self.unconfirmed.confirmed = self.cursor
        return taken

    def not_confirmed(self, taken: Unconfirmed) -> None:
        """The nonce was not committed: what was taken is still unconfirmed."""
        self.unconfirmed.confirmed = taken.confirmed
        self.unconfirmed.everything |= taken.everything
        self.unconfirmed.note(taken.keys)

    def return_to_confirmed(self) -> None:
        """A connection was lost, and perhaps commits with it: read again what was applied since the last confirmed position."""
        self.cursor = self.unconfirmed.confirmed
        if self.unconfirmed.everything:
            self.begin_scan()
            return
        self.reread |= self.unconfirmed.keys
        if self.scan is not None and self.scan.beside:  # the new index holds what may be lost
            self.begin_rebuild(*self.scan.only or ())

    def replaces(self, predecessor: FollowedSource | None) -> None:
        """This is the same table attached anew: the old datasets serve, frozen, until this source has been read."""
        self.predecessor = predecessor
        if predecessor is not None:
            predecessor.successor = self
            if (
                predecessor.predecessor is not None
            ):  # it never came to serve: what served before it goes on
                predecessor.datasets |= predecessor.predecessor.datasets
                predecessor.emptied.names |= predecessor.predecessor.emptied.names

    def rename(self, source: Source) -> None:
        """The same table under its present name, and with the present types of its columns."""
        self.source = self.quarantine.source = source
        for dataset in self.datasets.values():
            dataset.source = source

    def stop(self) -> None:
        """The source was detached: its datasets go."""
        self.remove_datasets()
        if self.predecessor is not None:
            self.predecessor.remove_datasets()

    def remove_datasets(self) -> None:
        """Nothing of this source answers any more."""
        for dataset in self.datasets.values():
            self.registry.remove(dataset)
        for name in self.emptied.names:
            self.registry.remove_retired(name)
        self.emptied.names.clear()
