"""One source as it is being followed: its cursor, its datasets, its quarantine, and a scan when one is under way.

Invariant: after ``apply`` of everything that a pass read at its snapshot, the source's indexes hold exactly the rows that were live at that
snapshot and can be indexed; the rest of the live rows are in ``quarantine``. Changes are idempotent: applying a newer reading of a row, or the
same one again, is always right.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import structlog
from numpy.typing import NDArray

from syncd.index.vectors import VectorFormat
from syncd.postgres.outbox import Cursor
from syncd.postgres.source import Source
from syncd.postgres.vectors import decode_vectors
from syncd.sync.datasets import ANSWERING, Dataset, Registry, State
from syncd.sync.directory import Directory
from syncd.sync.reading import EXPRESSION_FAILED
from syncd.sync.watch import Watch
from syncd.types import DatasetName, Key, Position, dataset_name

FIRST_RETRY_SECONDS = 0.05
LAST_RETRY_SECONDS = 15.0
MAX_UNCONFIRMED_KEYS = 200_000
SCAN_PAGE_ROWS = (1000, 100, 16_000)  # the first page, the shortest and the longest
SCAN_PAGE_SECONDS = 0.06
SCAN_PAGE_BYTES = 8 << 20

logger = structlog.get_logger()

Row = tuple[str | int, str | None, str | None, bytes, int, str | None]
"""Key, project, dataset, vector, fingerprint and attached columns (a JSON array), as they were read."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A live row that cannot be indexed."""

    dataset: DatasetName
    reason: str
    since: datetime
    fingerprint: int


@dataclass(slots=True)
class Usable:
    """Rows that can be indexed: their keys, vectors in blocks (n, dimension) float32, fingerprints, and attached columns if there are any."""

    keys: list[Key] = field(default_factory=list)
    vectors: list[NDArray[np.float32]] = field(default_factory=list)
    fingerprints: list[int] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    @property
    def matrix(self) -> NDArray[np.float32]:
        """All vectors, (n, dimension)."""
        return np.concatenate(self.vectors) if self.vectors else np.empty((0, 0), dtype=np.float32)


