"""The verifier: it checks that each index equals its table at one snapshot, and repairs it.

A pass hands over its snapshot and the indexes' views while its transaction is open. A transaction
on another connection imports the snapshot. Views never change, so the comparison takes its time
while passes and searches go on. A difference that it finds is real, never a change under way.

A repair reads only the rows again that differ.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Any

import anyio
import psycopg
import structlog
from anyio import to_thread

from syncd.errors import DatabaseError, NotReady, SyncdError
from syncd.shard import Shard
from syncd.statements import statement
from syncd.sync.background.capturing import Taken, compare, take
from syncd.sync.background.comparison import (
    Captured,
    Found,
    InTheWay,
    in_the_way,
    not_compared,
)
from syncd.sync.background.overdue import Overdue, compared_at, overdue, since
from syncd.sync.background.turns import OthersVerify, pauses, take_turn
from syncd.sync.background.verified import Verified, Work
from syncd.sync.background.verify_results import VerifyResults
from syncd.sync.consumer.cuts import Imported
from syncd.sync.consumer.progress import Progress
from syncd.sync.consumer.session import Session
from syncd.sync.source.followed import FollowedSource
from syncd.types import DatasetName, Position

SOURCES_AT_ONCE = 64
"""Number of sources that one transaction locks; all sessions share the server's lock table."""
SCAN_FROM_KEYS = 200_000
"""Above this many differences, a repair reads the whole source."""
ATTEMPTS = 5
"""Number of attempts if another session waits for a lock."""
FIRST_PAUSE_SECONDS = 1.0
"""Pause after the first of these attempts; it doubles after each."""
IN_STEP_SECONDS = 60.0
"""Longest time that a verify in the background waits until a source is in step.

A source that is read for hours must not delay the others.
"""
CAPTURED_SECONDS = 30.0
"""How long a pass at a leader's snapshot may take, and how long its views wait for the verify."""
ALIVE_SECONDS = 20.0
"""Longest pause while a session with a snapshot waits: the server ends idle ones after 60 s."""
RETRY_SECONDS = 600.0
"""Time until a source that could not be compared in the background is tried again."""

logger = structlog.get_logger()


