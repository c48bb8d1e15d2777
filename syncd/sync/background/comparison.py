"""The comparison of one source's table with its indexes at one snapshot.

A difference that it finds is real, never a change that was under way. The table is read in a
transaction that imported the snapshot at which the indexes were captured.

Rows are compared by fingerprint; a deep comparison also compares vectors and attached columns. A
live row that is not indexed may be in quarantine, if it is still the row that was put there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import psycopg
import structlog

from syncd.errors import DatabaseError, SyncdError
from syncd.index.comparison import Comparison
from syncd.index.view import View
from syncd.postgres.connection import first_line
from syncd.postgres.source import Source
from syncd.postgres.vectors import decode_vectors
from syncd.statements import filled, statement
from syncd.supervision import describe
from syncd.sync.consumer.bringing import KEYS_PER_READ
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.quarantined import Quarantined
from syncd.sync.source.rows import NULL_KEY, Rows, at
from syncd.types import DatasetName, Key, dataset_name

ROWS_PER_FETCH = 10_000
ROWS_PER_DEEP_FETCH = 500
"""Rows per fetch of a deep comparison, which also reads vectors."""
SAMPLE_KEYS = 10
"""Number of differing keys that a report shows."""

logger = structlog.get_logger()


class InTheWay(DatabaseError):
    """Another session waits for a lock that this verify holds, or holds one that it needs."""


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """The comparison of one dataset: live ``rows``, ``indexed`` rows, numbers of differing keys.

    The numbers are those before any repair.
    """

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
    """The comparison of one source: whether there were rows to compare.

    ``reason`` says why it ``failed``, or else which rows are in none of its datasets.
    """

    source: Source
    outcome: Literal["compared", "empty", "none_live", "failed"]
    reason: str = ""


@dataclass(slots=True)
class Captured:
    """One source and its indexes after a pass.

    ``keys`` limits the comparison to these keys, ``only`` to these datasets.
    """

    source: Source
    views: dict[DatasetName, View]
    quarantine: Mapping[Key, Quarantined]
    failing: Sequence[Key] = ()
    only: frozenset[DatasetName] | None = None
    keys: Sequence[Key] | None = None


@dataclass(slots=True)
class Found:
    """The result of the comparison of one source."""

    report: SourceReport
    datasets: list[DatasetReport] = field(default_factory=list)
    differing: list[Key] = field(default_factory=list)


def in_the_way() -> InTheWay:
    """The error for a verify that makes other sessions wait."""
    return InTheWay(
        "another session has locked the table, or waits for a lock on it",
        hint="verify again when that session is done; see pg_stat_activity",
    )


def not_in_step(seconds: float) -> DatabaseError:
    """The error for sources that are read or behind for longer than a verify waits."""
    return DatabaseError(
        f"it was not in step with its table within {seconds:.0f} s",
        hint="watch it with: syncd status --watch",
    )


def not_compared(
    followed: FollowedSource, only: frozenset[DatasetName] | None, reason: str
) -> Found:
    """The result for a source that fails: none of its datasets counts as in sync."""
    source = followed.source
    datasets = [
        DatasetReport(name, source, 0, dataset.index.count, 0, 0, 0, 0, [], in_sync=False)
        for name, dataset in list(followed.datasets.items())
        if only is None or name in only
    ]
    return Found(SourceReport(source, "failed", reason), datasets)


def compare_or_fail(
    connection: psycopg.Connection,
    captured: Captured,
    *,
    deep: bool,
    stop: threading.Event,
    note: Callable[[int], None],
) -> Found:
    """``compare_source``; an unexpected error fails this source only."""
    try:
        return compare_source(connection, captured, deep=deep, stop=stop, note=note)
    except (psycopg.Error, SyncdError):
        raise
    except Exception as error:
        logger.exception("comparison_failed", source=captured.source.name)
        reason = f"unexpected {describe(error)}; see the log of syncd serve"
        return Found(SourceReport(captured.source, "failed", reason))


def compare_source(
    connection: psycopg.Connection,
    captured: Captured,
    *,
    deep: bool,
    stop: threading.Event,
    note: Callable[[int], None],
) -> Found:
    """Compare one source with its indexes, in a transaction at their snapshot.

    It blocks. It raises ``DatabaseError`` when ``stop`` is set.
    """
    source = captured.source
    comparison = SourceComparison(captured, deep=deep)
    connection.execute(statement("passes", "savepoint"))
    try:
        with contextlib.closing(read_ahead(batches(connection, captured, deep=deep))) as read:
            for rows in read:
                comparison.feed(rows)
                note(len(rows))
                if stop.is_set():
                    raise DatabaseError("the verify was cancelled", hint="start it again")
        datasets, differing = comparison.finish()
        outcome: Literal["compared", "empty", "none_live"] = "compared"
        if captured.keys is None and captured.only is None and not comparison.rows:
            query = filled("verify", "has_rows", source=source.rows_from, mine=source.mine)
            row = connection.execute(query).fetchone()
            outcome = "none_live" if row is not None and row[0] else "empty"
    except (psycopg.DataError, psycopg.ProgrammingError, psycopg.InternalError) as error:
        connection.execute(statement("passes", "rollback_to_savepoint"))
        return Found(SourceReport(source, "failed", first_line(error)))
    return Found(SourceReport(source, outcome, comparison.left_out()), datasets, differing)


def read_ahead(batches: Generator[Rows]) -> Generator[Rows]:
    """The same batches; each is read in a thread while the caller compares the previous one.

    When the caller stops, the thread has ended and the connection is free again.
    """
    with contextlib.closing(batches), ThreadPoolExecutor(1, "syncd-verify") as thread:
        coming = thread.submit(next, batches, None)
        while (rows := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield rows


def batches(connection: psycopg.Connection, captured: Captured, *, deep: bool) -> Generator[Rows]:
    """The table's live rows, in batches; raises ``InTheWay`` if another session waits for us."""
    for rows in read_batches(connection, captured, deep=deep):
        if connection.execute(statement("verify", "is_in_the_way")).fetchone() == (True,):
            raise in_the_way()
        yield rows


