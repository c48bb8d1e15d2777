"""Verify: is every index equal to its table at one snapshot? And repair: read again just the rows that are not.

A pass hands over its snapshot and the indexes' views while its transaction is open; a transaction on another connection imports the snapshot.
Views never change, so the comparison runs as long as it needs while passes and searches go on, and whatever it finds is a difference, never a
change that was under way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal

import anyio
import numpy as np
import psycopg
import structlog
from anyio import to_thread
from psycopg import errors as pg
from psycopg import sql

from syncd.errors import DatabaseError, SyncdError
from syncd.index.comparison import Comparison
from syncd.index.view import View
from syncd.postgres.connection import first_line, open_pass_connection, translated_errors
from syncd.postgres.source import Source
from syncd.postgres.vectors import decode_vectors
from syncd.statements import statement
from syncd.sync.alerts import NAMED, named
from syncd.sync.consumer import Consumer
from syncd.sync.passes import KEYS_PER_READ, Handover
from syncd.sync.watched import Quarantined, Row, WatchedSource
from syncd.types import DatasetName, Key, Position, dataset_name

ROWS_PER_FETCH = 10_000
ROWS_PER_DEEP_FETCH = 500
SOURCES_AT_ONCE = 64
"""Each is locked in one transaction, and the server's lock table is everybody's."""
SAMPLE_KEYS = 10
SCAN_FROM_KEYS = 200_000
"""So many differences are mended by reading the whole source."""
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 1.0

logger = structlog.get_logger()


class InTheWay(DatabaseError):
    """Somebody waits for a lock that this verify holds, or holds one that it wants."""


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """One dataset: ``rows`` live ones in the table, ``indexed`` ones here, and how many keys differ, before any repair."""

    dataset: DatasetName
    source: Source
    rows: int
    indexed: int
    missing: int
    extra: int
    stale: int
    quarantined: int
    sample: list[Key]
    repaired: int = 0
    in_sync: bool = True


@dataclass(frozen=True, slots=True)
class SourceReport:
    """One source: was there anything to compare? ``reason`` says why not where it ``failed``, else what is in none of its datasets."""

    source: Source
    outcome: Literal["compared", "empty", "none_live", "failed"]
    reason: str = ""


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
class Captured:
    """One source and its indexes as a pass left them. ``keys``: compare only these; ``only``: compare only these datasets."""

    watched: WatchedSource
    source: Source
    views: dict[DatasetName, View]
    quarantine: Mapping[Key, Quarantined]
    failing: Sequence[Key] = ()
    only: frozenset[DatasetName] | None = None
    keys: Sequence[Key] | None = None


@dataclass(slots=True)
class Found:
    """What the comparison of one source came to."""

    report: SourceReport
    datasets: list[DatasetReport] = field(default_factory=list)
    differing: list[Key] = field(default_factory=list)


class Verifier:
    """Verifies on request and in the background, one at a time."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.lock = anyio.Lock()
        self.last: dict[DatasetName, tuple[datetime, bool]] = {}
        """When each dataset was last compared, and whether it is in sync since then, as far as is known."""
        self.compared: int | None = None
        """Rows of the tables that the verify under way has read; None while there is none."""
        self.expected = 0
        self.last_success_at: datetime | None = None
        """When every source was last compared, whatever that showed."""

    async def run(self, interval_seconds: float) -> None:
        """Compare and mend at start and every so often, until cancelled; an interval of 0 means never."""
        await self.consumer.ready.wait()
        while interval_seconds:
            try:
                done = await self.verify(None, repair=True)
                logger.info(
                    "verified", in_sync=done.in_sync, datasets=len(done.datasets), seconds=round(done.seconds, 3)
                )
            except SyncdError as error:
                logger.warning("verify_failed", error=str(error), hint=error.hint)
            await anyio.sleep(interval_seconds)

    async def verify(
        self, names: Sequence[DatasetName] | None, *, repair: bool = False, deep: bool = False
    ) -> Verified:
        """Compare some datasets, or all, with their tables; raises ``DatabaseError``, ``UnknownDataset``."""
        async with self.lock:
            only = None if names is None else frozenset(self.consumer.registry.known(name).name for name in names)
            self.compared, self.expected = 0, self.indexed(only)
            try:
                return await self.verify_now(only, repair=repair, deep=deep)
            finally:
                self.compared = None

    def indexed(self, only: frozenset[DatasetName] | None) -> int:
        """About how many rows there are to compare."""
        known = self.consumer.registry.by_name.items()
        return sum(dataset.index.count for name, dataset in known if only is None or name in only)

    async def verify_now(self, only: frozenset[DatasetName] | None, *, repair: bool, deep: bool) -> Verified:
        """``verify``, with the lock held."""
        begun = time.monotonic()
        found, position = [], self.consumer.oldest_position()
        ids = self.sources_of(only)
        for start in range(0, len(ids), SOURCES_AT_ONCE) if ids else ():
            some, position = await self.compare(ids[start : start + SOURCES_AT_ONCE], only, deep=deep)
            found += some
        self.note(found)
        if repair:
            found = [await self.mend(each, deep=deep) if each.differing else each for each in found]
            self.remember(found)
        if only is None and all(each.report.outcome != "failed" for each in found):
            self.last_success_at = datetime.now(UTC)
        seconds = time.monotonic() - begun
        self.consumer.registry.counters.verify_seconds.observe(seconds)
        datasets = sorted((row for each in found for row in each.datasets), key=lambda row: row.dataset)
        return Verified(position, datasets, [each.report for each in found], seconds)

    def sources_of(self, only: frozenset[DatasetName] | None) -> list[int]:
        """The sources that have these datasets."""
        sources = self.consumer.sources
        return [each for each in sources if only is None or not only.isdisjoint(sources[each].datasets)]

    async def compare(
        self, ids: Sequence[int], only: frozenset[DatasetName] | None, *, deep: bool
    ) -> tuple[list[Found], Position]:
        """Some sources at one snapshot."""

        def captured(each: WatchedSource) -> Captured:
            views = {name: one.index.view for name, one in each.datasets.items() if only is None or name in only}
            return Captured(each, each.source, views, dict(each.quarantine), each.failing, only)

        async with self.consumer.busy:
            for watched in [self.consumer.sources[one] for one in ids if one in self.consumer.sources]:
                watched.reread_failing()
        found, position = await self.at_one_snapshot(ids, captured, deep=deep)
        by_id, reports = {each.report.source.id: each for each in found}, []
        for one in ids:
            each, known = by_id.get(one), self.consumer.sources.get(one)
            if each is not None and each.report.outcome != "failed":
                reports.append(each)
            elif known is not None:
                reason = each.report.reason if each is not None else known.failure or "it is not being read"
                reports.append(not_compared(known, only, reason))
        return reports, position

    async def at_one_snapshot(
        self, ids: Sequence[int], capture: Callable[[WatchedSource], Captured], *, deep: bool
    ) -> tuple[list[Found], Position]:
        """Capture some sources in a pass, and compare them with their tables at its snapshot. Steps aside for whoever waits for a lock."""
        for attempt in range(ATTEMPTS):
            try:
                return await self.attempt(ids, capture, deep=deep)
            except InTheWay as error:
                if attempt + 1 == ATTEMPTS:
                    raise
                logger.info("verify_steps_aside", reason=str(error))
                await anyio.sleep(FIRST_PAUSE_SECONDS * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    async def attempt(
        self, ids: Sequence[int], capture: Callable[[WatchedSource], Captured], *, deep: bool
    ) -> tuple[list[Found], Position]:
        """One attempt; raises ``InTheWay``."""
        settings, stop = self.consumer.settings, threading.Event()
        taken: list[tuple[Position, list[Captured]]] = []
        connection = await to_thread.run_sync(
            open_pass_connection, settings.conninfo, settings.consumer, self.consumer.patience, abandon_on_cancel=True
        )
        refused: list[psycopg.Error] = []

        def take(snapshot: str, position: Position, watched: Sequence[WatchedSource]) -> None:
            try:
                connection.execute(sql.SQL(statement("verify", "begin")).format(snapshot=sql.Literal(snapshot)))
                for each in watched:
                    if not each.is_failed:
                        connection.execute(each.source.lock())
            except psycopg.Error as error:  # of this connection: the pass goes on
                refused.append(error)
            else:
                taken.append((position, [capture(each) for each in watched if not each.is_failed]))

        def compare() -> list[Found]:
            with connection:
                if refused:
                    raise in_the_way() if isinstance(refused[0], pg.LockNotAvailable) else refused[0]
                return [
                    compare_source(connection, each, deep=deep, stop=stop, note=self.note_rows) for each in taken[0][1]
                ]

        comparing = False
        try:
            await self.consumer.hand_over(Handover(frozenset(ids), take))
            comparing = True  # from here on the thread closes it
            with translated_errors(settings.conninfo):
                found = await to_thread.run_sync(compare, abandon_on_cancel=True)
        except BaseException:
            stop.set()
            if not comparing:
                with anyio.CancelScope(shield=True):
                    async with self.consumer.busy:  # the pass under way may be taking it into use
                        connection.close()
            raise
        return found, taken[0][0]

    def note_rows(self, rows: int) -> None:
        """A comparison goes on."""
        self.compared = (self.compared or 0) + rows

    async def mend(self, found: Found, *, deep: bool) -> Found:
        """Have the rows that differ read again, and compare them once more. Costs as much as the difference."""
        consumer, source_id = self.consumer, found.report.source.id
        async with consumer.busy:
            watched = consumer.sources.get(source_id)
            if watched is None:
                return found
            if len(found.differing) > SCAN_FROM_KEYS:
                watched.begin_scan(reason="drift")
            else:
                watched.reread |= {str(key) for key in found.differing}

        def captured(each: WatchedSource) -> Captured:
            views = {name: one.index.view for name, one in each.datasets.items()}
            return Captured(each, each.source, views, dict(each.quarantine), keys=found.differing)

        again, _ = await self.at_one_snapshot([source_id], captured, deep=deep)
        left = {row.dataset for each in again for row in each.datasets if not row.in_sync}
        mended = [
            row
            if row.in_sync
            else replace(
                row, repaired=row.missing + row.extra + row.stale, in_sync=bool(again) and row.dataset not in left
            )
            for row in found.datasets
        ]
        for row in mended:
            if row.repaired:
                consumer.registry.counters.mended(row.dataset, row.repaired)
                logger.warning("drift_repaired", dataset=row.dataset, keys=row.repaired, in_sync=row.in_sync)
        return replace_datasets(found, mended)

    def remember(self, found: Sequence[Found]) -> None:
        """For whoever asks how a dataset is."""
        now = datetime.now(UTC)
        compared = [each for each in found if each.report.outcome != "failed"]
        self.last.update({row.dataset: (now, row.in_sync) for each in compared for row in each.datasets})

    def note(self, found: Sequence[Found]) -> None:
        """Log what a comparison came to, and remember it."""
        self.remember(found)
        differing = [row for each in found for row in each.datasets if row.missing or row.extra or row.stale]
        if differing:
            names = [
                f"{row.dataset} ({row.missing} missing, {row.extra} extra, {row.stale} stale)" for row in differing
            ]
            self.consumer.registry.alerts.add(
                "drift",
                f"indexes differed from their tables: {named(names)}",
                datasets=[
                    {"dataset": row.dataset, "missing": row.missing, "extra": row.extra, "stale": row.stale}
                    for row in differing[:NAMED]
                ],
                count=len(differing),
            )
        for each in found:
            if each.report.outcome == "failed":
                logger.error("verify_failed", source=each.report.source.name, reason=each.report.reason)
        for row in differing:
            self.consumer.registry.counters.drifted(row.dataset, row.missing + row.extra + row.stale)
            logger.error(
                "drift_found", dataset=row.dataset, missing=row.missing, extra=row.extra, stale=row.stale, sample=row.sample
            )  # fmt: skip


def in_the_way() -> InTheWay:
    """The error for who would make others wait."""
    return InTheWay(
        "another session has locked the table, or waits to", hint="verify again when it is done; see pg_stat_activity"
    )


def not_compared(watched: WatchedSource, only: frozenset[DatasetName] | None, reason: str) -> Found:
    """The reports of a source that fails: nothing is known of its datasets, so none is in sync."""
    source = watched.source
    datasets = [
        DatasetReport(name, source, 0, dataset.index.count, 0, 0, 0, 0, [], in_sync=False)
        for name, dataset in watched.datasets.items()
        if only is None or name in only
    ]
    return Found(SourceReport(source, "failed", reason), datasets)


def replace_datasets(found: Found, datasets: list[DatasetReport]) -> Found:
    """The same with other reports of its datasets."""
    return Found(found.report, datasets, found.differing)


def compare_source(
    connection: psycopg.Connection,
    captured: Captured,
    *,
    deep: bool,
    stop: threading.Event,
    note: Callable[[int], None],
) -> Found:
    """Compare one source with its indexes, in a transaction at their snapshot. Blocking; ends early with ``DatabaseError`` at ``stop``."""
    source = captured.source
    comparison = SourceComparison(captured, deep=deep)
    connection.execute(statement("passes", "savepoint"))
    try:
        for rows in batches(connection, captured, deep=deep):
            comparison.feed(rows)
            note(len(rows))
            if stop.is_set():
                raise DatabaseError("the verify was cancelled", hint="start it again")
            if connection.execute(statement("verify", "is_in_the_way")).fetchone() == (True,):
                raise in_the_way()
        datasets, differing = comparison.finish()
        outcome: Literal["compared", "empty", "none_live"] = "compared"
        if captured.keys is None and captured.only is None and not comparison.rows:
            query = sql.SQL(statement("verify", "has_rows")).format(source=source.rows_from)
            row = connection.execute(query).fetchone()
            outcome = "none_live" if row is not None and row[0] else "empty"
    except (psycopg.DataError, psycopg.ProgrammingError, psycopg.InternalError) as error:
        connection.execute(statement("passes", "rollback_to_savepoint"))
        return Found(SourceReport(source, "failed", first_line(error)))
    return Found(SourceReport(source, outcome, comparison.left_out()), datasets, differing)


def batches(connection: psycopg.Connection, captured: Captured, *, deep: bool) -> Iterator[Sequence[Row]]:
    """The table's live rows, some at a time."""
    source = captured.source
    if captured.keys is not None:
        query = source.read_keys(vectors=deep)
        for start in range(0, len(captured.keys), KEYS_PER_READ):
            some = [str(key) for key in captured.keys[start : start + KEYS_PER_READ]]
            cursor = psycopg.RawCursor(connection)
            yield cursor.execute(query, [source.key_array(some)], prepare=source.prepare, binary=True).fetchall()
        return
    only = None if captured.only is None else sorted(captured.only)
    with psycopg.RawServerCursor(connection, "syncd_verify") as scan:
        scan.execute(source.read_all(only, vectors=deep, failing=captured.failing), binary=True)
        while rows := scan.fetchmany(ROWS_PER_DEEP_FETCH if deep else ROWS_PER_FETCH):
            yield rows


class SourceComparison:
    """The rows of one source's table against its datasets' views."""

    def __init__(self, captured: Captured, *, deep: bool) -> None:
        self.captured = captured
        self.deep = deep
        self.rows = 0
        self.by_name = {name: Comparison(view) for name, view in captured.views.items()}
        self.unindexed: dict[DatasetName, list[Key]] = {}
        """Rows of datasets that are not there."""
        self.quarantined: dict[DatasetName, int] = {}
        self.seen: set[Key] = set()

    def feed(self, rows: Sequence[Row]) -> None:
        """Some rows of the table, each once."""
        self.rows += len(rows)
        keys = self.captured.source.parse_keys([row[0] for row in rows])
        if self.captured.keys is not None:
            self.seen.update(keys)
        places: dict[tuple[str | None, str | None], list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault((row[1], row[2]), []).append(place)
        for (project, dataset), at in places.items():
            name = DatasetName("") if project is None or dataset is None else dataset_name(project, dataset)
            self.feed_dataset(name, [keys[place] for place in at], [rows[place] for place in at])

    def feed_dataset(self, name: DatasetName, keys: list[Key], rows: list[Row]) -> None:
        """Rows of one dataset. One in quarantine is accounted for, as long as it is still the row that was put there."""
        comparison, quarantine = self.by_name.get(name), self.captured.quarantine
        if quarantine:
            there = [quarantine.get(key) for key in keys]
            absent = [
                keys[place] for place, row in enumerate(there) if row is not None and row.fingerprint == rows[place][4]
            ]
            if absent:
                self.quarantined[name] = self.quarantined.get(name, 0) + len(absent)
                if comparison is not None:
                    comparison.absent(absent)
                left = set(keys).difference(absent)
                places = [place for place, key in enumerate(keys) if key in left]
                keys, rows = [keys[place] for place in places], [rows[place] for place in places]
        if not keys:
            return
        if comparison is None:
            self.unindexed.setdefault(name, []).extend(keys)
            return
        prints = np.fromiter((row[4] for row in rows), dtype=np.int64, count=len(rows))
        if not self.deep:
            comparison.rows(keys, prints)
            return
        decoded = decode_vectors(self.captured.source.vector_type, [row[3] for row in rows])
        for block in decoded.blocks:
            places = block.rows.tolist()
            comparison.deep(
                [keys[place] for place in places], block.vectors, prints[places], [rows[place][5] for place in places]
            )
        bad = [place for place, _ in decoded.bad]
        comparison.rows([keys[place] for place in bad], prints[bad])

    def finish(self) -> tuple[list[DatasetReport], list[Key]]:
        """The reports, and all keys that differ."""
        reports, differing = [], []
        for name, comparison in self.by_name.items():
            if self.captured.keys is None:
                extra = comparison.extra()
            else:  # what was asked for and is in no table
                gone = [key for key in self.captured.keys if key not in self.seen]
                extra = [key for key, there in zip(gone, comparison.view.contains(gone), strict=True) if there]
            reports.append(self.report(name, comparison, extra))
            differing += [*comparison.missing, *comparison.stale, *extra]
        for name, keys in self.unindexed.items():
            reports.append(
                DatasetReport(
                    name, self.captured.source, len(keys), 0, len(keys), 0, 0, 0, keys[:SAMPLE_KEYS], in_sync=False
                )
            )
            differing += keys
        return reports, differing

    def left_out(self) -> str:
        """In words, the rows that are in quarantine and in none of the source's datasets."""
        rows = sum(count for name, count in self.quarantined.items() if name not in self.by_name)
        return f"{rows} live rows are in quarantine, and in none of its datasets" if rows else ""

    def report(self, name: DatasetName, comparison: Comparison, extra: Sequence[Key]) -> DatasetReport:
        """One dataset's."""
        missing, stale = comparison.missing, comparison.stale
        return DatasetReport(
            name,
            self.captured.source,
            rows=comparison.rows_seen,
            indexed=comparison.view.live_count,
            missing=len(missing),
            extra=len(extra),
            stale=len(stale),
            quarantined=self.quarantined.get(name, 0),
            sample=[*missing, *stale, *extra][:SAMPLE_KEYS],
            in_sync=not (missing or extra or stale),
        )