class Verifier:
    """Verifies on request and in the background, one at a time."""

    def __init__(self, progress: Progress, session: Session) -> None:
        self.progress = progress
        self.session = session
        self.results = VerifyResults(progress)
        self.lock = anyio.Lock()
        self.cut: tuple[Taken, asyncio.TimerHandle] | None = None
        """What was captured at a leader's snapshot and is to be compared."""
        self.work: Work | None = None
        """Progress of the verify under way; None if there is none."""

    @property
    def last_success_at(self) -> datetime | None:
        """Time since which each source was compared, with any result."""
        return compared_at(list(self.progress.sources.values()))

    @property
    def overdue(self) -> Overdue:
        """Whether the last whole verify is too old, with the reason."""
        return overdue(
            self.progress, self.work, self.results.obstacles, self.session.settings.verify_seconds
        )

    async def run(self, interval_seconds: float) -> None:
        """Compare and repair at the start and at each interval, until cancelled; 0 means never.

        A source that could not be compared is tried again soon; the others are not compared again
        with it.
        """
        await self.progress.ready.wait()
        due_at: dict[int, float] = {}
        while interval_seconds:
            now, sources = time.monotonic(), self.progress.sources
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
            self.progress.task_failed("verifier", error, retry_seconds)
            self.results.obstacles |= dict.fromkeys(ids, str(error))
            return frozenset(ids)
        self.progress.registry.tasks.well("verifier")
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
        """Compare some datasets, or all, with their tables.

        ``sources`` are ids: only these sources are compared, as a whole, and the wait for each of
        them is short. Raises ``DatabaseError``, ``UnknownDataset``.
        """
        async with self.lock:
            only = (
                None
                if names is None
                else frozenset(self.progress.registry.known(name).name for name in names)
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
        """Rows of the tables that the verify under way has read; None if there is none."""
        return None if self.work is None else self.work.rows

    @property
    def expected(self) -> int:
        """Approximate number of rows that the verify under way has to read."""
        return 0 if self.work is None else self.work.expected

    def indexed(self, only: frozenset[DatasetName] | None) -> int:
        """Approximate number of rows to compare."""
        known = self.progress.registry.listed()
        return sum(each.index.count for each in known if only is None or each.name in only)

    async def verify_now(
        self, ids: Sequence[int], only: frozenset[DatasetName] | None, *, repair: bool, deep: bool
    ) -> Verified:
        """``verify``, with the lock held. Each group's results are kept if the next group fails."""
        begun = time.monotonic()
        found, position = [], self.progress.oldest_position()
        for start in range(0, len(ids), SOURCES_AT_ONCE):
            some, position = await self.compare_each(
                ids[start : start + SOURCES_AT_ONCE], only, position, deep=deep
            )
            self.results.note(some)
            if repair:
                some = [
                    await self.repair_one(each, deep=deep) if each.differing else each
                    for each in some
                ]
                self.results.remember(some)
            if only is None:
                self.results.note_whole(some)
            found += some
        seconds = time.monotonic() - begun
        self.progress.registry.counters.verify_seconds.observe(seconds)
        datasets = sorted(
            (row for each in found for row in each.datasets), key=lambda row: row.dataset
        )
        return Verified(position, datasets, [each.report for each in found], seconds)

    async def take_cut(self, imported: Imported) -> None:
        """Capture all sources at a leader's snapshot, for ``verify_cut``; raises ``CutFailed``."""
        self.forget_cut()
        taken = await take(
            self.progress,
            self.session,
            list(self.progress.sources),
            partial(captured, None),
            CAPTURED_SECONDS,
            imported,
        )
        self.forget_cut()
        loop = asyncio.get_running_loop()
        self.cut = taken, loop.call_later(CAPTURED_SECONDS, self.forget_cut)

    def forget_cut(self) -> None:
        """Give up what was captured and is not compared yet."""
        if self.cut is not None:
            (taken, timer), self.cut = self.cut, None
            timer.cancel()
            taken.connection.close()

    async def verify_cut(self, snapshot: str, *, deep: bool) -> Verified:
        """Compare what ``take_cut`` has captured. A shard waits for its turn, without a limit.

        Raises ``NotReady`` if it was not captured, or was given up.
        """
        if self.cut is None or str(self.cut[0].position.snapshot) != snapshot:
            raise NotReady(
                "the indexes at this snapshot are not kept for a verify any more",
                hint="run it again: syncd cluster verify",
            )
        (taken, timer), self.cut = self.cut, None
        timer.cancel()
        begun, waits = time.monotonic(), pauses()
        try:
            some = await self.compare_cut(taken, deep=deep)
            for pause in waits:
                if some is not None:
                    break
                await anyio.sleep(min(pause, ALIVE_SECONDS))
                some = await self.compare_cut(taken, deep=deep)
        except BaseException:
            taken.connection.close()
            raise
        assert some is not None  # the pauses never end
        found = self.reported(list(self.progress.sources), None, some)
        self.results.note(found)
        self.results.note_whole(found)
        rows = sorted((row for each in found for row in each.datasets), key=lambda row: row.dataset)
        seconds = time.monotonic() - begun
        return Verified(taken.position, rows, [each.report for each in found], seconds)

    async def compare_cut(self, taken: Taken, *, deep: bool) -> list[Found] | None:
        """Compare what was captured. None: another verify runs here, or two other shards verify.

        A verify takes its turn after the lock, and gives the lock up if it has no turn. Otherwise
        two shards could wait for each other's turn.
        """
        await to_thread.run_sync(step_aside, taken.connection)
        if self.lock.locked():
            return None
        async with self.lock:
            if not await to_thread.run_sync(has_turn, taken.connection, self.session.shard):
                return None
            self.work = Work(self.indexed(None))
            try:
                return await compare(self.session, taken, self.work, deep=deep)
            finally:
                self.work = None

    def sources_of(self, only: frozenset[DatasetName] | None) -> list[int]:
        """The sources that have these datasets."""
        sources = self.progress.sources.values()
        return [
            each.source.id
            for each in sources
            if only is None
            or any(name in each.datasets or name in each.datasets.emptied.names for name in only)
        ]

    async def compare_each(
        self,
        ids: Sequence[int],
        only: frozenset[DatasetName] | None,
        position: Position,
        *,
        deep: bool,
    ) -> tuple[list[Found], Position]:
        """Compare some sources, at one snapshot if possible.

        Otherwise each is compared alone, and one that cannot be compared counts as failed.
        """
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
                if not self.progress.connected:
                    raise
                known = self.progress.sources.get(one)
                some = [] if known is None else [not_compared(known, only, str(error))]
            found += some
        return found, position

    async def compare(
        self, ids: Sequence[int], only: frozenset[DatasetName] | None, *, deep: bool
    ) -> tuple[list[Found], Position]:
        """Compare some sources at one snapshot."""

        async with self.progress.busy:
            sources = self.progress.sources
            for followed in [sources[one] for one in ids if one in sources]:
                followed.reread_failing()
        found, position = await self.at_one_snapshot(ids, partial(captured, only), deep=deep)
        return self.reported(ids, only, found), position

    def reported(
        self, ids: Sequence[int], only: frozenset[DatasetName] | None, found: Sequence[Found]
    ) -> list[Found]:
        """The results of all these sources, also of those that could not be compared."""
        by_id, reports = {each.report.source.id: each for each in found}, []
        for one in ids:
            each, known = by_id.get(one), self.progress.sources.get(one)
            if each is not None and each.report.outcome != "failed":
                reports.append(each)
            elif known is not None:
                reason = (
                    each.report.reason
                    if each is not None
                    else str(known.failure or "it is not being read")
                )
                reports.append(not_compared(known, only, reason))
        return reports

    async def at_one_snapshot(
        self, ids: Sequence[int], capture: Callable[[FollowedSource], Captured], *, deep: bool
    ) -> tuple[list[Found], Position]:
        """Capture some sources in a pass, and compare them with their tables at its snapshot.

        If another session waits for a lock, this one gives up its own and tries again later. A
        shard waits for its turn, without a limit.
        """
        attempt, until_next_try, waits = 0, pauses(), False
        while True:
            try:
                return await self.attempt(ids, capture, deep=deep)
            except OthersVerify as error:
                if not waits:
                    logger.info("verify_waits", reason=error.message)
                waits = True
                await anyio.sleep(next(until_next_try))
            except InTheWay as error:
                attempt += 1
                if attempt == ATTEMPTS:
                    raise
                logger.info("verify_steps_aside", reason=str(error))
                await anyio.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1))

    async def attempt(
        self, ids: Sequence[int], capture: Callable[[FollowedSource], Captured], *, deep: bool
    ) -> tuple[list[Found], Position]:
        """One attempt; raises ``InTheWay``, or ``OthersVerify``."""
        assert self.work is not None
        patience = self.work.patience_seconds
        taken = await take(self.progress, self.session, ids, capture, patience)
        return await compare(self.session, taken, self.work, deep=deep), taken.position

    async def repair_one(self, found: Found, *, deep: bool) -> Found:
        """``repair``. If the rows cannot be compared again now, the next verify checks them."""
        try:
            return await self.repair(found, deep=deep)
        except InTheWay as error:
            logger.warning(
                "drift_not_compared_again", source=found.report.source.name, reason=str(error)
            )
            return found

    async def repair(self, found: Found, *, deep: bool) -> Found:
        """Have the rows that differ read again, and compare them again.

        The cost depends on the number of differences, not on the size of the table.
        """
        progress, source_id = self.progress, found.report.source.id
        async with progress.busy:
            followed = progress.sources.get(source_id)
            if followed is None:
                return found
            if len(found.differing) > SCAN_FROM_KEYS:
                followed.begin_scan(reason="drift")
            else:
                followed.reread |= set(found.differing)

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
                progress.registry.counters.repaired(row.dataset, row.repaired)
                logger.warning(
                    "drift_repaired", dataset=row.dataset, keys=row.repaired, in_sync=row.in_sync
                )
        return replace(found, datasets=repaired)


def step_aside(connection: psycopg.Connection[Any]) -> None:
    """Raise ``InTheWay`` if another session waits for this one. It also keeps the session alive."""
    if connection.execute(statement("verify", "is_in_the_way")).fetchone() == (True,):
        raise in_the_way()


def has_turn(connection: psycopg.Connection[Any], shard: Shard) -> bool:
    """Whether a shard may compare now."""
    try:
        take_turn(connection, shard)
    except OthersVerify:
        return False
    return True


def captured(only: frozenset[DatasetName] | None, each: FollowedSource) -> Captured:
    """What is compared of a source: all datasets, or some of them."""
    views = {
        name: one.index.view for name, one in each.datasets.items() if only is None or name in only
    }
    if only is not None:
        views |= {name: each.empty(name).index.view for name in each.datasets.emptied.names & only}
    return Captured(each.source, views, dict(each.quarantine), each.quarantine.failing, only)
