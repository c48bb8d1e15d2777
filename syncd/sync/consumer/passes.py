"""One pass: it brings each index from its present snapshot to the one that the pass takes.

Invariant: snapshot, changed keys and rows are read in one REPEATABLE READ transaction. A source's
rows are read only under a lock on its table that is older than the snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import LiteralString

import psycopg
import structlog
from psycopg import errors as pg
from psycopg import sql

from syncd.errors import ConsumerReplaced, DatabaseUnreachable, Trouble
from syncd.postgres import session
from syncd.postgres.layout import read_sources
from syncd.postgres.outbox import (
    array,
    read_changes,
    read_markers,
    registry_changed,
    unseen,
    who_locks_the_outbox,
)
from syncd.shard import WHOLE, Shard
from syncd.statements import filled, statement
from syncd.sync.consumer.bringing import bring, scan_page
from syncd.sync.consumer.guarding import ReadRegistryAgain, StartAgain, guarded
from syncd.sync.consumer.outcome import (
    NO_LONGER_HELD,
    Handover,
    PassOutcome,
    alert_of_rebuild,
    by_cursor,
)
from syncd.sync.consumer.unrecorded import DOUBT, Doubts
from syncd.sync.source.estimates import nearest_to_its_end
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.looking import look, trouble
from syncd.types import Position, Snapshot

LOCK_ALL_UP_TO = 8
"""Up to this many sources, a pass locks all; of more, only those that have had changes lately."""
SETTINGS = ("service_settings", "plan_settings")
RECENTLY_DIRTY_SECONDS = 5.0
"""Age of a source's last change up to which a pass locks it in advance."""
OUTBOX_LOCK_TRIES = 10
"""Number of attempts to lock the outbox, of 100 ms each.

A slot is freed in milliseconds. Only VACUUM FULL and similar commands lock the outbox for longer;
then the pass is put off.
"""

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
    history: str = ""
    next_xid: int = 0
    shard: Shard = WHOLE

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
        while True:
            try:
                locked = self.begin(wanted)
                return self.move(due, locked, all_sources)
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

    def begin(self, wanted: Sequence[FollowedSource]) -> list[FollowedSource]:
        """Open the transaction and lock the sources before there is a snapshot.

        Returns the sources that could be locked.
        """
        begin: list[sql.Composable] = [filled("passes", "begin_pass")]
        if self.pooled:
            begin.append(sql.SQL(local_settings(self.connection)))
        begin.append(filled("passes", "lock_outbox"))
        try:
            self.connection.execute(
                sql.SQL(";\n").join([*begin, *(each.source.lock() for each in wanted)])
            )
            return list(wanted)
        except (pg.LockNotAvailable, pg.InsufficientPrivilege):
            self.rollback()
        self.begin_with_outbox(sql.SQL(";\n").join(begin))
        locked = []
        for each in wanted:
            self.connection.execute(statement("passes", "savepoint"))
            try:
                self.connection.execute(each.source.lock())
            except pg.LockNotAvailable:
                self.connection.execute(statement("passes", "rollback_to_savepoint"))
                each.behind(
                    Trouble("another transaction holds a lock on the table"), now=time.monotonic()
                )
            except pg.InsufficientPrivilege:
                self.connection.execute(statement("passes", "rollback_to_savepoint"))
                role = sql.Identifier(self.connection.info.user).as_string()
                grant = f"GRANT SELECT ON {each.source.identifier.as_string()} TO {role};"
                refused = Trouble(f"role {role} may not read {each.source.name}", grant)
                each.failed(refused, now=time.monotonic())
            else:
                locked.append(each)
            self.connection.execute(statement("passes", "release_savepoint"))
        return locked

    def begin_with_outbox(self, begin: sql.Composed) -> None:
        """Open the transaction and lock the outbox.

        Raises ``psycopg.errors.LockNotAvailable`` if another session keeps it locked.
        """
        for _ in range(OUTBOX_LOCK_TRIES - 1):
            try:
                self.connection.execute(begin)
                return
            except pg.LockNotAvailable:
                self.rollback()
        self.connection.execute(begin)

    def move(
        self,
        due: Sequence[FollowedSource],
        locked: Sequence[FollowedSource],
        all_sources: Sequence[FollowedSource],
    ) -> PassOutcome:
        """The pass after the locks: from the snapshot to the new cursors."""
        oldest = min(
            [self.position.snapshot, *(each.cursor.position.snapshot for each in due)],
            key=Snapshot.age,
        )
        snapshot, newest_outbox_id, names_changed, marked, freed = self.take_snapshot(
            locked, oldest
        )
        for each in all_sources if self.doubts.moved else ():
            if each.source.table is not None:
                each.doubt(f"{each.source.name}: {DOUBT}")
        if (
            names_changed
            or self.position.snapshot.lacks(freed)
            or (marked and registry_changed(self.connection, self.position.snapshot))
        ):
            sources = read_sources(self.connection, self.shard)
            self.commit()
            return PassOutcome(snapshot, newest_outbox_id, more=True, sources=sources)
        if look(self.connection, all_sources, locked, prepare=not self.pooled):
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
            if freed is None
            else [each for each in present if each.cursor.position.snapshot.lacks(freed)]
        )
        for each in lacking:
            logger.warning("must_rebuild", source=each.source.name, reason=NO_LONGER_HELD)
            with guarded(self.connection, each):
                each.rebuild(Position(snapshot, newest_outbox_id))
        if lacking:
            alert_of_rebuild(lacking[0].registry, lacking)
        for cursor, group in by_cursor(ready).items():
            ids = [each.source.id for each in group]
            markers = (
                read_markers(self.connection, cursor, ids)
                if marked and cursor.window is None
                else []
            )
            changes = read_changes(
                self.connection,
                cursor,
                ids,
                snapshot,
                newer_than=self.known_outbox_id,
                shard=self.shard,
                unfiltered=[each.source.id for each in group if each.needs_every_change],
            )
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
                raise StartAgain(unlocked)
            for each in group:
                with guarded(self.connection, each):
                    for marker in markers:
                        if marker.source == each.source.id:
                            each.apply_marker(marker.op)
                    if each.catalogue.rewritten:  # there was no marker of a truncation
                        each.catalogue.rewritten = False
                        each.doubt(f"{each.source.name}: the table was rewritten", believed=True)
                    outcome.changed_rows += bring(self.connection, each, changes)
                outcome.more |= changes.cursor.window is not None or each.rereads
        scanned = [
            each
            for each in ready
            if each.scan is not None and each.cursor.window is None and each.failure is None
        ]
        if scanned:  # one page per pass: changes of the other sources do not wait
            nearest = nearest_to_its_end(self.connection, scanned)
            if not self.doubts.begins_again:
                with guarded(self.connection, nearest):
                    scan_page(self.connection, nearest)
            outcome.more = True
        outcome.handed_over = self.hand_over(snapshot, newest_outbox_id, all_sources)
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

    def take_snapshot(
        self, locked: Sequence[FollowedSource], oldest: Snapshot
    ) -> tuple[Snapshot, int, bool, bool, Snapshot | None]:
        """Take the snapshot, and read with it the facts that decide how the pass goes on.

        Returns the snapshot, the newest outbox id, whether a locked table's name now belongs to
        another oid, whether there are markers, and the freed transactions. Raises an error if this
        process or this server must no longer be followed.
        """
        oids = array(each.source.oid for each in locked)
        parameters = [self.consumer, oids, *unseen(oldest)]
        query = statement("passes", "read_snapshot")
        row = self.connection.execute(query, parameters, prepare=True).fetchone()
        assert row is not None
        (
            snapshot,
            newest_outbox_id,
            in_recovery,
            run_id,
            names,
            marked,
            freed,
            history,
            self.next_xid,
            doubts,
        ) = row
        if in_recovery:
            raise DatabaseUnreachable(
                "the server has become a standby", hint="name all hosts in SYNCD_DSN"
            )
        if run_id is None:
            raise ConsumerReplaced(
                f"the row of consumer {self.consumer!r} was deleted from syncd.consumers",
                hint="start syncd again if it was not meant to go: it reads the tables again",
            )
        if run_id != self.run_id:
            raise ConsumerReplaced(
                f"another process has taken the consumer name {self.consumer!r}",
                hint="stop one of them, or give each its own SYNCD_CONSUMER",
            )
        if history is None or not history.startswith(self.incarnation[:8]):
            raise DatabaseUnreachable(
                "the database was restored from a dump",
                hint="wait: syncd connects again, and compares every row",
            )
        self.history = history
        expected = {(each.source.oid, each.source.schema, each.source.table) for each in locked}
        names_changed = {tuple(name) for name in names} != expected
        freed = None if freed is None else Snapshot.parse(freed)
        taken = Snapshot.parse(snapshot)
        self.doubts.note(doubts, taken)
        return taken, newest_outbox_id, names_changed, marked, freed

    def commit(self) -> None:
        """End the transaction."""
        self.connection.execute(statement("passes", "commit"))

    def rollback(self) -> None:
        """End the transaction, if the connection is still there."""
        if not self.connection.closed:
            self.connection.execute(statement("passes", "rollback"))


def local_settings(connection: psycopg.Connection) -> LiteralString:
    """Settings of a pass, for its transaction."""
    return ";\n".join((session.settings(connection, *SETTINGS), statement("passes", "limits")))


def session_settings(connection: psycopg.Connection) -> LiteralString:
    """Settings of a pass, for a session that is not shared."""
    return session.own_session_settings(connection, *SETTINGS, limits=statement("passes", "limits"))
