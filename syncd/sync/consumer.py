"""The consumer: follows every source of one database, pass after pass, until it is stopped.

It sleeps only after the server has said that nobody who wrote to the outbox is still open: of several writers at once only one notifies,
and it may not be the last to commit, or may roll back and take its notification with it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TypeVar, TypeVarTuple

import anyio
import anyio.lowlevel
import psycopg
import structlog
from anyio import TASK_STATUS_IGNORED, to_thread
from anyio.abc import TaskStatus

from syncd.errors import ConsumerReplaced, DatabaseError, DatabaseUnreachable, TimedOut
from syncd.postgres.connection import first_line, open_pass_connection, translated_errors
from syncd.postgres.freeing import apply_cap
from syncd.postgres.identity import (
    Nonce,
    check_server,
    has_nonce,
    keep_name,
    notifies,
    read_incarnation,
    read_registry,
    take_name,
)
from syncd.postgres.listener import backoff_delays
from syncd.postgres.outbox import Cursor
from syncd.postgres.schema import store_settings
from syncd.postgres.source import Source, read_fingerprint_probe
from syncd.settings import Settings
from syncd.statements import statement
from syncd.store.manifest import Manifest
from syncd.sync.datasets import ANSWERING, Follower, Registry, State
from syncd.sync.loading import load_source
from syncd.sync.pace import Pace
from syncd.sync.passes import NO_LONGER_HELD, Handover, Pass, PassOutcome, alert_of_rebuild
from syncd.sync.wake import Wake
from syncd.sync.watched import WatchedSource
from syncd.types import DatasetName, Position, Snapshot

POLL_SECONDS = 1.0
POLL_SECONDS_WITHOUT_NOTIFY = 0.02
WAITER_POLL_SECONDS = 0.02
PEEK_SECONDS = 0.1

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")

logger = structlog.get_logger()
NOWHERE = Position(Snapshot(0, 0, frozenset()), 0)


class Consumer:
    """See the module. ``sources`` and everything below them are changed by the task in ``run`` alone, while it holds ``busy``."""

    def __init__(self, settings: Settings, run_id: str, registry: Registry, manifest: Manifest | None) -> None:
        self.settings = settings
        self.run_id = run_id
        self.registry = registry
        self.manifest = manifest
        self.wake = Wake()
        self.busy = anyio.Lock()
        self.one_thread = anyio.CapacityLimiter(1)
        self.sources: dict[int, WatchedSource] = {}
        self.position = NOWHERE
        self.incarnation = ""
        self.fingerprint_probe = 0
        self.name_since: datetime | None = None
        self.nonce: Nonce | None = None
        self.notifies = True
        self.connected = False
        self.settled: psycopg.Connection | None = None
        """The connection, once a pass on it has brought the indexes to what its server has."""
        self.ready = anyio.Event()
        self.waiters = 0
        self.passes_begun = 0
        self.passes_done = 0
        self.pass_done = anyio.Event()
        self.last_pass_at = time.monotonic()
        self.newest_outbox_id = 0
        self.handover: Handover | None = None
        self.handed_over = anyio.Event()
        self.pace = Pace()

    async def run(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Follow until cancelled. Errors before the first connection stop the start; a lost connection later is opened again."""
        started, delays = False, backoff_delays()
        while True:
            connection: psycopg.Connection | None = None
            try:
                settings = self.settings
                connection = await to_thread.run_sync(
                    open_pass_connection, settings.conninfo, settings.consumer, abandon_on_cancel=not started
                )
                async with self.busy:
                    await to_thread.run_sync(self.begin, connection, not started, abandon_on_cancel=not started)
                if not started:
                    task_status.started()
                    started = True
                delays = backoff_delays()
                self.connected = True
                while True:
                    outcome = await self.next_pass(connection)
                    self.settled = connection
                    await self.rest(connection, outcome)
            except ConsumerReplaced:
                raise
            except (psycopg.Error, DatabaseError) as error:
                self.connected = False
                if not started:
                    raise
                delay = next(delays)
                logger.warning("database_lost", retry_in_seconds=delay, error=first_line(error))
                self.finish_pass()
                await anyio.sleep(delay)
            finally:
                self.connected, self.settled = False, None
                if connection is not None:
                    connection.close()

    async def in_thread(self, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Run what blocks in a worker thread; only ever one at a time, since there is one connection."""
        return await to_thread.run_sync(work, *arguments, limiter=self.one_thread)

    def begin(self, connection: psycopg.Connection, first: bool) -> None:
        """After every connect: is this the database that the indexes stand for? If in doubt, compare everything with it."""
        with translated_errors(self.settings.conninfo):
            self.take_up(connection, first)

    def take_up(self, connection: psycopg.Connection, first: bool) -> None:
        """``begin``, with the driver's own errors."""
        self.pace = Pace()  # a new session holds no guard
        prepared_transactions = check_server(connection)
        incarnation = read_incarnation(connection)
        must_rebuild = False
        if first:
            store_settings(connection, self.settings)
            apply_cap(connection)
            must_rebuild, self.name_since = take_name(connection, self.settings, self.run_id)
        elif self.name_since is not None:
            keep_name(connection, self.settings, self.run_id, self.name_since)
        self.notifies = notifies(connection, prepared_transactions)
        if self.notifies:  # a connection of our own; behind a pooler every pass brings its settings along
            connection.execute(statement("passes", "session_settings"))
        else:
            connection.prepare_threshold = None
        position, sources, freed = read_registry(connection)
        probe, self.fingerprint_probe = self.fingerprint_probe, read_fingerprint_probe(connection)
        if first:
            self.load(connection, incarnation, position, sources, freed, must_rebuild)
        else:
            self.resume(connection, incarnation, position, same_fingerprints=probe == self.fingerprint_probe)
            self.follow_registry(sources, position)
        self.incarnation = incarnation
        self.position = position

    def load(
        self,
        connection: psycopg.Connection,
        incarnation: str,
        position: Position,
        sources: Sequence[Source],
        freed: Snapshot | None,
        must_rebuild: bool,
    ) -> None:
        """Take the checkpoint as far as it can be trusted, and read from Postgres what it does not give."""
        manifest, doubt = self.manifest, "there is no checkpoint"
        if manifest is not None:
            nonce = Nonce(manifest.nonce, manifest.nonce_xid)
            if manifest.incarnation != incarnation or manifest.consumer != self.settings.consumer:
                doubt = "the checkpoint was made with another database or consumer"
            elif manifest.fingerprint_probe != self.fingerprint_probe:
                doubt = "this server computes other fingerprints"
            elif not has_nonce(connection, nonce):
                doubt = "the database does not hold the checkpoint's nonce"
            else:
                doubt, self.nonce = "", nonce
        saved_sources = {saved.id: saved for saved in manifest.sources} if manifest is not None else {}
        for source in sources:
            saved = saved_sources.get(source.id)
            if saved is not None and (saved.oid != source.oid or saved.arguments_md5 != source.arguments_md5):
                saved = None
            lost = must_rebuild or (saved is not None and not doubt and Snapshot.parse(saved.snapshot).lacks(freed))
            why = NO_LONGER_HELD if lost else doubt
            self.sources[source.id] = load_source(source, self.registry, saved, position, doubt=why, lost=lost)
        lacking = [each for each in self.sources.values() if each.must_rebuild]
        if lacking:
            alert_of_rebuild(self.registry, lacking)

    def resume(
        self, connection: psycopg.Connection, incarnation: str, position: Position, *, same_fingerprints: bool
    ) -> None:
        """After a lost connection: the server may have crashed and lost commits that were not flushed, or be another one."""
        trusted = (
            same_fingerprints
            and incarnation == self.incarnation
            and self.nonce is not None
            and has_nonce(connection, self.nonce)
        )
        for watched in self.sources.values():
            if trusted:
                watched.return_to_confirmed()
            else:
                watched.cursor = Cursor(position)
                watched.begin_scan()
        if not trusted:
            logger.warning("reconciling", reason="the database does not hold this run's last checkpoint")

    def follow_registry(self, sources: Sequence[Source], position: Position) -> None:
        """Take up what was attached and let go of what was detached, as of ``position``."""
        attached = {source.id: source for source in sources}
        gone = {
            source_id: watched
            for source_id, watched in self.sources.items()
            if source_id not in attached or not watched.source.is_same(attached[source_id])
        }
        by_oid = {watched.source.oid: watched for watched in gone.values()}
        for source_id in gone:
            del self.sources[source_id]
        for source in sources:
            if source.id in self.sources:
                self.sources[source.id].rename(source)
                continue
            before = by_oid.pop(source.oid, None)
            watched = WatchedSource(source, self.registry, Cursor(position))
            watched.begin_scan()
            self.sources[source.id] = watched
            watched.replaces(before)
            logger.info("source_attached" if before is None else "source_altered", source=source.name)
        for watched in by_oid.values():
            watched.stop()
            logger.info("source_detached", source=watched.source.name)

    async def next_pass(self, connection: psycopg.Connection) -> PassOutcome:
        """Drain wake-ups, see who is still writing, and only then take the snapshot."""
        self.wake.clear()
        async with self.busy:
            self.passes_begun += 1
            number = self.passes_begun
            begun = time.monotonic()
            outcome = await self.in_thread(self.look_and_pass, connection)
        self.pace.note_pass(begun, rows=outcome.outbox_rows)
        if outcome.took_snapshot:
            self.passes_done = number
        if outcome.handed_over:
            self.handover = None
            self.handed_over.set()
        self.last_pass_at = time.monotonic()
        self.note_progress()
        self.finish_pass()
        return outcome

    def look_and_pass(self, connection: psycopg.Connection) -> PassOutcome:
        """One pass over all sources, in a worker thread."""
        row = connection.execute(statement("consumer", "read_open_writers"), prepare=self.notifies).fetchone()
        self.pace.note_writers(frozenset(row[0]) if row else frozenset())
        if self.registry.freed:
            self.registry.freed = False
            for watched in self.sources.values():
                watched.try_taken_names()
        this = Pass(connection, self.settings.consumer, self.run_id, self.position, not self.notifies, self.handover)
        outcome = this.run(list(self.sources.values()))
        if outcome.sources is not None:
            self.follow_registry(outcome.sources, Position(outcome.snapshot, self.position.outbox_id))
        newest = max((watched.cursor.position.outbox_id for watched in self.sources.values()), default=0)
        self.position = Position(outcome.snapshot, max(newest, self.position.outbox_id))
        self.newest_outbox_id = outcome.newest_outbox_id
        return outcome

    def note_progress(self) -> None:
        """See which sources have been read, and say once when all have been, or have failed."""
        pending = {
            watched.source.name: watched.failure or "it is being read"
            for watched in self.sources.values()
            if watched.reading or watched.failure is not None or not watched.was_ready
        }
        self.registry.pending = pending
        if all(watched.was_ready or watched.failure is not None for watched in self.sources.values()):
            self.ready.set()

    def finish_pass(self) -> None:
        """Let those who wait for a position look at it."""
        done, self.pass_done = self.pass_done, anyio.Event()
        done.set()

    async def rest(self, connection: psycopg.Connection, outcome: PassOutcome) -> None:
        """Wait for as long as nothing can be missed."""
        pace = self.pace
        if self.notifies and pace.loaded and not pace.guard_held:
            await self.in_thread(self.take_guard, connection)
        elif pace.guard_held and not pace.loaded:
            await self.in_thread(self.release_guard, connection)
            return  # look once more before sleeping: who lost the guard to us has notified nobody
        if outcome.more:
            await anyio.lowlevel.checkpoint()
        elif pace.loaded:
            await anyio.sleep(pace.beat_seconds)
        else:
            await self.sleep(connection)

    async def sleep(self, connection: psycopg.Connection) -> None:
        """Until a wake-up or the poll. Meanwhile the outbox' sequence is looked at: it moves with every write, notified or not.

        The writer who won the guard may have rolled back, and its notification with it. A writer who was open at the last look
        may commit without moving the sequence, so the sequence counts only where there was none.
        """
        poll_at = time.monotonic() + self.poll_seconds
        while not self.wake.is_set:
            delay = self.sleep_seconds()
            await self.wake.wait(delay)
            if self.pace.writers or self.waiters or delay < PEEK_SECONDS or time.monotonic() >= poll_at:
                return
            if await self.in_thread(self.outbox_moved, connection):
                return

    def outbox_moved(self, connection: psycopg.Connection) -> bool:
        """Whether anybody has written to the outbox since the last pass, committed or not."""
        row = connection.execute(statement("consumer", "read_last_outbox_id"), prepare=self.notifies).fetchone()
        return row != (self.newest_outbox_id,)

    def take_guard(self, connection: psycopg.Connection) -> None:
        """Hold the guard under load, if no other consumer may be asleep."""
        row = connection.execute(statement("consumer", "take_guard"), [self.settings.consumer]).fetchone()
        self.pace.guard_held = row == (True,)

    def release_guard(self, connection: psycopg.Connection) -> None:
        """Let writers notify again."""
        connection.execute(statement("consumer", "release_guard"))
        self.pace.guard_held = False
        self.pace.loaded_passes = 0

    @property
    def poll_seconds(self) -> float:
        """The longest time between passes."""
        return self.settings.poll_seconds or (POLL_SECONDS if self.notifies else POLL_SECONDS_WITHOUT_NOTIFY)

    def sleep_seconds(self) -> float:
        """How long a wake-up may be waited for."""
        now = time.monotonic()
        delay = self.pace.sleep_seconds(min(self.poll_seconds, PEEK_SECONDS))
        if self.waiters:
            delay = min(delay, WAITER_POLL_SECONDS)
        for watched in self.sources.values():
            if watched.retry_at > now:
                delay = min(delay, max(watched.retry_at - now, 0.005))
        return delay

    async def settled_connection(self, timeout_seconds: float) -> psycopg.Connection:
        """The connection whose server the indexes stand for; raises ``DatabaseUnreachable``."""
        with anyio.move_on_after(timeout_seconds):
            while self.settled is None:
                await self.pass_done.wait()
            return self.settled
        raise DatabaseUnreachable(
            "the database cannot be reached, and without it a checkpoint would prove nothing",
            hint="try again when it is back; the checkpoint before stays",
        )

    def unsettle(self, connection: psycopg.Connection) -> None:
        """A connection turned out to be lost, or not to be fit for a proof: a pass has to show otherwise."""
        if self.settled is connection:
            self.settled = None
        self.wake("request")

    @property
    def changes_wait(self) -> bool:
        """Whether there is more to apply than has been, as far as is known."""
        return not self.connected or any(watched.lags for watched in self.sources.values())

    @property
    def lag_seconds(self) -> float:
        """Since the last completed pass while changes wait or the database cannot be reached, else 0; of the source that is furthest behind.

        A source that failed does not count: it does not answer, and says so.
        """
        if not self.changes_wait:
            return 0.0
        return max(
            [self.behind(), *(self.behind(each) for each in self.sources.values() if each.lags and not each.is_failed)]
        )

    def behind(self, follower: Follower | None = None) -> float:
        """Seconds since the last completed pass, of this source where it is named: passes over the others go on while it is locked."""
        moved_at = None if follower is None else follower.moved_at
        return time.monotonic() - (self.last_pass_at if moved_at is None else min(moved_at, self.last_pass_at))

    @property
    def lag_rows(self) -> int:
        """Outbox rows that wait, at most."""
        oldest = self.oldest_position().outbox_id
        return max(self.newest_outbox_id - oldest, 0) if any(watched.lags for watched in self.sources.values()) else 0

    @property
    def state(self) -> State:
        """The state of the whole."""
        sources = self.sources.values()
        if any(watched.is_failed for watched in sources):
            return "failed"
        if any(watched.must_rebuild for watched in sources):
            return "must_rebuild"
        if any(watched.reading and not watched.was_ready for watched in sources):
            return "backfilling"
        compared = [watched for watched in sources if watched.reading]
        answering = all(dataset.state in ANSWERING for watched in compared for dataset in watched.datasets.values())
        if not self.ready.is_set() or not answering:
            return "catching_up"
        return "rebuilding" if any(watched.scanning for watched in sources) or compared else "ready"

    def oldest_position(self) -> Position:
        """The position that every source has reached. Snapshots of one consumer are taken one after another, so they are in order."""
        positions = [watched.cursor.position for watched in self.sources.values() if watched.source.table is not None]
        return min(positions, key=lambda position: position.snapshot.age(), default=self.position)

    async def rebuild(self, name: DatasetName) -> int:
        """Build a dataset anew beside the one that answers; returns its rows once it has taken the place. Raises ``UnknownDataset``."""
        while True:
            dataset = self.registry.known(name)
            watched = next((each for each in self.sources.values() if each.datasets.get(dataset.name) is dataset), None)
            if watched is not None and watched.scan is None and not watched.is_failed:
                async with self.busy:
                    if watched.scan is None:
                        watched.begin_rebuild(dataset.name)
                replacement = dataset.replacement
                await self.next_pass_until(rebuilt(watched))
                if dataset.index is replacement:
                    return dataset.index.count
            if watched is not None and watched.is_failed:
                raise DatabaseError(f"{watched.source.name} cannot be read: {watched.failure}", hint="see: syncd check")
            await self.next_pass_until(lambda: True)

    async def next_pass_until(self, done: Callable[[], bool]) -> None:
        """Wait for at least one pass, and until one has left things as they are wanted; raises ``DatabaseUnreachable``."""
        self.waiters += 1
        try:
            while True:
                passed = self.pass_done
                self.wake("request")
                await passed.wait()
                if done():
                    return
                if not self.connected:
                    raise DatabaseUnreachable(
                        "the database cannot be reached",
                        hint="see the service's log; ask again when the database is back",
                    )
        finally:
            self.waiters -= 1

    async def hand_over(self, handover: Handover) -> None:
        """Return once a pass has called ``handover.take``. One at a time."""
        self.handover, self.handed_over = handover, anyio.Event()
        try:
            await self.next_pass_until(self.handed_over.is_set)
        finally:
            self.handover = None

    async def wait_for_xid(self, xid: int, timeout_seconds: float, watched: Follower | None = None) -> Position:
        """Return once the position, of one source or of all, includes a transaction; raises ``TimedOut``."""
        # A position from before a crash of the server may include another transaction of the same id.
        needed = self.passes_begun + 1
        with anyio.move_on_after(timeout_seconds):
            return await self.wait_until(lambda snapshot: self.passes_done >= needed and snapshot.sees(xid), watched)
        raise self.timed_out(f"the index does not include transaction {xid} yet")

    async def wait_for_now(self, timeout_seconds: float, watched: Follower | None = None) -> Position:
        """Return once the position, of one source or of all, includes all that was committed before this call; raises ``TimedOut``."""
        needed = self.passes_begun + 1
        with anyio.move_on_after(timeout_seconds):
            await self.wait_until(lambda _: self.passes_done >= needed, watched)
            newest = self.position.snapshot
            return await self.wait_until(lambda snapshot: snapshot.covers(newest), watched)
        raise self.timed_out("no pass over this dataset has been completed since the request")

    async def wait_until(self, reached: Callable[[Snapshot], bool], watched: Follower | None) -> Position:
        """Wake the consumer until the position is what is asked for."""
        self.waiters += 1
        try:
            while True:
                followed: list[Follower] = [each for each in self.sources.values() if not each.is_failed]
                while watched is not None and watched.successor is not None:
                    watched = watched.successor
                waited_for = [watched] if watched is not None else followed
                if reached(self.position.snapshot) and all(
                    not each.scanning and reached(each.cursor.position.snapshot) for each in waited_for
                ):
                    return watched.cursor.position if watched is not None else self.oldest_position()
                done = self.pass_done
                self.wake("request")
                await done.wait()
        finally:
            self.waiters -= 1

    def timed_out(self, what: str) -> TimedOut:
        """The time of a request that waits ran out."""
        if not self.connected:
            return TimedOut(
                f"{what}: the database cannot be reached",
                hint="see the service's log; try again when the database is back",
            )
        for watched in self.sources.values():
            if watched.watch.weakness:
                return TimedOut(f"{what}: {watched.watch.weakness}", hint="or do not ask for a position")
        if self.pace.writers:
            return TimedOut(what, hint="a transaction that wrote to a source is still open; see pg_stat_activity")
        return TimedOut(
            what, hint="is the token's transaction committed? allow more with timeout_ms; see: syncd status"
        )


def rebuilt(watched: WatchedSource) -> Callable[[], bool]:
    """Whether a rebuild has ended, well or not."""
    return lambda: watched.scan is None or watched.is_failed
