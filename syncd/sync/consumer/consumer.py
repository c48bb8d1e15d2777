"""The consumer: it follows every source of one database, pass after pass, until it is stopped.

Of several writers at once only one notifies. It may not be the last to commit, or it may roll back,
which cancels its notification. So the consumer does not only wait for notifications: it reads the
outbox's sequence, and while transactions are open that may have written, whether one has ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import anyio
import anyio.lowlevel
import psycopg
import structlog
from anyio import TASK_STATUS_IGNORED, to_thread
from anyio.abc import TaskStatus

from syncd.errors import ConsumerReplaced, DatabaseError
from syncd.postgres.batch import PreparingConnection, ask, named
from syncd.postgres.connection import open_pass_connection, translated
from syncd.postgres.identity import refuse_foreign_rows
from syncd.postgres.listener import backoff_delays
from syncd.postgres.source import GUESSED_KEYS
from syncd.statements import statement
from syncd.store.manifest import Manifest
from syncd.sync.consumer.at_cut import PassAtCut
from syncd.sync.consumer.attached import follow_attached
from syncd.sync.consumer.connecting import Connecting
from syncd.sync.consumer.cuts import CutFailed, Imported
from syncd.sync.consumer.outcome import PassOutcome
from syncd.sync.consumer.pace import OPEN_WRITER_DELAYS_SECONDS, floor_seconds
from syncd.sync.consumer.passes import Pass
from syncd.sync.consumer.session import Session
from syncd.sync.registry.datasets import Registry
from syncd.types import Position

HANGS_SECONDS = 5.0
"""Longest time beyond the poll interval without a pass.

After that the server counts as out of reach, even if the connection is not closed.
"""
WAITER_POLL_SECONDS = 0.02
"""Longest sleep while a request waits for a position."""
FOREIGN_ROWS_SECONDS = 5.0
"""Time between two checks whether a subscription writes syncd's own tables."""

logger = structlog.get_logger()


