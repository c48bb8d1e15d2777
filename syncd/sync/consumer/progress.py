"""The consumer's progress: the state that other tasks read, request and wait for.

Invariant: a request that waits for a position is answered only by a pass that began after the
request. It checks again after each pass, also after a pass that found the database lost. While a
request waits, the consumer does not sleep for long.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import anyio
import psycopg
import structlog

from syncd.errors import DatabaseError, DatabaseUnreachable, SyncdError, TimedOut, Trouble
from syncd.supervision import describe
from syncd.sync.consumer.cuts import CutFailed, Cuts, Imported
from syncd.sync.consumer.outcome import Handover
from syncd.sync.consumer.pace import Pace
from syncd.sync.consumer.unrecorded import Doubts
from syncd.sync.consumer.wake import Wake
from syncd.sync.registry.datasets import Dataset, Follower, Registry
from syncd.sync.registry.states import ANSWERING
from syncd.sync.source.followed import FollowedSource
from syncd.types import DatasetName, Position, Snapshot, State, Token

logger = structlog.get_logger()

NOWHERE = Position(Snapshot(0, 0, frozenset()), 0)
"""Position before the first pass."""


class Progress:
    """The consumer's sources and position, and the requests that wait for them.

    Only the consumer's task, or a task that holds ``busy``, changes ``sources`` and the objects in
    it. Passes run in a worker thread. ``sources`` is replaced as a whole, so any task may iterate
    over it; the objects in it may change meanwhile.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.wake = Wake()
        self.busy = anyio.Lock()
        self.sources: dict[int, FollowedSource] = {}
        self.position = NOWHERE
        self.history = ""
        """History of the database's transactions, as its tokens name it."""
        self.next_xid = 0
        """Lowest transaction id that the server had not assigned at the last pass."""
        self.connected = False
        self.settled: psycopg.Connection | None = None
        """The connection, after a pass on it has brought the indexes in step with its server."""
        self.ready = anyio.Event()
        self.waiters = 0
        self.passes_begun = 0
        self.passes_done = 0
        self.pass_done = anyio.Event()
        self.last_pass_at = time.monotonic()
        self.newest_outbox_id = 0
        self.cuts = Cuts(registry, self.wake)
        self.handover: Handover | None = None
        self.handed_over = anyio.Event()
        self.handing_over = anyio.Lock()
        self.cut_handover: Handover | None = None
        """That of a pass at a leader's snapshot: the other one may wait for a pass meanwhile."""
        self.cut_handed_over = False
        self.handing_over_at_cut = anyio.Lock()
        self.publish: Callable[[], None] = nothing_to_publish
        """Publishes states and positions to readers, before a request that waits sees them."""
        self.pace = Pace()
        self.doubts = Doubts()
        self.suspicions: dict[str, tuple[int, DatabaseUnreachable, float]] = {}
        """Tasks that could not reach the database: passes begun by then, error, retry seconds."""
        self.lost: DatabaseError | None = DatabaseUnreachable(
            "the database has not been reached yet", hint="wait; or: syncd check"
        )
        """Reason why there is no usable connection, or why passes are put off; None otherwise."""

    def task_failed(self, task: str, error: SyncdError, retry_seconds: float) -> None:
        """Note that a background task could not do its work.

        A lost database is not an error of the task. The task may notice the loss before the
        consumer does. Then the consumer's next pass shows whether the database is lost, and the
        task's error is noted only if it is not.
        """
        if not isinstance(error, DatabaseError):
            self.registry.tasks.failed(task, error, retry_seconds)
        elif self.connected and isinstance(error, DatabaseUnreachable):
            self.suspicions[task] = (self.passes_begun, error, retry_seconds)
            self.wake("request")
        elif self.connected:
            self.registry.tasks.failed(task, error, retry_seconds)

    def note_suspicions(self, number: int) -> None:
        """Note that pass ``number`` reached the database, so it is not lost.

        Errors that tasks met before the pass began are their own.
        """
        for task, (begun, error, retry_seconds) in list(self.suspicions.items()):
            if begun < number:
                del self.suspicions[task]
                self.registry.tasks.failed(task, error, retry_seconds)

    def lose(self, error: Exception, retry_seconds: float) -> None:
        """Note that the connection is lost: there is no pass until there is another one."""
        self.suspicions.clear()
        if isinstance(error, DatabaseError):
            self.lost = error
            logger.warning(
                "database_lost",
                retry_in_seconds=retry_seconds,
                error=error.message,
                hint=error.hint,
            )
        else:
            self.lost = DatabaseError(
                f"an unexpected error ended the reading of the database: {describe(error)}"
            )
            self.registry.tasks.failed("consumer", error, retry_seconds)
            logger.error(
                "task_failed", task="consumer", retry_in_seconds=retry_seconds, exc_info=error
            )

    def note_progress(self) -> None:
        """Note which sources are read to their end; set ``ready`` when all are, or have failed."""
        pending = {
            followed.source.name: str(followed.failure or "it is being read")
            for followed in self.sources.values()
            if followed.reading or followed.failure is not None or not followed.was_ready
        }
        self.registry.pending = pending
        if all(
            followed.was_ready or followed.failure is not None for followed in self.sources.values()
        ):
            self.ready.set()

    def finish_pass(self) -> None:
        """Let the tasks that wait for a position check it."""
        self.publish()
        done, self.pass_done = self.pass_done, anyio.Event()
        done.set()

    async def settled_connection(self, timeout_seconds: float) -> psycopg.Connection:
        """The connection that the indexes are in step with; raises ``DatabaseUnreachable``."""
        with anyio.move_on_after(timeout_seconds):
            while self.settled is None:
                await self.pass_done.wait()
            return self.settled
        raise self.unreachable("no checkpoint is possible now; the previous one is kept")

    def unreachable(self, what: str = "") -> DatabaseUnreachable:
        """The error while there is no usable connection; ``what`` is the consequence."""
        lost = self.lost or DatabaseUnreachable(
            "the database cannot be reached", hint="see the log of syncd serve, and: syncd check"
        )
        return DatabaseUnreachable(
            f"{what}: {lost.message}" if what else lost.message, hint=lost.hint
        )

    def unsettle(self, connection: psycopg.Connection) -> None:
        """Note a connection that is lost or did not confirm a nonce, until a pass succeeds."""
        if self.settled is connection:
            self.settled = None
        self.wake("request")

    @property
    def hangs_seconds(self) -> float:
        """Time without a pass after which the server counts as out of reach."""
        return math.inf

    @property
    def is_answered(self) -> bool:
        """Whether the server can be reached; False also if passes have stopped."""
        return self.connected and self.behind() < self.hangs_seconds

    @property
    def changes_wait(self) -> bool:
        """Whether changes wait to be applied, or may wait."""
        return not self.is_answered or any(followed.lags for followed in self.sources.values())

    @property
    def lag_seconds(self) -> float:
        """Seconds since the last completed pass, of the source that is furthest behind.

        It is 0 if no changes wait and the database can be reached. A source that failed does not
        count: it does not answer, and says so.
        """
        if not self.changes_wait:
            return 0.0
        return max(
            [
                self.behind(),
                *(
                    self.behind(each)
                    for each in self.sources.values()
                    if each.lags and not each.is_failed
                ),
            ]
        )

    def behind(self, follower: Follower | None = None) -> float:
        """Seconds since the last completed pass, over one source or over any.

        While one source is locked, passes over the others go on.
        """
        moved_at = None if follower is None else follower.moved_at
        return time.monotonic() - (
            self.last_pass_at if moved_at is None else min(moved_at, self.last_pass_at)
        )

    @property
    def lag_rows(self) -> int:
        """Largest possible number of outbox rows that wait."""
        oldest = self.oldest_position().outbox_id
        return max(self.newest_outbox_id - oldest, 0) if self.changes_wait else 0

    @property
    def state(self) -> State:
        """State of the service."""
        sources = self.sources.values()
        if any(followed.is_failed for followed in sources):
            return "failed"
        if any(followed.must_rebuild for followed in sources):
            return "must_rebuild"
        if any(followed.reading and not followed.was_ready for followed in sources):
            return "backfilling"
        compared = [followed for followed in sources if followed.reading]
        answering = all(
            dataset.state in ANSWERING
            for followed in compared
            for dataset in list(followed.datasets.values())
        )
        if not self.ready.is_set() or not answering:
            return "catching_up"
        return (
            "rebuilding" if any(followed.scanning for followed in sources) or compared else "ready"
        )

    def oldest_position(self) -> Position:
        """The position that each source has reached.

        A consumer takes its snapshots one after another, so they are ordered.
        """
        positions = [
            followed.cursor.position
            for followed in self.sources.values()
            if followed.source.table is not None
        ]
        return min(positions, key=lambda position: position.snapshot.age(), default=self.position)

    async def rebuild(self, name: DatasetName) -> int:
        """Build another index for a dataset while the present one answers.

        Returns its number of rows when it has replaced the present one. Raises ``UnknownDataset``.
        """
        while True:
            dataset = self.registry.known(name)
            if dataset.name in self.registry.retired and dataset.follower.successor is None:
                async with self.busy:
                    dataset = dataset.follower.dataset(dataset.name) or dataset
            followed = self.source_of(dataset)
            if followed is not None and followed.is_failed:
                failure = followed.failure or Trouble("it has failed")
                raise DatabaseError(
                    f"{followed.source.name} cannot be read: {failure.reason}",
                    hint=failure.fix or "see: syncd check",
                )
            if followed is not None and followed.scan is None and followed.predecessor is None:
                async with self.busy:
                    if followed.scan is None:
                        followed.begin_rebuild(dataset.name)
                replacement = dataset.replacement
                await self.next_pass_until(partial(self.has_rebuilt, followed))
                if dataset.index is replacement:
                    return dataset.index.count
            else:
                await self.next_pass_until(lambda: self.connected)

    def source_of(self, dataset: Dataset) -> FollowedSource | None:
        """The source of a dataset; if its table was attached again, the new source."""
        for followed in self.sources.values():
            for each in (followed, followed.predecessor):
                if each is not None and each.datasets.get(dataset.name) is dataset:
                    return followed
        return None

    def has_rebuilt(self, followed: FollowedSource) -> bool:
        """Whether a rebuild has ended, with or without success, or its source is gone."""
        gone = self.sources.get(followed.source.id) is not followed
        return gone or followed.scan is None or followed.is_failed

    async def next_pass_until(self, done: Callable[[], bool]) -> None:
        """Wait for at least one pass, until ``done`` is true after one.

        Raises ``DatabaseUnreachable``.
        """
        self.waiters += 1
        try:
            while True:
                passed = self.pass_done
                self.wake("request")
                await passed.wait()
                if done():
                    return
                if not self.connected:
                    raise self.unreachable()
        finally:
            self.waiters -= 1

    async def hand_over(self, handover: Handover, imported: Imported | None = None) -> None:
        """Return when a pass has called ``handover.take``. There is one of each kind at a time.

        It is the pass at a leader's snapshot if that is ``imported``; then raises ``CutFailed``.
        """
        if imported is None:
            async with self.handing_over:
                self.handover, self.handed_over = handover, anyio.Event()
                try:
                    await self.next_pass_until(self.handed_over.is_set)
                finally:
                    self.handover = None
            return
        async with self.handing_over_at_cut:
            self.cut_handover, self.cut_handed_over = handover, False
            try:
                await self.cuts.take(imported)
                if not self.cut_handed_over:
                    raise CutFailed("a source was not in step with its table at the snapshot")
            finally:
                self.cut_handover = None

    async def wait_for_token(
        self, token: Token, timeout_seconds: float, follower: Follower | None = None
    ) -> Position:
        """Return when the position, of one source or of all, includes a token's transaction.

        A token of another history counts as included: it names another database, or an id that this
        server has not assigned. Such tokens come from a failed primary or from a clone. While the
        database is lost, its history is unknown. Raises ``TimedOut``.
        """
        # A position from before a crash of the server may include another transaction of this id.
        needed = self.passes_begun + 1
        if self.settled is not None and self.is_foreign(token):
            return follower.cursor.position if follower is not None else self.oldest_position()

        def includes(snapshot: Snapshot) -> bool:
            if self.passes_done < needed:
                return False
            lost = bool(token.history) and token.xid >= self.next_xid
            return snapshot.sees(token.xid) or lost or self.is_foreign(token)

        with anyio.move_on_after(timeout_seconds):
            return await self.wait_until(includes, follower)
        raise self.timed_out(f"the index does not include transaction {token.xid} yet")

    def is_foreign(self, token: Token) -> bool:
        """Whether a token names another history than the last pass's."""
        return token.history not in ("", self.history)

    async def wait_for_now(
        self, timeout_seconds: float, follower: Follower | None = None
    ) -> Position:
        """Return when the position, of one source or of all, includes all commits before this call.

        Raises ``TimedOut``.
        """
        needed = self.passes_begun + 1
        with anyio.move_on_after(timeout_seconds):
            await self.wait_until(lambda _: self.passes_done >= needed, follower)
            newest = self.position.snapshot
            return await self.wait_until(lambda snapshot: snapshot.covers(newest), follower)
        raise self.timed_out("no pass over this dataset has been completed since the request")

    async def wait_until(
        self, reached: Callable[[Snapshot], bool], follower: Follower | None
    ) -> Position:
        """Wake the consumer until the position is reached."""
        self.waiters += 1
        try:
            while True:
                every: list[Follower] = [
                    each for each in self.sources.values() if not each.is_failed
                ]
                while follower is not None and follower.successor is not None:
                    follower = follower.successor
                if all(follower is not each for each in self.sources.values()):
                    follower = None  # detached: another source may form the dataset now
                waited_for = [follower] if follower is not None else every
                if reached(self.position.snapshot) and all(
                    not each.scanning and reached(each.cursor.position.snapshot)
                    for each in waited_for
                ):
                    return (
                        follower.cursor.position if follower is not None else self.oldest_position()
                    )
                done = self.pass_done
                self.wake("request")
                await done.wait()
        finally:
            self.waiters -= 1

    def timed_out(self, what: str) -> TimedOut:
        """The error for a request whose time ran out."""
        if self.lost is not None:
            error = self.unreachable(what)
            return TimedOut(error.message, hint=error.hint)
        for followed in self.sources.values():
            if followed.catalogue.weakness is not None:
                return TimedOut(
                    f"{what}: {followed.catalogue.weakness}", hint="or do not ask for a position"
                )
        if self.pace.writers:
            return TimedOut(
                what,
                hint="a transaction that wrote to a source is still open; see pg_stat_activity",
            )
        return TimedOut(
            what,
            hint="is the token's transaction committed? "
            "allow more with timeout_ms; see: syncd status",
        )


def nothing_to_publish() -> None:
    """Without readers nothing is published."""