def read_batches(
    connection: psycopg.Connection, captured: Captured, *, deep: bool
) -> Iterator[Rows]:
    """The table's live rows, in batches."""
    source = captured.source
    if captured.keys is not None:
        query = source.read_keys(vectors=deep)
        for start in range(0, len(captured.keys), KEYS_PER_READ):
            some = captured.keys[start : start + KEYS_PER_READ]
            cursor = psycopg.RawCursor(connection)
            found = cursor.execute(query, [source.key_array(some)], prepare=False, binary=True)
            yield Rows.of(found.fetchall())
        return
    only = None if captured.only is None else sorted(captured.only)
    with psycopg.RawServerCursor(connection, "syncd_verify") as scan:
        scan.execute(source.read_all(only, vectors=deep, failing=captured.failing), binary=True)
        while rows := scan.fetchmany(ROWS_PER_DEEP_FETCH if deep else ROWS_PER_FETCH):
            yield Rows.of(rows)


class SourceComparison:
    """Compares rows of one source's table with its datasets' views."""

    def __init__(self, captured: Captured, *, deep: bool) -> None:
        self.captured = captured
        self.deep = deep
        self.rows = 0
        self.by_name = {name: Comparison(view) for name, view in captured.views.items()}
        self.unindexed: dict[DatasetName, list[Key]] = {}
        """Keys of rows whose dataset does not exist."""
        self.quarantined: dict[DatasetName, int] = {}
        self.seen: set[Key] = set()
        if captured.keys is None:
            self.count_unkeyed()

    def count_unkeyed(self) -> None:
        """Count live rows without a key: they are in quarantine, and no comparison reads them."""
        only = self.captured.only
        for row in self.captured.quarantine.values():
            if row.reason == NULL_KEY and (only is None or row.dataset in only):
                self.quarantined[row.dataset] = self.quarantined.get(row.dataset, 0) + 1
                self.rows += 1

    def feed(self, rows: Rows) -> None:
        """Compare some rows of the table; each row is given once."""
        self.rows += len(rows)
        keys = self.captured.source.parse_keys(rows.keys)
        if self.captured.keys is not None:
            self.seen.update(keys)
        for (project, dataset), places in rows.by_dataset().items():
            name = (
                DatasetName("")
                if project is None or dataset is None
                else dataset_name(project, dataset)
            )
            self.feed_dataset(name, keys, rows, places)

    def feed_dataset(
        self, name: DatasetName, keys: Sequence[Key], rows: Rows, places: Sequence[int]
    ) -> None:
        """Compare rows of one dataset; ``places`` are their places among ``keys`` and ``rows``.

        A row in quarantine is accounted for if it is still the row that was put there.
        """
        comparison, quarantine = self.by_name.get(name), self.captured.quarantine
        if quarantine:
            absent = [
                place
                for place in places
                if (row := quarantine.get(keys[place])) is not None
                and row.fingerprint == rows.fingerprints[place]
            ]
            if absent:
                self.quarantined[name] = self.quarantined.get(name, 0) + len(absent)
                if comparison is not None:
                    comparison.absent([keys[place] for place in absent])
                left = set(places).difference(absent)
                places = [place for place in places if place in left]
        if not places:
            return
        keys = at(keys, places)
        if comparison is None:
            self.unindexed.setdefault(name, []).extend(keys)
            return
        prints = np.array(at(rows.fingerprints, places), dtype=np.int64)
        if not self.deep:
            comparison.rows(keys, prints)
            return
        decoded = decode_vectors(self.captured.source.vector_type, at(rows.vectors, places))
        for block in decoded.blocks:
            numbers = block.rows.tolist()
            comparison.deep(
                [keys[number] for number in numbers],
                block.vectors,
                prints[numbers],
                [rows.columns[places[number]] for number in numbers],
            )
        bad = [number for number, _ in decoded.bad]
        comparison.rows([keys[number] for number in bad], prints[bad])

    def finish(self) -> tuple[list[DatasetReport], list[Key]]:
        """The reports, and all keys that differ."""
        reports, differing = [], []
        for name, comparison in self.by_name.items():
            if self.captured.keys is None:
                extra = comparison.extra()
            else:  # keys that were asked for and have no live row
                gone = [key for key in self.captured.keys if key not in self.seen]
                extra = [
                    key
                    for key, there in zip(gone, comparison.view.contains(gone), strict=True)
                    if there
                ]
            reports.append(self.report(name, comparison, extra))
            differing += [*comparison.missing, *comparison.stale, *extra]
        for name, keys in self.unindexed.items():
            reports.append(
                DatasetReport(
                    name,
                    self.captured.source,
                    len(keys),
                    0,
                    len(keys),
                    0,
                    0,
                    0,
                    keys[:SAMPLE_KEYS],
                    in_sync=False,
                )
            )
            differing += keys
        return reports, differing

    def left_out(self) -> str:
        """Text about the rows that are in quarantine and in none of the source's datasets."""
        rows = sum(count for name, count in self.quarantined.items() if name not in self.by_name)
        return f"{rows} live rows are in quarantine, and in none of its datasets" if rows else ""

    def report(
        self, name: DatasetName, comparison: Comparison, extra: Sequence[Key]
    ) -> DatasetReport:
        """The report on one dataset."""
        missing, stale = comparison.missing, comparison.stale
        return DatasetReport(
            name,
            self.captured.source,
            rows=comparison.rows_seen,
            indexed=comparison.view.live.count,
            missing=len(missing),
            extra=len(extra),
            stale=len(stale),
            quarantined=self.quarantined.get(name, 0),
            sample=[*missing, *stale, *extra][:SAMPLE_KEYS],
            in_sync=not (missing or extra or stale),
        )