class Consumer(Connecting):
    """The task that takes passes. ``Progress`` is the part of it that other tasks use."""

    def __init__(self, session: Session, registry: Registry, manifest: Manifest | None) -> None:
        super().__init__(session, registry, manifest)
        self.foreign_rows_at = 0.0
        self.passed_outbox_id = 0
        """Last outbox id at the last pass."""
        self.begun_at = 0.0
        """Time when the last pass began."""
        self.listens: Callable[[], bool] = lambda: False
        """Whether there is a connection that gets notifications."""
        self.found_by_look = False
        """Whether the next pass begins because of a look, and not of a notification."""
        self.expects = True
        """Whether the next pass may find changes, and does not only follow the poll."""

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled.

        An error before the first connection ends the start; a connection that is lost later is
        opened again.
        """
        started, delays = False, backoff_delays()
        while True:
            connection: PreparingConnection | None = None
            try:
                connection = await to_thread.run_sync(
                    open_pass_connection,
                    self.session.conninfo,
                    self.session.consumer,
                    self.session.patience,
                    abandon_on_cancel=True,
                )
                async with self.busy:
                    try:
                        await to_thread.run_sync(
                            self.begin, connection, not started, abandon_on_cancel=not started
                        )
                    except anyio.get_cancelled_exc_class():
                        if not started:
                            connection = None  # the abandoned thread may still use it
                        raise
                if not started:
                    task_status.started()
                    started = True
                self.connected, self.lost = True, None
                while True:
                    outcome = await self.next_pass(connection)
                    if self.settled is not connection and not outcome.put_off:
                        self.settled, delays = connection, backoff_delays()
                        self.registry.tasks.well("consumer")
                    if time.monotonic() >= self.foreign_rows_at:  # after a pass: none waits for it
                        await self.session.in_thread(refuse_foreign_rows, connection)
                        self.foreign_rows_at = time.monotonic() + FOREIGN_ROWS_SECONDS
                    if not self.cuts.wanted:
                        await self.rest(connection, outcome)
                    if self.cuts.wanted and not outcome.more and not outcome.put_off:
                        await self.take_cut(connection)
                    elif not outcome.more:
                        await anyio.sleep(self.floor_left())
            except ConsumerReplaced:
                raise
            except Exception as error:
                self.connected = False
                if not started:
                    raise
                delay = next(delays)
                if isinstance(error, psycopg.Error):
                    error = translated(error, self.session.conninfo)
                self.lose(error, delay)
                self.finish_pass()
                await anyio.sleep(delay)
            finally:
                self.connected, self.settled = False, None
                if connection is not None:
                    connection.close()

    async def next_pass(self, connection: PreparingConnection) -> PassOutcome:
        """Clear wake-ups, and only then take a pass, whose snapshot includes their changes."""
        self.wake.clear()
        async with self.busy:
            self.passes_begun += 1
            number = self.passes_begun
            self.begun_at = begun = time.monotonic()
            outcome = await self.session.in_thread(self.look_and_pass, connection)
        self.pace.note_pass(begun, rows=outcome.outbox_rows, by_look=self.found_by_look)
        self.found_by_look = False
        self.note_suspicions(number)
        if outcome.took_snapshot:
            self.passes_done = number
        if outcome.handed_over:
            self.handover = None
            self.handed_over.set()
        self.note_put_off(outcome.put_off)
        if not outcome.put_off:
            self.last_pass_at = time.monotonic()
        self.note_progress()
        self.registry.forget_counts()
        self.cuts.expire()
        self.finish_pass()
        return outcome

    async def take_cut(self, connection: PreparingConnection) -> None:
        """Hold until a leader has taken a snapshot, and bring the indexes to it.

        It counts as no pass, since the snapshot may be older than a request that waits. A pass of
        its own follows at once: it sees what was committed meanwhile, and decides about sleeping.
        """
        imported = await self.cuts.next_import()
        if imported is None:
            return
        failure: BaseException | None = CutFailed("the service stops")
        try:
            async with self.busy:
                outcome = await self.session.in_thread(self.pass_at, connection, imported)
            failure = None
            if outcome.handed_over:
                self.cut_handover, self.cut_handed_over = None, True
        except CutFailed as error:
            failure = error
        except Exception as error:
            failure = error
            raise
        finally:
            self.cuts.end_import(failure)
        self.finish_pass()

    def pass_at(self, connection: PreparingConnection, imported: Imported) -> PassOutcome:
        """One pass at a leader's snapshot, in a worker thread; raises ``CutFailed``."""
        this = self.new_pass(connection, imported)
        this.handover = self.cut_handover
        outcome = this.run(list(self.sources.values()))
        if not outcome.took_snapshot:
            raise CutFailed(outcome.put_off or "the attached tables have changed")
        newest = max(imported.position.outbox_id, self.position.outbox_id)
        self.position = Position(outcome.snapshot, newest)
        self.cuts.keep(self.position, self.sources.values(), imported)
        return outcome

    def new_pass(self, connection: PreparingConnection, imported: Imported | None = None) -> Pass:
        """A pass from the present position."""
        facts = (
            connection,
            self.session.consumer,
            self.session.run_id,
            self.session.incarnation,
            self.position,
            not self.session.notifies,
            self.passed_outbox_id,
            self.handover,
            self.doubts,
            self.prepared,
        )
        if imported is not None:
            return PassAtCut(*facts, shard=self.session.shard, imported=imported)
        return Pass(*facts, shard=self.session.shard)

    def note_put_off(self, reason: str) -> None:
        """Log once that passes are put off, with the reason.

        Meanwhile the indexes answer, and their lag grows.
        """
        before = self.lost.message if self.lost is not None else ""
        if reason and reason != before:
            logger.warning("passes_put_off", reason=reason)
        elif before and not reason:
            logger.info("passes_go_on")
        self.lost = (
            DatabaseError(reason, hint="wait until it is done, or end it; see pg_stat_activity")
            if reason
            else None
        )

    def look_and_pass(self, connection: PreparingConnection) -> PassOutcome:
        """One pass over all sources, in a worker thread."""
        if self.doubts.due:
            (holders,) = ask(connection, named("consumer", "read_doubters"))
            self.doubts.begin_pass(xid for (xid,) in holders)
        if self.registry.freed:
            self.registry.freed = False
            for followed in self.sources.values():
                followed.try_taken_names()
        this = self.new_pass(connection)
        this.guesses, this.expects = self.pace.rows <= GUESSED_KEYS, self.expects
        outcome = this.run(list(self.sources.values()))
        self.expects = not outcome.looks_wait
        outcome.more |= outcome.looks_wait
        if this.history:
            self.history, self.next_xid = this.history, this.next_xid
        if outcome.sources is not None:
            position = Position(outcome.snapshot, self.position.outbox_id)
            follow_attached(self, outcome.sources, position)
        newest = max(
            (followed.cursor.position.outbox_id for followed in self.sources.values()), default=0
        )
        self.position = Position(outcome.snapshot, max(newest, self.position.outbox_id))
        if self.cuts.own_wanted and outcome.took_snapshot:
            self.cuts.keep(self.position, self.sources.values())
        if outcome.put_off:
            self.outbox_moved(connection)
        else:
            written = outcome.newest_outbox_id - self.passed_outbox_id
            self.newest_outbox_id = self.passed_outbox_id = outcome.newest_outbox_id
            self.pace.note_snapshot(outcome.snapshot, all_seen=written == outcome.newer_rows)
        return outcome

    async def rest(self, connection: PreparingConnection, outcome: PassOutcome) -> None:
        """Wait as long as no change can be missed."""
        pace = self.pace
        if self.session.notifies and pace.loaded and not pace.guard_held:
            await self.session.in_thread(self.take_guard, connection)
        elif pace.guard_held and not pace.loaded:
            await self.session.in_thread(self.release_guard, connection)
            return  # another look before sleeping: writers that lost the guard to us do not notify
        if outcome.more:
            await anyio.lowlevel.checkpoint()
        elif pace.loaded:
            with anyio.move_on_after(pace.beat_seconds):  # a client that waits is not kept waiting
                await self.wake.event.wait()
        else:
            await self.sleep(connection)

    def floor_left(self) -> float:
        """Seconds until the next pass of a shard may begin. Requests that wait are delayed too."""
        return max(self.begun_at + floor_seconds(self.session.shard) - time.monotonic(), 0.0)

    async def sleep(self, connection: PreparingConnection) -> None:
        """Wait for a wake-up, for a change that a look finds, or for the poll.

        A writer that lost the guard does not notify. One that won it may have rolled back, which
        cancels its notification. So the outbox's sequence is read, which moves with each write. It
        is also checked whether a transaction has ended that was open at the last snapshot.

        The sequence moves before the commit. A pass between the two would find nothing, and the
        next one would wait for it: so the pass begins at the notification, if that comes soon.
        """
        poll_at = time.monotonic() + self.session.poll_seconds
        while True:
            until = min(poll_at, self.retry_at())
            await self.wake.wait(min(self.sleep_seconds(), max(until - time.monotonic(), 0.0)))
            asked = self.wake.is_set or self.waiters > 0
            if asked or time.monotonic() >= until:
                self.expects = asked
                break
            settled = not self.pace.open and not self.pace.unsettled
            if await self.session.in_thread(self.something_moved, connection):
                if settled and self.listens() and self.pace.hears:
                    await self.wake.wait(OPEN_WRITER_DELAYS_SECONDS[0])
                asked = self.wake.is_set
                break
        self.found_by_look = not asked

    def something_moved(self, connection: PreparingConnection) -> bool:
        """Whether a pass may find changes: a write since the last pass, or the end of a writer."""
        if not self.pace.open and not self.pace.unsettled:
            return self.outbox_moved(connection)
        ((row,),) = ask(connection, named("consumer", "read_open_writers"))
        last_id, doubts, holding, writing = row
        before, self.newest_outbox_id = self.newest_outbox_id, last_id
        due = self.pace.note_writers(holding, writing, self.position.snapshot.xmax)
        return due or (last_id, doubts) != (before, self.doubts.seen)

    def outbox_moved(self, connection: PreparingConnection) -> bool:
        """Whether the outbox was written to since the last pass, or a doubt was noted."""
        ((row,),) = ask(connection, named("consumer", "read_last_outbox_id"))
        before, self.newest_outbox_id = self.newest_outbox_id, row[0]
        return row != (before, self.doubts.seen)

    def take_guard(self, connection: PreparingConnection) -> None:
        """Hold the guard under load, unless another consumer may be asleep."""
        row = connection.execute(
            statement("consumer", "take_guard"), [self.session.consumer]
        ).fetchone()
        self.pace.guard_held = row == (True,)

    def release_guard(self, connection: PreparingConnection) -> None:
        """Let writers notify again."""
        connection.execute(statement("consumer", "release_guard"))
        self.pace.guard_held = False
        self.pace.loaded_passes = 0

    @property
    def hangs_seconds(self) -> float:
        """See ``Progress``: an open connection proves nothing."""
        return self.session.poll_seconds + HANGS_SECONDS

    def sleep_seconds(self) -> float:
        """Longest time to wait for a wake-up."""
        now = time.monotonic()
        delay = self.pace.sleep_seconds(self.session.poll_seconds, listens=self.listens())
        if self.waiters:
            delay = min(delay, WAITER_POLL_SECONDS)
        return min(delay, max(self.retry_at() - now, 0.005))

    def retry_at(self) -> float:
        """Time when the first of the sources that the last pass left out is tried again."""
        later = [each.retry_at for each in self.sources.values() if each.retry_at > self.begun_at]
        return min(later, default=math.inf)
