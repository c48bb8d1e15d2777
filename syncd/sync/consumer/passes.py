"""One pass: it brings each index from its present snapshot to the one that the pass takes.

Invariant: snapshot, changed keys and rows are read in one REPEATABLE READ transaction. A source's
rows are read only under a lock on its table that is older than the snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, LiteralString

import psycopg
import structlog
from psycopg import errors as pg
from psycopg import sql
from psycopg.pq import TransactionStatus

from syncd.postgres import session
from syncd.postgres.catalogue import questions, read_catalogues
from syncd.postgres.layout import read_sources
from syncd.postgres.outbox import (
    PAGE_ROWS,
    Changes,
    Cursor,
    array,
    ask_keys,
    key_parameters,
    key_queries,
    read_changes,
    read_markers,
    registry_changed,
    unseen,
    who_locks_the_outbox,
)
from syncd.shard import WHOLE, Shard
from syncd.statements import filled, statement
from syncd.sync.consumer.ahead import Answers, Prepared, prepare_reads, read_ahead
from syncd.sync.consumer.bringing import bring, is_read_at_once, scan_page
from syncd.sync.consumer.cuts import CutFailed, Imported
from syncd.sync.consumer.guarding import ReadRegistryAgain, StartAgain, guarded
from syncd.sync.consumer.locking import begin_with_outbox, lock_each
from syncd.sync.consumer.outcome import (
    NO_LONGER_HELD,
    Handover,
    PassOutcome,
    alert_of_rebuild,
    by_cursor,
)
from syncd.sync.consumer.taken import Taken
from syncd.sync.consumer.unrecorded import DOUBT, Doubts
from syncd.sync.source.estimates import nearest_to_its_end
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.looking import choose_looks, look, trouble
from syncd.types import Position, Snapshot

LOCK_ALL_UP_TO = 8
"""Up to this many sources, a pass locks all; of more, only those that have had changes lately."""
SETTINGS = ("service_settings", "plan_settings")
RECENTLY_DIRTY_SECONDS = 5.0
"""Age of a source's last change up to which a pass locks it in advance."""

logger = structlog.get_logger()