@dataclass(slots=True)
class Scan:
    """A reading of the whole source, page by page in key order; ``only`` some datasets, or all. ``forced`` dimensions hold for its rows."""

    only: frozenset[DatasetName] | None = None
    forced: dict[DatasetName, int] = field(default_factory=dict)
    after: Key | None = None
    rows: int = 0
    expected: int | None = None
    """About how many rows there are to read; 0 where nothing tells, None before anybody has asked."""
    page_rows: int = field(default_factory=lambda: SCAN_PAGE_ROWS[0])
    resumable: bool = False
    beside: bool = False
    """Whether it fills the ``replacement`` of a dataset that goes on answering."""
    dimensions: dict[DatasetName, Counter[int]] = field(default_factory=dict)
    quarantined: set[Key] = field(default_factory=set)
    """Keys that were in quarantine before it began and have not been read since."""
    believed: bool = False
    """Whether the indexes are believed to be right all the same: then they go on answering as if nothing were."""

    def note_page(self, until: Key | None, rows: Sequence[Row], seconds: float) -> None:
        """Move on behind a page, and make the next one longer or shorter: other changes wait while a page is read, and it is held in memory."""
        _, smallest, largest = SCAN_PAGE_ROWS
        self.after = until
        self.rows += len(rows)
        size = sum(len(row[3]) + len(row[5] or "") for row in rows)
        if seconds < SCAN_PAGE_SECONDS / 2 and size < SCAN_PAGE_BYTES / 2:
            self.page_rows = min(self.page_rows * 2, largest)
        elif size > SCAN_PAGE_BYTES or seconds > SCAN_PAGE_SECONDS:
            self.page_rows = max(self.page_rows // 2, smallest)


class Unconfirmed:
    """What was applied since the last nonce that Postgres has confirmed to be durable: a crash may undo it under us."""

    def __init__(self, confirmed: Cursor) -> None:
        self.confirmed = confirmed
        self.keys: set[str] = set()
        self.everything = False  # too much to list, or a whole table: then only reading all of it again is sure


class WatchedSource:
    """See the module. Only the consumer's task, or a worker thread that it waits for, may change it."""

    def __init__(self, source: Source, registry: Registry, cursor: Cursor) -> None:
        self.source = source
        self.registry = registry
        self.cursor = cursor
        self.datasets: dict[DatasetName, Dataset] = {}
        self.directory = Directory(source.key_kind)
        self.quarantine: dict[Key, Quarantined] = {}
        self.scan: Scan | None = None
        self.predecessor: WatchedSource | None = None
        self.successor: WatchedSource | None = None
        self.failure: str | None = None
        self.is_failed = False
        self.was_ready = False
        self.must_rebuild = False
        self.retry_at = 0.0
        self.dirty_at = 0.0
        self.moved_at: float | None = None
        self.retry_delay_seconds = 0.0
        self.reread: set[str] = set()
        self.unconfirmed = Unconfirmed(cursor)
        self.watch = Watch()
        self.careful = False
        """Whether an expression has failed on a row, so that readings take precautions."""

    @property
    def scanning(self) -> bool:
        """Whether what the indexes hold must be compared with the table before anybody can rely on the position."""
        if self.watch.weakness or self.predecessor is not None:
            return True
        return self.scan is not None and self.scan.only is None and not self.scan.believed

    @property
    def lags(self) -> bool:
        """Whether there is more to apply, as far as is known."""
        return self.reading or self.cursor.window is not None or self.failure is not None or bool(self.reread)

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

    def apply(self, asked: Sequence[Key], rows: Sequence[Row]) -> int:
        """Bring the indexes to what was just read: ``rows`` are the live ones, any other key ``asked`` for is a tombstone.

        Returns how many rows changed. Raises ``OSError`` when the disk is full; then nothing is lost, and the same may be applied again.
        """
        places: dict[DatasetName, list[int]] = {}
        keys = self.source.parse_keys([row[0] for row in rows])
        for key in (*asked, *keys) if self.quarantine else ():
            self.quarantine.pop(key, None)
        if self.scan is not None and self.scan.quarantined:
            self.scan.quarantined.difference_update(asked, keys)
        targets: dict[Key, DatasetName] = {}
        names: dict[tuple[str, str], DatasetName] = {}
        for place, (_, project, dataset, _, fingerprint, _) in enumerate(rows):
            if project is None or dataset is None:
                self.reject(keys[place], DatasetName(""), "null_dataset", fingerprint)
                continue
            name = names.get((project, dataset)) or names.setdefault((project, dataset), dataset_name(project, dataset))
            places.setdefault(name, []).append(place)
            targets[keys[place]] = name
        upserts: dict[DatasetName, Usable] = {}
        for name, at in places.items():
            found = self.dataset(name)
            if found is None:
                for place in at:
                    self.reject(keys[place], name, "dataset_taken", rows[place][4])
                    targets.pop(keys[place], None)
                continue
            upserts[name] = self.usable(
                found, [keys[place] for place in at], [rows[place] for place in at], {*asked, *keys}
            )
            for key in {keys[place] for place in at}.difference(upserts[name].keys):
                targets.pop(key, None)
        changed, begun = 0, time.perf_counter()
        deletes = self.homes_to_leave((*asked, *keys), targets)
        for name in {*upserts, *deletes}:
            good = upserts.get(name) or Usable()
            columns = good.columns if self.source.columns else None
            change = (
                good.keys,
                good.matrix,
                deletes.get(name, []),
                np.array(good.fingerprints, dtype=np.int64),
                columns,
            )
            replacement = self.datasets[name].replacement
            if replacement is not None:
                replacement.apply(*change)
            applied = self.datasets[name].index.apply(*change)
            self.directory.add(name, good.keys)
            changed += applied.inserted + applied.updated + applied.deleted
            self.registry.counters.applied(name, applied.inserted, applied.updated, applied.deleted)
        self.registry.counters.apply_seconds.observe(time.perf_counter() - begun)
        self.reconsider(deletes)
        return changed

    def reconsider(self, names: Iterable[DatasetName]) -> None:
        """A dataset that has lost its last row takes the dimension of the next: read again the rows that did not fit before."""
        empty = {name for name in names if not self.datasets[name].index.count}
        if empty:
            self.reread_misfits(empty)

    def reread_misfits(self, names: set[DatasetName]) -> None:
        """Read again the rows that had another dimension than their dataset."""
        self.reread |= {
            str(key)
            for key, row in self.quarantine.items()
            if row.dataset in names and row.reason == "dimension_mismatch"
        }

    def try_taken_names(self) -> None:
        """A dataset of another source has gone: read again the rows that its name was taken from."""
        self.reread |= {str(key) for key, row in self.quarantine.items() if row.reason == "dataset_taken"}

    def usable(self, dataset: Dataset, keys: Sequence[Key], rows: Sequence[Row], touched: set[Key]) -> Usable:
        """The rows that can be indexed, the last reading of a key first to count; the others go to quarantine."""
        last = {key: place for place, key in enumerate(keys)}
        if len(last) < len(keys):
            keys, rows = list(last), [rows[place] for place in last.values()]
        decoded = decode_vectors(self.source.vector_type, [row[3] for row in rows])
        for place, reason in decoded.bad:
            self.reject(keys[place], dataset.name, reason, rows[place][4])
        if self.scan is not None:
            seen = self.scan.dimensions.setdefault(dataset.name, Counter())
            for block in decoded.blocks:
                seen[block.vectors.shape[1]] += len(block.rows)
        dimension = self.dimension_for(dataset, [block.vectors for block in decoded.blocks], touched)
        usable = Usable()
        for block in decoded.blocks:
            if block.vectors.shape[1] != dimension:
                for place in block.rows:
                    self.reject(keys[place], dataset.name, "dimension_mismatch", rows[place][4])
                continue
            bad = VectorFormat(self.source.metric, self.source.half).validate(block.vectors)
            for place, reason in bad.items():
                self.reject(keys[block.rows[place]], dataset.name, reason, rows[block.rows[place]][4])
            good = [place for place in range(len(block.rows)) if place not in bad] if bad else range(len(block.rows))
            usable.keys += [keys[block.rows[place]] for place in good]
            usable.fingerprints += [rows[block.rows[place]][4] for place in good]
            if self.source.columns:
                usable.columns += [rows[block.rows[place]][5] or "" for place in good]
            usable.vectors.append(block.vectors[list(good)] if bad else block.vectors)
        return usable

    def dimension_for(self, dataset: Dataset, blocks: Sequence[NDArray[np.float32]], touched: set[Key]) -> int | None:
        """The dimension that the dataset's rows must have: declared, else that of the rows that are not ``touched``, else the most
        frequent of these."""
        if self.source.dimension is not None:
            return self.source.dimension
        if self.scan is not None and dataset.name in self.scan.forced:
            return self.scan.forced[dataset.name]
        index = dataset.index
        if index.count and (
            index.count > len(touched) or index.count > np.count_nonzero(index.contains(list(touched)))
        ):
            return index.dim
        if not blocks:
            return None
        dimension: int = max(blocks, key=len).shape[1]
        if index.count and dimension != index.dim:  # every row of the old dimension is being replaced
            index.clear()
            self.reread_misfits({dataset.name})
        return dimension

    def reject(self, key: Key, dataset: DatasetName, reason: str, fingerprint: int) -> None:
        """Put a live row into quarantine; ``apply`` takes any indexed version of it out of the index."""
        self.quarantine[key] = Quarantined(dataset, reason, datetime.now(UTC), fingerprint)
        logger.debug("row_quarantined", source=self.source.name, dataset=dataset, key=key, reason=reason)

    def reject_failing(self, keys: Iterable[Key]) -> None:
        """Put rows that an expression fails on into quarantine; ``apply`` was given their keys."""
        for key in keys:
            self.reject(key, DatasetName(""), EXPRESSION_FAILED, fingerprint=0)

    def reread_failing(self) -> None:
        """Read again the rows that an expression failed on: nothing but that tells whether it still does."""
        self.reread |= {str(key) for key in self.failing}

    @property
    def failing(self) -> list[Key]:
        """The rows that an expression fails on, as far as is known."""
        return [key for key, row in self.quarantine.items() if row.reason == EXPRESSION_FAILED]

    def dataset(self, name: DatasetName) -> Dataset | None:
        """This source's dataset of a name, formed now if need be; ``None`` where another source formed one before."""
        mine = self.datasets.get(name)
        if mine is not None:
            return mine
        listed = self.registry.by_name.get(name)
        replaces = self.predecessor is not None and self.predecessor.datasets.get(name) is listed
        if listed is not None and not replaces:
            return None
        mine = self.registry.create(name, self.source, self)
        self.datasets[name] = mine
        self.directory.adopt([mine])
        if listed is None:
            self.registry.publish(mine)
            if self.scan is None or self.scan.believed:
                mine.state = "ready"
        return mine

    def homes_to_leave(self, keys: Iterable[Key], targets: dict[Key, DatasetName]) -> dict[DatasetName, list[Key]]:
        """Where each key is indexed now although it no longer belongs there."""
        leaving: dict[DatasetName, list[Key]] = {}
        for name, candidates in self.directory.candidates(list(dict.fromkeys(keys))).items():
            there = [key for key in candidates if targets.get(key) != name]
            if there:
                leaving[name] = there
        return leaving

    def clear(self) -> None:
        """The table was truncated: every row is a tombstone."""
        self.unconfirmed.everything = True
        self.quarantine.clear()
        for dataset in self.datasets.values():
            dataset.index.clear()
            if dataset.replacement is not None:
                dataset.replacement.clear()

    def begin_rebuild(self, name: DatasetName) -> None:
        """Build one dataset anew, beside the index that answers; ``end_scan`` swaps them. No other scan may be under way."""
        dataset = self.datasets[name]
        dataset.replacement = self.registry.create(name, self.source, self).index
        dataset.state = "rebuilding"
        self.scan = Scan(frozenset({name}), beside=True)
        self.registry.counters.rebuilt(name, "request")
        logger.info("rebuild_begun", dataset=name)

    def doubt(self, reason: str, *, believed: bool = False) -> None:
        """The indexes may differ from the table for a reason that no trigger tells of: compare them with it.

        Datasets that answer go on answering; ``believed`` to be right, they also stay ``ready``. A comparison under way goes on to its end and
        is followed by another, so that doubts that keep coming never keep it from ending.
        """
        self.watch.note_doubt(reason, believed)
        if self.scan is None or (self.scan.only is None and self.scan.after is None):
            self.compare()
        elif not believed:
            self.scan.believed = False
            self.mark_doubted(reason)

    def compare(self) -> None:
        """Begin the comparison that a doubt asks for."""
        reason, believed = self.watch.doubt or "", self.watch.believed and (self.scan is None or self.scan.believed)
        self.watch.settle()
        answering = [dataset for dataset in self.datasets.values() if dataset.state in ANSWERING]
        states = [(dataset, dataset.state, dataset.reason) for dataset in answering]
        everything = self.unconfirmed.everything
        self.begin_scan(reason="doubt")
        assert self.scan is not None
        self.scan.believed = believed
        if (
            believed
        ):  # every change has come through the outbox; what the comparison finds to be otherwise is noted then
            self.unconfirmed.everything = everything
        for dataset, state, why in states:
            dataset.state, dataset.reason = state, why
        if not believed:
            self.mark_doubted(reason)

    def mark_doubted(self, reason: str) -> None:
        """Datasets that are ready go on answering, and say that they may differ from their table."""
        for dataset in self.datasets.values():
            if dataset.state == "ready":
                dataset.state, dataset.reason = "rebuilding", reason

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
            dataset.replacement = None
        self.scan = Scan(only, forced or {}, resumable=only is None and not self.datasets)
        self.unconfirmed.everything = True
        self.scan.quarantined = {key for key, row in self.quarantine.items() if only is None or row.dataset in only}
        for dataset in self.datasets.values():
            if only is None or dataset.name in only:
                self.registry.counters.rebuilt(dataset.name, reason)
                dataset.index.begin_sweep()
                dataset.sweeping = True
                dataset.state = "catching_up" if dataset.index.count else "backfilling"

    def rebuild(self, position: Position) -> None:
        """The outbox no longer holds all changes since the cursor: start from ``position``, and compare every row."""
        self.cursor = Cursor(position)
        self.must_rebuild = True
        self.begin_scan(reason="must_rebuild")
        for dataset in self.datasets.values():
            dataset.state, dataset.reason = "must_rebuild", "it is compared with its table"

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
        wrong: dict[DatasetName, int] = {}
        for name, seen in scan.dimensions.items():
            most_frequent = seen.most_common(1)[0][0] if seen else None
            settled = (None, self.source.dimension, self.datasets[name].index.dim, scan.forced.get(name))
            if self.source.dimension is None and most_frequent not in settled:
                wrong[name] = most_frequent
        if wrong:  # the most frequent length decides, and its rows are in quarantine now
            for name in wrong:
                self.datasets[name].index = self.registry.create(name, self.source, self).index
            self.begin_scan(frozenset(wrong), wrong, reason="dimension")
        return removed

    def caught_up(self) -> None:
        """Everything up to the pass's snapshot is applied: the datasets answer, in place of a predecessor's."""
        if self.failure is not None:
            logger.info("source_recovered", source=self.source.name)
        self.failure, self.is_failed, self.retry_at, self.retry_delay_seconds = None, False, 0.0, 0.0
        if self.cursor.window is not None:
            return
        self.moved_at = time.monotonic()
        if self.scan is None and self.watch.doubt is not None:
            self.compare()
        if self.careful and self.scan is None:
            self.careful = bool(self.failing)
        state: State = "rebuilding" if self.watch.weakness else "ready"
        for dataset in self.datasets.values():
            scanned = self.scan is not None and (self.scan.only is None or dataset.name in self.scan.only)
            if dataset.state != state and (not scanned or self.is_believed):
                dataset.state, dataset.reason = state, self.watch.weakness
                self.registry.publish(dataset)
        if self.reading:
            return
        self.must_rebuild = False
        if not self.was_ready:
            rows = sum(dataset.index.count for dataset in self.datasets.values())
            logger.info("source_ready", source=self.source.name, datasets=len(self.datasets), rows=rows)
        self.was_ready = True
        if self.predecessor is not None:
            for dataset in self.predecessor.datasets.values():
                self.registry.remove(dataset)
            self.predecessor = None

    @property
    def is_believed(self) -> bool:
        """Whether the scan under way, if there is one, is of indexes that are believed to be right."""
        return self.scan is not None and self.scan.believed

    def behind(self, reason: str, *, now: float) -> None:
        """The source could not be read just now (a lock): it answers from where it is, and is tried again after a growing delay."""
        if reason != self.failure:
            logger.warning("source_delayed", source=self.source.name, reason=reason)
        self.retry_later(reason, now=now)

    def failed(self, reason: str, *, now: float) -> None:
        """Reading or applying failed: the datasets say so and stop answering, and it is tried again after a growing delay."""
        if reason != self.failure:
            logger.error("source_failed", source=self.source.name, reason=reason)
        self.retry_later(reason, now=now)
        self.is_failed = True
        for dataset in self.datasets.values():
            dataset.state, dataset.reason = "failed", reason

    def retry_later(self, reason: str, *, now: float) -> None:
        """Leave the source out of passes for a while."""
        self.failure = reason
        self.retry_delay_seconds = min(max(self.retry_delay_seconds * 2, FIRST_RETRY_SECONDS), LAST_RETRY_SECONDS)
        self.retry_at = now + self.retry_delay_seconds

    def note_unconfirmed(self, keys: Iterable[str]) -> None:
        """Remember keys, as the outbox has them, until a nonce confirms the commits that changed them."""
        if not self.unconfirmed.everything:
            self.unconfirmed.keys.update(keys)
            if len(self.unconfirmed.keys) > MAX_UNCONFIRMED_KEYS:
                self.unconfirmed.everything = True
                self.unconfirmed.keys.clear()

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
        self.note_unconfirmed(taken.keys)

    def return_to_confirmed(self) -> None:
        """A connection was lost, and perhaps commits with it: read again what was applied since the last confirmed position."""
        self.cursor = self.unconfirmed.confirmed
        if self.unconfirmed.everything:
            self.begin_scan()
            return
        self.reread |= self.unconfirmed.keys
        if self.scan is not None and self.scan.beside:  # the new index holds what may be lost
            self.begin_rebuild(*self.scan.only or ())

    def replaces(self, predecessor: WatchedSource | None) -> None:
        """This is the same table attached anew: the old datasets serve, frozen, until this source has been read."""
        self.predecessor = predecessor
        if predecessor is not None:
            predecessor.successor = self
            if predecessor.predecessor is not None:  # it never came to serve: what served before it goes on
                predecessor.datasets |= predecessor.predecessor.datasets
            for dataset in predecessor.datasets.values():
                if dataset.state == "ready":
                    dataset.state = "rebuilding"

    def rename(self, source: Source) -> None:
        """The same table under its present name, and with the present types of its columns."""
        self.source = source
        for dataset in self.datasets.values():
            dataset.source = source

    def stop(self) -> None:
        """The source was detached: its datasets go."""
        for dataset in (*self.datasets.values(), *(self.predecessor.datasets.values() if self.predecessor else ())):
            self.registry.remove(dataset)
