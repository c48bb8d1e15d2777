"""One pass: move every index from the snapshot it stands at to the one that the pass takes.

Invariant: snapshot, changed keys and rows are read in one REPEATABLE READ transaction, and no source's rows are read without a lock on it that is
older than the snapshot. A source's cursor moves only after all that was read for it has been applied.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import LiteralString

import psycopg
import structlog
from psycopg import errors as pg
from psycopg import sql

from syncd.errors import ConsumerReplaced, DatabaseUnreachable, SyncdError, Trouble
from syncd.keys import readable
from syncd.postgres import session
from syncd.postgres.connection import first_line
from syncd.postgres.outbox import (
    Changes,
    array,
    read_changes,
    read_markers,
    registry_changed,
    unseen,
    who_locks_the_outbox,
)
from syncd.postgres.source import read_sources
from syncd.statements import filled, statement
from syncd.sync.consumer.outcome import (
    NO_LONGER_HELD,
    Handover,
    PassOutcome,
    alert_of_rebuild,
    by_cursor,
)
from syncd.sync.consumer.unrecorded import DOUBT, Doubts
from syncd.sync.source.applying import apply
from syncd.sync.source.estimates import expected_rows, nearest_to_its_end
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.looking import explained, look, trouble
from syncd.sync.source.reading import read_by_keys, read_page, read_unkeyed
from syncd.types import Position, Snapshot

LOCK_ALL_UP_TO = 8
SETTINGS = ("service_settings", "plan_settings")
RECENTLY_DIRTY_SECONDS = 5.0
KEYS_PER_READ = 1000
REREAD_PER_PASS = 5000
OUTBOX_LOCK_TRIES = 10
"""Of 100 ms each. A slot is freed in milliseconds; only VACUUM FULL and its like hold the outbox for longer: then the pass is put off."""
CONNECTION_LOST = ("08", "57P", "25P")
"""Classes of SQLSTATE that end the session, or say that it is not to be used; an error without any is the driver's."""

logger = structlog.get_logger()


class StartAgain(Exception):
    """The pass must begin again, with other sources locked, or without one that failed."""


class ReadRegistryAgain(Exception):
    """A source could not be read: perhaps because something that its rules name has another name since they were read."""