@dataclass(slots=True)
class Pass:
    """A pass over some sources, on its own connection in autocommit mode."""

    connection: psycopg.Connection
    consumer: str
    run_id: str
    incarnation: str
    position: Position
    """Position of the previous pass; sources may have been attached or detached since then."""
    pooled: bool
    """Whether the connection may lead to another session in each transaction."""
    known_outbox_id: int = 0
    """Last outbox id at the previous pass."""
    handover: Handover | None = None
    doubts: Doubts = field(default_factory=Doubts)
    prepared: Prepared = field(default_factory=Prepared)
    ahead: Answers | None = None
    """Answers to the first statements, if they were sent in one message."""
    history: str = ""
    next_xid: int = 0
    shard: Shard = WHOLE
    imported: Imported | None = None
    """The leader's snapshot, in place of one of its own; raises ``CutFailed`` if it cannot be."""

    def run(self, all_sources: Sequence[FollowedSource]) -> PassOutcome:
        """Take a snapshot and bring the sources to it.

        Raises ``psycopg.OperationalError`` if the connection is lost.
        """
        now = time.monotonic()
        due = [
            source for source in all_sources if source.retry_at <= now and not source.source.trouble
        ]
        for source in all_sources:
            with guarded(self.connection, source):
                found = trouble(source)
                if found is not None and found != source.failure:
                    source.failed(found, now=now)
        needed = self.handover.wanted if self.handover is not None else frozenset()
        wanted = [
            s
            for s in due
            if len(due) <= LOCK_ALL_UP_TO
            or s.dirty_at > now - RECENTLY_DIRTY_SECONDS
            or s.source.id in needed
        ]
        if self.imported is not None:
            due = self.imported.reachable(due, self.position)
            wanted = [each for each in due if each.source.oid in self.imported.tables]
        while True:
            try:
                oldest = min(
                    [self.position.snapshot, *(each.cursor.position.snapshot for each in due)],
                    key=Snapshot.age,
                )
                locked = self.begin(wanted, due, all_sources, oldest)
                return self.move(due, locked, all_sources, oldest)
            except StartAgain as again:
                self.rollback()
                retry = [] if not again.args else again.args[0]
                wanted = [each for each in (*wanted, *retry) if each.retry_at <= time.monotonic()]
            except (pg.UndefinedTable, pg.InvalidSchemaName, ReadRegistryAgain):
                # a table was renamed or dropped: the registry gives its name by its oid
                self.rollback()
                with session.transaction(self.connection, "service_settings"):
                    sources = read_sources(self.connection, self.shard)
                return PassOutcome(
                    self.position.snapshot, more=True, sources=sources, took_snapshot=False
                )
            except pg.LockNotAvailable:  # of the outbox; a locked source is handled elsewhere
                self.rollback()
                with session.transaction(self.connection, "service_settings"):
                    reason = who_locks_the_outbox(self.connection)
                return PassOutcome(self.position.snapshot, took_snapshot=False, put_off=reason)
            except BaseException:
                self.rollback()
                raise

    def begin(
        self,
        wanted: Sequence[FollowedSource],
        due: Sequence[FollowedSource],
        all_sources: Sequence[FollowedSource],
        oldest: Snapshot,
    ) -> list[FollowedSource]:
        """Open the transaction and lock the sources before there is a snapshot.

        Returns the sources that could be locked.
        """
        self.ahead = None
        begin: list[sql.Composable] = [filled("passes", "begin_pass")]
        if self.pooled:
            begin.append(sql.SQL(local_settings(self.connection)))
        begin.append(filled("passes", "lock_outbox"))
        try:
            pipelined = self.imported is None and psycopg.Pipeline.is_supported()
            if pipelined and not self.pooled:
                parameters = self.snapshot_parameters(wanted, oldest)
                self.ahead = read_ahead(
                    self.connection,
                    self.prepared,
                    all_sources,
                    wanted,
                    due,
                    parameters,
                    self.ask_keys,
                )
            if self.ahead is None:
                self.connection.execute(
                    sql.SQL(";\n").join([*begin, *(each.source.lock() for each in wanted)])
                )
            locked = list(wanted)
        except (pg.LockNotAvailable, pg.InsufficientPrivilege):
            self.rollback()
            begin_with_outbox(self.connection, sql.SQL(";\n").join(begin))
            locked = lock_each(self.connection, wanted)
        if self.imported is not None:
            self.imported.take(self.connection)
        return locked

    def move(
        self,
        due: Sequence[FollowedSource],
        locked: Sequence[FollowedSource],
        all_sources: Sequence[FollowedSource],
        oldest: Snapshot,
    ) -> PassOutcome:
        """The pass after the locks: from the snapshot to the new cursors."""
        taken = self.take_snapshot(locked, oldest)
        snapshot, newest_outbox_id, freed = taken.snapshot, taken.newest_outbox_id, taken.freed
        for each in all_sources if self.doubts.moved and self.imported is None else ():
            if each.source.table is not None:
                each.doubt(f"{each.source.name}: {DOUBT}")
        if (
            taken.renamed(locked)
            or self.position.snapshot.lacks(freed)
            or (taken.marked and registry_changed(self.connection, self.position.snapshot))
        ):
            self.needs_another_snapshot("the attached tables have changed")
            sources = read_sources(self.connection, self.shard)
            self.commit()
            return PassOutcome(snapshot, newest_outbox_id, more=True, sources=sources)
        if self.look(all_sources, locked):
            self.needs_another_snapshot("the catalogue has changed")
            sources = read_sources(self.connection, self.shard)
            # psycopg forgets its prepared statements at a rollback; columns may have other types
            self.rollback()
            return PassOutcome(snapshot, newest_outbox_id, more=True, sources=sources)
        outcome = PassOutcome(
            snapshot, newest_outbox_id, locked={each.source.id for each in locked}
        )
        now = time.monotonic()
        ready = [each for each in due if each.retry_at <= now]
        present = [each for each in all_sources if each.source.table is not None]
        lacking = (
            []
            if freed is None or self.imported is not None
            else [each for each in present if each.cursor.position.snapshot.lacks(freed)]
        )
        for each in lacking:
            logger.warning("must_rebuild", source=each.source.name, reason=NO_LONGER_HELD)
            with guarded(self.connection, each):
                each.rebuild(Position(snapshot, newest_outbox_id))
        if lacking:
            alert_of_rebuild(lacking[0].registry, lacking)
        groups = by_cursor(ready)
        for cursor, group in groups.items():
            ids = [each.source.id for each in group]
            markers = (
                read_markers(self.connection, cursor, ids)
                if taken.marked and cursor.window is None
                else []
            )
            changes = self.changes(cursor, group, snapshot)
            outcome.outbox_rows += changes.rows
            outcome.newer_rows += changes.newer_rows
            dirty = {marker.source for marker in markers} | set(changes.keys)
            for each in group:
                if each.source.id in dirty or each.scan is not None or each.rereads:
                    each.dirty_at = now
            unlocked = [
                each
                for each in group
                if each.dirty_at == now and each.source.id not in outcome.locked
            ]
            if unlocked:
                self.needs_another_snapshot(f"{unlocked[0].source.name} was not locked before it")
                raise StartAgain(unlocked)
            last = None if taken.marked or len(groups) > 1 else self.last_read(group, changes)
            for each in group:
                with guarded(self.connection, each):
                    for marker in markers:
                        if marker.source == each.source.id:
                            each.apply_marker(marker.op)
                    if each.catalogue.rewritten:  # there was no marker of a truncation
                        each.catalogue.rewritten = False
                        each.doubt(f"{each.source.name}: the table was rewritten", believed=True)
                    outcome.changed_rows += bring(
                        self.connection, each, changes, commit=each is last
                    )
                outcome.more |= changes.cursor.window is not None or each.rereads
        scanned = [
            each
            for each in ready
            if each.scan is not None and each.cursor.window is None and each.failure is None
        ]
        if (
            scanned and self.imported is None
        ):  # one page per pass: changes of the other sources do not wait
            if not self.doubts.begins_again and not self.ended:
                nearest = nearest_to_its_end(self.connection, scanned)
                with guarded(self.connection, nearest):
                    scan_page(self.connection, nearest)
            outcome.more = True
        outcome.handed_over = self.hand_over(snapshot, newest_outbox_id, all_sources)
        if not outcome.more and not self.ended and not self.pooled and self.imported is None:
            prepare_reads(self.connection, self.prepared, locked, self.ask_keys)
        self.commit()
        for each in ready:
            if each.retry_at <= now:
                with guarded(self.connection, each):
                    each.caught_up()
        return outcome

    def hand_over(
        self, snapshot: Snapshot, newest_outbox_id: int, all_sources: Sequence[FollowedSource]
    ) -> bool:
        """Hand over the indexes and the snapshot, if the wanted sources are at it; returns if so.

        A source that has been locked for long is left out.
        """
        if self.handover is None:
            return False
        wanted = [
            each
            for each in all_sources
            if each.source.id in self.handover.wanted and not each.is_held_up
        ]
        if any(
            not each.is_failed and (each.lags or each.cursor.position.snapshot != snapshot)
            for each in wanted
        ):
            return False
        row = self.connection.execute(statement("passes", "export_snapshot")).fetchone()
        assert row is not None
        self.handover.take(row[0], Position(snapshot, newest_outbox_id), wanted)
        return True

    def take_snapshot(self, locked: Sequence[FollowedSource], oldest: Snapshot) -> Taken:
        """Take the snapshot, and read with it the facts that decide how the pass goes on.

        Raises an error if this process or this server must no longer be followed.
        """
        if self.ahead is not None:
            row: Any = self.ahead.snapshot
        else:
            query, parameters = (
                statement("passes", "read_snapshot"),
                self.snapshot_parameters(locked, oldest),
            )
            row = self.connection.execute(query, parameters, prepare=True).fetchone()
            assert row is not None
            self.prepared.names.add("read_snapshot")
        taken = Taken.parse(row)
        taken.check(consumer=self.consumer, run_id=self.run_id, incarnation=self.incarnation)
        if self.imported is not None:  # the other facts are newer than the snapshot
            self.imported.check(taken.snapshot, self.position)
            if self.doubts.due or self.doubts.ended or taken.doubts != self.doubts.seen:
                raise CutFailed(DOUBT)
            return taken
        self.history, self.next_xid = taken.history or "", taken.next_xid
        self.doubts.note(taken.doubts, taken.snapshot)
        return taken

    def needs_another_snapshot(self, why: str) -> None:
        """Raise ``CutFailed`` if the snapshot is the leader's: the next own pass takes this up."""
        if self.imported is not None:
            raise CutFailed(why)

    def snapshot_parameters(self, locked: Sequence[FollowedSource], oldest: Snapshot) -> list[str]:
        """Parameters of ``read_snapshot``."""
        return [self.consumer, array(each.source.oid for each in locked), *unseen(oldest)]

    def look(self, all_sources: Sequence[FollowedSource], locked: Sequence[FollowedSource]) -> bool:
        """Compare the catalogue with the known one; returns if the registry must be read again."""
        if self.ahead is not None:
            return look(self.connection, self.ahead.looks, self.ahead.found)
        looks = choose_looks(all_sources, locked)
        found = read_catalogues(self.connection, looks.looks, prepare=not self.pooled)
        self.prepared.names.update(questions(looks.looks))
        return look(self.connection, looks, found)

    def changes(self, cursor: Cursor, group: Sequence[FollowedSource], now: Snapshot) -> Changes:
        """The next page of changed keys of the sources at one cursor."""
        ids = [each.source.id for each in group]
        answers = None if self.ahead is None else self.ahead.keys.get((cursor, tuple(ids)))
        changes = read_changes(
            self.connection,
            cursor,
            ids,
            now,
            page_rows=PAGE_ROWS,
            newer_than=self.known_outbox_id,
            shard=self.shard,
            unfiltered=unfiltered(group),
            answers=answers,
        )
        if changes.cursor.window is None:  # then each of its statements was run
            self.prepared.names.update(name for name, _ in key_queries(cursor))
        return changes

    def ask_keys(
        self, name: str, bounds: Sequence[str], group: Sequence[FollowedSource]
    ) -> psycopg.Cursor:
        """Ask for a page of changed keys, before the answers are needed."""
        ids = [each.source.id for each in group]
        parameters = key_parameters(bounds, ids, PAGE_ROWS, self.known_outbox_id, unfiltered(group))
        return ask_keys(self.connection, name, parameters, self.shard)

    def last_read(self, group: Sequence[FollowedSource], changes: Changes) -> FollowedSource | None:
        """The source whose rows are the last that this pass reads: COMMIT goes with that message.

        None if it is not sure which one that is, or that the read stays prepared if it fails.
        """
        reads = [each for each in group if each.source.id in changes.keys]
        if (
            not reads
            or self.pooled
            or self.handover is not None
            or any(each.scan is not None or each.catalogue.rewritten for each in group)
            or not all(is_read_at_once(each, changes) for each in group)
        ):
            return None
        source = reads[-1].source
        ready = source.partitions is not None or source.keys_query in self.prepared.names
        return reads[-1] if ready and psycopg.Pipeline.is_supported() else None

    @property
    def ended(self) -> bool:
        """Whether the transaction has ended with the last read."""
        return self.connection.info.transaction_status is TransactionStatus.IDLE

    def commit(self) -> None:
        """End the transaction, if it has not ended with the last read."""
        if not self.ended:
            self.connection.execute(statement("passes", "commit"))

    def rollback(self) -> None:
        """End the transaction, if the connection is still there."""
        self.prepared.names.clear()
        if not self.connection.closed:
            self.connection.execute(statement("passes", "rollback"))


def local_settings(connection: psycopg.Connection) -> LiteralString:
    """Settings of a pass, for its transaction."""
    return ";\n".join((session.settings(connection, *SETTINGS), statement("passes", "limits")))


def session_settings(connection: psycopg.Connection) -> LiteralString:
    """Settings of a pass, for a session that is not shared."""
    return session.own_session_settings(connection, *SETTINGS, limits=statement("passes", "limits"))


def unfiltered(group: Sequence[FollowedSource]) -> list[int]:
    """The sources of which a shard needs the changed keys of all shards."""
    return [each.source.id for each in group if each.needs_every_change]
