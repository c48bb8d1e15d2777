"""Verify: is every index equal to its table at one snapshot? And repair: read again just the rows that are not.

A pass hands over its snapshot and the indexes' views while its transaction is open; a transaction on another connection imports the snapshot.
Views never change, so the comparison runs as long as it needs while passes and searches go on, and whatever it finds is a difference, never a
change that was under way.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

import anyio
import structlog
from anyio import to_thread
from psycopg import errors as pg
from psycopg import sql

from syncd.errors import DatabaseError, SyncdError
from syncd.postgres import session
from syncd.postgres.connection import open_pass_connection, translated_errors
from syncd.statements import filled
from syncd.sync.background.comparison import (
    Captured,
    Found,
    InTheWay,
    compare_or_fail,
    in_the_way,
    not_compared,
    not_in_step,
)
from syncd.sync.background.overdue import Overdue, compared_at, overdue, since
from syncd.sync.background.verified import Verified, Work
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.consumer.outcome import Handover
from syncd.sync.registry.alerts import NAMED, named
from syncd.sync.source.followed import FollowedSource
from syncd.types import DatasetName, Position

SOURCES_AT_ONCE = 64
"""Each is locked in one transaction, and the server's lock table is everybody's."""
SCAN_FROM_KEYS = 200_000
"""So many differences are repaired by reading the whole source."""
ATTEMPTS = 5
FIRST_PAUSE_SECONDS = 1.0
IN_STEP_SECONDS = 60.0
"""How long a verify in the background waits until a source is in step; one that is being read for hours must not keep the others waiting."""
RETRY_SECONDS = 600.0
"""Until a source that could not be compared in the background is tried again."""

logger = structlog.get_logger()


class Verifier:
    """Verifies on request and in the background, one at a time."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.lock = anyio.Lock()
        self.last: dict[DatasetName, tuple[datetime, bool]] = {}
        """When each dataset was last compared, and whether it is in sync since then, as far as is known."""
        self.work: Work | None = None
        """Of the verify under way."""
        self.obstacles: dict[int, str] = {}
        """Why sources could not be compared at the last attempt, by id."""

    @property
    def last_success_at(self) -> datetime | None:
        """Since when every source has been compared, whatever that showed."""
        return compared_at(list(self.consumer.sources.values()))

    @property
    def overdue(self) -> Overdue:
        """Whether the last whole verify is too old, and why."""
        return overdue(
            self.consumer, self.work, self.obstacles, self.consumer.settings.verify_seconds
        )

    async def run(self, interval_seconds: float) -> None:
        """Compare and repair at start and every so often, until cancelled; an interval of 0 means never.

        A source that could not be compared is tried again soon, alone; the others are not compared again for its sake.
        """
        await self.consumer.ready.wait()
        due_at: dict[int, float] = {}
        while interval_seconds:
            now, sources = time.monotonic(), self.consumer.sources
            due_at = {
                one: due_at.get(one, now if not due_at else now + interval_seconds)
                for one in sources
            }
            due = sorted(
                (one for one in due_at if due_at[one] <= now), key=lambda one: since(sources[one])
            )
            if due:
                retry = min(interval_seconds, RETRY_SECONDS)
                left = await self.verify_in_background(due, retry)
                now = time.monotonic()
                due_at |= {one: now + (retry if one in left else interval_seconds) for one in due}
            pause = min(due_at.values(), default=now + interval_seconds) - time.monotonic()
            await anyio.sleep(min(max(pause, 0.0), interval_seconds))

    async def verify_in_background(
        self, ids: Sequence[int], retry_seconds: float
    ) -> frozenset[int]:
        """Verify some sources; returns those that could not be compared."""
        try:
            done = await self.verify(None, repair=True, sources=ids)
        except SyncdError as error:
            logger.warning("verify_failed", error=str(error), hint=error.hint)
            self.consumer.task_failed("verifier", error, retry_seconds)
            self.obstacles |= dict.fromkeys(ids, str(error))
            return frozenset(ids)
        self.consumer.registry.tasks.well("verifier")
        logger.info(
            "verified",
            in_sync=done.in_sync,
            datasets=len(done.datasets),
            seconds=round(done.seconds, 3),
        )
        return frozenset(each.source.id for each in done.sources if each.outcome == "failed")

    async def verify(
        self,
        names: Sequence[DatasetName] | None,
        *,
        repair: bool = False,
        deep: bool = False,
        sources: Sequence[int] | None = None,
    ) -> Verified:
        """Compare some datasets, or all, with their tables; raises ``DatabaseError``, ``UnknownDataset``.

        ``sources``: only the whole of these, and without waiting for long for any of them.
        """
        async with self.lock:
            only = (
                None
                if names is None
                else frozenset(self.consumer.registry.known(name).name for name in names)
            )
            patience = math.inf if sources is None else IN_STEP_SECONDS
            self.work = Work(self.indexed(only), patience_seconds=patience)
            try:
                ids = self.sources_of(only) if sources is None else sources
                return await self.verify_now(ids, only, repair=repair, deep=deep)
            finally:
                self.work = None

    @property
    def compared(self) -> int | None:
        """Rows of the tables that the verify under way has read; None while there is none."""
        return None if self.work is None else self.work.rows

    @property
    def expected(self) -> int:
        """About how many rows the verify under way is to read."""
        return 0 if self.work is None else self.work.expected

    def indexed(self, only: frozenset[DatasetName] | None) -> int:
        """About how many rows there are to compare."""
        known = self.consumer.registry.listed()
        return sum(each.index.count for each in known if only is None or each.name in only)

    async def verify_now(
        self, ids: Sequence[int], only: frozenset[DatasetName] | None, *, repair: bool, deep: bool
    ) -> Verified:
        """``verify``, with the lock held. What one group of sources came to is kept, however the next ends."""
        begun = time.monotonic()
        found, position = [], self.consumer.oldest_position()
        for start in range(0, len(ids), SOURCES_AT_ONCE):
            some, position = await self.compare_each(
                ids[start : start + SOURCES_AT_ONCE], only, position, deep=deep
            )
            self.note(some)
            if repair:
                some = [
                    await self.repair_one(each, deep=deep) if each.differing else each
                    for each in some
                ]
                self.remember(some)
            if only is None:
                self.note_whole(some)
            found += some
        seconds = time.monotonic() - begun
        self.consumer.registry.counters.verify_seconds.observe(seconds)
        datasets = sorted(
            (row for each in found for row in each.datasets), key=lambda row: row.dataset
        )
        return Verified(position, datasets, [each.report for each in found], seconds)

    def sources_of(self, only: frozenset[DatasetName] | None) -> list[int]:
        """The sources that have these datasets."""
        sources = self.consumer.sources.values()
        return [
            each.source.id
            for each in sources
            if only is None
            or any(name in each.datasets or name in each.emptied.names for name in only)
        ]

    async def compare_each(
        self,
        ids: Sequence[int],
        only: frozenset[DatasetName] | None,
        position: Position,
        *,
        deep: bool,
    ) -> tuple[list[Found], Position]:
        """Some sources, at one snapshot if that can be; one that is in the way of the others is left out, and said to have failed."""
        try:
            return await self.compare(ids, only, deep=deep)
        except DatabaseError:
            if len(ids) == 1 and only is not None:
                raise
        found = []
        for one in ids:
            try:
                some, position = await self.compare([one], only, deep=deep)
            except DatabaseError as error:
                if not self.consumer.connected:
                    raise
                known = self.consumer.sources.get(one)
                some = [] if known is None else [not_compared(known, only, str(error))]
            found += some
        return found, position

    async def compare(
        self, ids: Sequence[int], only: frozenset[DatasetName] | None, *, deep: bool
    ) -> tuple[list[Found], Position]:
        """Some sources at one snapshot."""

        def captured(each: FollowedSource) -> Captured:
            views = {
                name: one.index.view
                for name, one in each.datasets.items()
                if only is None or name in only
            }
            if only is not None:
                views |= {name: each.empty(name).index.view for name in each.emptied.names & only}
            return Captured(
                each.source, views, dict(each.quarantine), each.quarantine.failing, only
            )

        async with self.consumer.busy:
            sources = self.consumer.sources
            for followed in [sources[one] for one in ids if one in sources]:
                followed.reread_failing()
        found, position = await self.at_one_snapshot(ids, captured, deep=deep)
        by_id, reports = {each.report.source.id: each for each in found}, []
        for one in ids:
            each, known = by_id.get(one), self.consumer.sources.get(one)
            if each is not None and each.report.outcome != "failed":
                reports.append(each)
            elif known is not None:
                reason = (
                    each.report.reason
                    if each is not None
                    else str(known.failure or "it is not being read")
                )
                reports.append(not_compared(known, only, reason))
        return reports, position

    async def at_one_snapshot(
        self, ids: Sequence[int], capture: Callable[[FollowedSource], Captured], *, deep: bool
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
        self, ids: Sequence[int], capture: Callable[[FollowedSource], Captured], *, deep: bool
    ) -> tuple[list[Found], Position]:
        """One attempt; raises ``InTheWay``."""
        settings, stop, work = self.consumer.settings, threading.Event(), self.work
        assert work is not None
        taken: list[tuple[Position, list[Captured]]] = []
        connection = await to_thread.run_sync(
            open_pass_connection,
            settings.conninfo,
            settings.consumer,
            self.consumer.patience,
            abandon_on_cancel=True,
        )
        refused: list[Exception] = []

        def take(snapshot: str, position: Position, sources: Sequence[FollowedSource]) -> None:
            try:
                begin = filled("verify", "begin", snapshot=sql.Literal(snapshot))
                limits = filled("verify", "limits")
                connection.execute(
                    sql.SQL(";\n").join(
                        (begin, sql.SQL(session.service_settings(connection)), limits)
                    )
                )
                for each in sources:
                    if not each.is_failed:
                        connection.execute(each.source.lock())
                taken.append((position, [capture(each) for each in sources if not each.is_failed]))
            except Exception as error:  # noqa: BLE001 - of this verify: the pass goes on
                refused.append(error)

        def compare() -> list[Found]:
            with connection:
                if refused:
                    raise (
                        in_the_way() if isinstance(refused[0], pg.LockNotAvailable) else refused[0]
                    )
                return [
                    compare_or_fail(connection, each, deep=deep, stop=stop, note=work.note)
                    for each in taken[0][1]
                ]

        comparing = False
        try:
            await self.hand_over(Handover(frozenset(ids), take), work.patience_seconds)
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

    async def hand_over(self, handover: Handover, seconds: float) -> None:
        """Return once a pass has called ``handover.take``; raises ``DatabaseError`` where none has brought the sources there in time."""
        with anyio.move_on_after(seconds) as waiting:
            await self.consumer.hand_over(handover)
        if waiting.cancelled_caught:
            raise not_in_step(seconds)

    async def repair_one(self, found: Found, *, deep: bool) -> Found:
        """``repair``; where that cannot be compared again now, what was found stands, and the next verify looks again."""
        try:
            return await self.repair(found, deep=deep)
        except InTheWay as error:
            logger.warning(
                "drift_not_compared_again", source=found.report.source.name, reason=str(error)
            )
            return found

    async def repair(self, found: Found, *, deep: bool) -> Found:
        """Have the rows that differ read again, and compare them once more. Costs as much as the difference."""
        consumer, source_id = self.consumer, found.report.source.id
        async with consumer.busy:
            followed = consumer.sources.get(source_id)
            if followed is None:
                return found
            if len(found.differing) > SCAN_FROM_KEYS:
                followed.begin_scan(reason="drift")
            else:
                followed.reread |= {str(key) for key in found.differing}

        def captured(each: FollowedSource) -> Captured:
            views = {name: one.index.view for name, one in each.datasets.items()}
            return Captured(each.source, views, dict(each.quarantine), keys=found.differing)

        again, _ = await self.at_one_snapshot([source_id], captured, deep=deep)
        left = {row.dataset for each in again for row in each.datasets if not row.in_sync}
        repaired = [
            row
            if row.in_sync
            else replace(
                row,
                repaired=row.missing + row.extra + row.stale,
                in_sync=bool(again) and row.dataset not in left,
            )
            for row in found.datasets
        ]
        for row in repaired:
            if row.repaired:
                consumer.registry.counters.repaired(row.dataset, row.repaired)
                logger.warning(
                    "drift_repaired", dataset=row.dataset, keys=row.repaired, in_sync=row.in_sync
                )
        return replace(found, datasets=repaired)

    def remember(self, found: Sequence[Found]) -> None:
        """For whoever asks how a dataset is."""
        now = datetime.now(UTC)
        compared = [each for each in found if each.report.outcome != "failed"]
        self.last.update(
            {row.dataset: (now, row.in_sync) for each in compared for row in each.datasets}
        )
        known = self.consumer.registry.by_name
        self.last = {name: found for name, found in self.last.items() if name in known}

    def note_whole(self, found: Sequence[Found]) -> None:
        """Sources were compared as a whole, or could not be."""
        for each in found:
            source = each.report.source
            if each.report.outcome == "failed":
                self.obstacles[source.id] = each.report.reason
                continue
            self.obstacles.pop(source.id, None)
            followed = self.consumer.sources.get(source.id)
            if followed is not None:
                followed.compared_at = datetime.now(UTC)

    def note(self, found: Sequence[Found]) -> None:
        """Log what a comparison came to, and remember it."""
        self.remember(found)
        differing = [
            row for each in found for row in each.datasets if row.missing or row.extra or row.stale
        ]
        if differing:
            names = [
                f"{row.dataset} ({row.missing} missing, {row.extra} extra, {row.stale} stale)"
                for row in differing
            ]
            self.consumer.registry.alerts.add(
                "drift",
                f"indexes differed from their tables: {named(names)}",
                datasets=[
                    {
                        "dataset": row.dataset,
                        "missing": row.missing,
                        "extra": row.extra,
                        "stale": row.stale,
                    }
                    for row in differing[:NAMED]
                ],
                count=len(differing),
            )
        for each in found:
            if each.report.outcome == "failed":
                logger.error(
                    "verify_failed", source=each.report.source.name, reason=each.report.reason
                )
        for row in differing:
            self.consumer.registry.counters.drifted(
                row.dataset, row.missing + row.extra + row.stale
            )
            logger.error(
                "drift_found",
                dataset=row.dataset,
                missing=row.missing,
                extra=row.extra,
                stale=row.stale,
                sample=row.sample,
            )