@dataclass(slots=True)
class Pass:
    """A pass over some sources, on a connection in autocommit mode that is used for nothing else."""

    connection: psycopg.Connection
    consumer: str
    run_id: str
    incarnation: str
    position: Position
    """Of the newest pass; what was attached or detached since then is looked for."""
    pooled: bool
    """Whether the connection may lead to another session in each transaction."""
    known_outbox_id: int = 0
    """The outbox's last id at the previous pass."""
    handover: Handover | None = None
    doubts: Doubts = field(default_factory=Doubts)
    history: str = ""
    next_xid: int = 0

    def run(self, all_sources: Sequence[FollowedSource]) -> PassOutcome:
        """Take a snapshot and bring the sources to it; raises ``psycopg.OperationalError`` when the connection is lost."""
        now = time.monotonic()
        due = [
            source for source in all_sources if source.retry_at <= now and not source.source.trouble
        ]
        for source in all_sources:
            with self.guarded(source):
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
            except (
                pg.UndefinedTable,
                pg.InvalidSchemaName,
                ReadRegistryAgain,
            ):  # renamed or dropped: the registry knows its name by its oid
                self.rollback()
                with session.transaction(self.connection, "service_settings"):
                    sources = read_sources(self.connection)
                return PassOutcome(
                    self.position.snapshot, more=True, sources=sources, took_snapshot=False
                )
            except pg.LockNotAvailable:  # of the outbox: a source that is locked waits by itself
                self.rollback()
                with session.transaction(self.connection, "service_settings"):
                    reason = who_locks_the_outbox(self.connection)
                return PassOutcome(self.position.snapshot, took_snapshot=False, put_off=reason)
            except BaseException:
                self.rollback()
                raise

    def begin(self, wanted: Sequence[FollowedSource]) -> list[FollowedSource]:
        """Open the transaction and lock the sources, before there is a snapshot. Returns those that could be locked."""
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
        """Open the transaction and lock the outbox; raises ``psycopg.errors.LockNotAvailable`` when somebody keeps it locked."""
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
        """Everything after the locks: from the snapshot to the new cursors."""
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
            sources = read_sources(self.connection)
            self.commit()
            return PassOutcome(snapshot, newest_outbox_id, more=True, sources=sources)
        if look(self.connection, all_sources, locked, prepare=not self.pooled):
            sources = read_sources(self.connection)
            self.rollback()  # with it the driver forgets its prepared statements: columns may be of other types now
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
            with self.guarded(each):
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
                self.connection, cursor, ids, snapshot, newer_than=self.known_outbox_id
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
                with self.guarded(each):
                    for marker in markers:
                        if marker.source == each.source.id:
                            each.apply_marker(marker.op)
                    if each.catalogue.rewritten:  # not by a truncation
                        each.catalogue.rewritten = False
                        each.doubt(f"{each.source.name}: the table was rewritten", believed=True)
                    outcome.changed_rows += self.bring(each, changes)
                outcome.more |= changes.cursor.window is not None or each.rereads
        scanned = [
            each
            for each in ready
            if each.scan is not None and each.cursor.window is None and each.failure is None
        ]
        if scanned:  # one page a pass: changes of the others are not kept waiting
            nearest = nearest_to_its_end(self.connection, scanned)
            if not self.doubts.begins_again:
                with self.guarded(nearest):
                    self.scan_page(nearest)
            outcome.more = True
        outcome.handed_over = self.hand_over(snapshot, newest_outbox_id, all_sources)
        self.commit()
        for each in ready:
            if each.retry_at <= now:
                with self.guarded(each):
                    each.caught_up()
        return outcome

    def hand_over(
        self, snapshot: Snapshot, newest_outbox_id: int, all_sources: Sequence[FollowedSource]
    ) -> bool:
        """Let whoever waits for it take the indexes and the snapshot, if all that was asked for is there; whether that was so.

        A source that somebody has kept locked for long is left out.
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
        """S1, the newest outbox id, whether a locked table's name belongs to another oid by now, whether there are markers, and what was freed.

        Raises when this is no longer our place to be.
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

    def bring(self, each: FollowedSource, changes: Changes) -> int:
        """Read one source's changed rows, apply them, and move its cursor. Returns how many rows changed. Called ``guarded``."""
        written = changes.keys.get(each.source.id, [])
        asked = self.readable(each, [key for key in written if not each.source.is_unkeyed(key)])
        # A row trigger does not tell which row has come by a key, so these are looked at after any change.
        each.reread_unkeyed |= each.source.id in changes.unkeyed or len(asked) < len(written)
        each.reread_unkeyed |= bool(each.quarantine.unkeyed and written)
        each.unconfirmed.note(asked)
        reread = set(itertools.islice(each.reread, REREAD_PER_PASS))
        each.reread -= reread
        try:
            changed = self.read_and_apply(
                each, list(dict.fromkeys([*asked, *reread])) if reread else asked
            )
            if each.reread_unkeyed:
                each.reject_unkeyed(
                    read_unkeyed(self.connection, each.source, careful=each.careful)
                )
        except BaseException:
            each.reread |= reread
            raise
        each.cursor = changes.cursor
        return changed

    def readable(self, each: FollowedSource, asked: list[str]) -> list[str]:
        """The keys that can be read. For one that cannot, the whole source is: somebody altered the key's type, or wrote to the outbox."""
        try:
            each.source.parse_keys(asked)
        except (ValueError, TypeError) as error:
            each.doubt(f"{each.source.name}: a key in the outbox cannot be read: {error}")
            return readable(each.source.key_kinds, asked)
        return asked

    def read_and_apply(self, each: FollowedSource, asked: Sequence[str]) -> int:
        """Rows by key, some at a time so that memory stays bounded."""
        changed = 0
        for start in range(0, len(asked), KEYS_PER_READ):
            some = asked[start : start + KEYS_PER_READ]
            rows, failing = read_by_keys(
                self.connection,
                each.source,
                some,
                careful=each.careful,
                some_indexed=each.datasets.some_indexed,
            )
            changed += apply(each, [each.source.parse_key(key) for key in some], rows)
            each.quarantine.put_failing([each.source.parse_key(key) for key in failing])
        return changed

    @contextmanager
    def guarded(self, each: FollowedSource) -> Iterator[None]:
        """Around work for one source: an error of it fails that source, which then waits while the others go on."""
        try:
            yield
        except (StartAgain, ReadRegistryAgain, ConsumerReplaced, DatabaseUnreachable):
            raise
        except Exception as error:
            if not self.is_of_source(each, error):
                raise

    def is_of_source(self, each: FollowedSource, error: Exception) -> bool:
        """Whether an error concerns one source only, which has been told so then.

        An error of the server's ended the transaction: then the pass starts again, without that source.
        """
        if isinstance(error, pg.LockNotAvailable):  # REINDEX locks an index more than its table
            locked = Trouble("another transaction holds a lock on the table or an index of it")
            each.behind(locked, now=time.monotonic())
            raise StartAgain from error
        if isinstance(error, psycopg.Error):
            if self.connection.broken or (error.sqlstate or CONNECTION_LOST[0]).startswith(
                CONNECTION_LOST
            ):
                return False
            if isinstance(
                error, psycopg.OperationalError
            ):  # a time-out, a deadlock, no memory: it may be read later
                later = Trouble(f"it cannot be read now: {first_line(error)}", "syncd check", "see")
                each.behind(later, now=time.monotonic())
            elif not each.careful:
                each.careful = (
                    True  # with the present names; then find the row, and read the others
                )
                raise ReadRegistryAgain from error
            else:
                each.failed(explained(each, error, self.connection.info.user), now=time.monotonic())
            raise StartAgain from error
        if isinstance(error, SyncdError | OSError):
            each.failed(Trouble(str(error)), now=time.monotonic())
        else:
            each.failed_unexpectedly(error, now=time.monotonic())
        return True

    def scan_page(self, each: FollowedSource) -> None:
        """Read one page of a scan at the pass's snapshot; later changes of its rows come through the outbox."""
        scan, begun = each.scan, time.monotonic()
        assert scan is not None
        if scan.expected is None:
            scan.expected = expected_rows(self.connection, each, scan)
        only = None if scan.only is None else sorted(scan.only)
        rows, failing, until = read_page(
            self.connection,
            each.source,
            scan.after,
            only,
            scan.page_rows,
            careful=each.careful,
            some_indexed=each.datasets.some_indexed,
        )
        if apply(each, failing, rows):
            each.unconfirmed.everything = True
        each.quarantine.put_failing(failing)
        if until is None:
            each.reject_unkeyed(read_unkeyed(self.connection, each.source, careful=each.careful))
        scan.note_page(until, rows, time.monotonic() - begun)
        if until is None and each.end_scan():
            each.unconfirmed.everything = True

    def commit(self) -> None:
        """End the transaction."""
        self.connection.execute(statement("passes", "commit"))

    def rollback(self) -> None:
        """End the transaction, if the connection is still there."""
        if not self.connection.closed:
            self.connection.execute(statement("passes", "rollback"))


def local_settings(connection: psycopg.Connection) -> LiteralString:
    """The settings of a pass, for its transaction."""
    return ";\n".join((session.settings(connection, *SETTINGS), statement("passes", "limits")))


def session_settings(connection: psycopg.Connection) -> LiteralString:
    """The same for a session of our own."""
    return session.own_session_settings(connection, *SETTINGS, limits=statement("passes", "limits"))
