"""One pass: move every index from the snapshot it stands at to the one that the pass takes.

Invariant: snapshot, changed keys and rows are read in one REPEATABLE READ transaction, and no source's rows are read without a lock on it that is
older than the snapshot. A source's cursor moves only after all that was read for it has been applied.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import errors as pg
from psycopg import sql

from syncd.errors import ConsumerReplaced, DatabaseUnreachable, SyncdError
from syncd.postgres.connection import first_line
from syncd.postgres.outbox import Changes, Cursor, read_changes, read_markers, registry_changed, window_range
from syncd.postgres.source import Source, passes, read_sources
from syncd.sync.watched import WatchedSource
from syncd.types import Position, Snapshot

LOCK_ALL_UP_TO = 8
RECENTLY_DIRTY_SECONDS = 5.0
KEYS_PER_READ = 1000
REREAD_PER_PASS = 5000


@dataclass(slots=True)
class PassOutcome:
    """What a pass did: the snapshot it took, and whether there is more to do at once."""

    snapshot: Snapshot
    newest_outbox_id: int = 0
    changed_rows: int = 0
    outbox_rows: int = 0
    more: bool = False
    handed_over: bool = False
    sources: list[Source] | None = None
    locked: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Handover:
    """Somebody who wants the indexes and the tables at one snapshot: ``take`` is called in a pass that has brought the sources of the ids
    ``wanted`` to it, or has found that they fail, while its transaction is still open.

    ``take`` is given a snapshot that another transaction can import, the position, and the sources.
    """

    wanted: frozenset[int]
    take: Callable[[str, Position, Sequence[WatchedSource]], None]


class StartAgain(Exception):
    """The pass must begin anew, with other sources locked, or without one that failed."""


@dataclass(slots=True)
class Pass:
    """A pass over some sources, on a connection in autocommit mode that is used for nothing else."""

    connection: psycopg.Connection
    consumer: str
    run_id: str
    position: Position
    """Of the newest pass; what was attached or detached since then is looked for."""
    pooled: bool
    """Whether the connection may lead to another session in each transaction."""
    handover: Handover | None = None

    @property
    def rows(self) -> psycopg.RawCursor[tuple[Any, ...]]:
        """For the statements of a source, in which a percent sign is a percent sign."""
        return psycopg.RawCursor(self.connection)

    def run(self, watched: Sequence[WatchedSource]) -> PassOutcome:
        """Take a snapshot and bring the sources to it; raises ``psycopg.OperationalError`` when the connection is lost."""
        now = time.monotonic()
        due = [source for source in watched if source.retry_at <= now and source.source.table is not None]
        for source in watched:
            if source.source.table is None and source.failure is None:
                source.failed("the table was dropped: run: syncd detach " + str(source.source.oid), now=now)
        needed = self.handover.wanted if self.handover is not None else frozenset()
        wanted = [
            s
            for s in due
            if len(due) <= LOCK_ALL_UP_TO or s.dirty_at > now - RECENTLY_DIRTY_SECONDS or s.source.id in needed
        ]
        while True:
            try:
                locked = self.begin(wanted)
                return self.move(due, locked)
            except StartAgain as again:
                self.rollback()
                retry = [] if not again.args else again.args[0]
                wanted = [each for each in (*wanted, *retry) if each.retry_at <= time.monotonic()]
            except (
                pg.UndefinedTable,
                pg.InvalidSchemaName,
            ):  # renamed or dropped: the registry knows its name by its oid
                self.rollback()
                return PassOutcome(self.position.snapshot, more=True, sources=read_sources(self.connection))
            except BaseException:
                self.rollback()
                raise

    def begin(self, wanted: Sequence[WatchedSource]) -> list[WatchedSource]:
        """Open the transaction and lock the sources, before there is a snapshot. Returns those that could be locked."""
        begin = [passes("begin_pass")]
        if self.pooled:
            begin.append(passes("local_settings"))
        try:
            self.connection.execute(sql.SQL(";\n").join([*begin, *(each.source.lock() for each in wanted)]))
            return list(wanted)
        except (pg.LockNotAvailable, pg.InsufficientPrivilege):
            self.rollback()
        self.connection.execute(sql.SQL(";\n").join(begin))
        locked = []
        for each in wanted:
            self.connection.execute(passes("savepoint"))
            try:
                self.connection.execute(each.source.lock())
            except pg.LockNotAvailable:
                self.connection.execute(passes("rollback_to_savepoint"))
                each.behind("another transaction holds a lock on the table", now=time.monotonic())
            except pg.InsufficientPrivilege:
                self.connection.execute(passes("rollback_to_savepoint"))
                each.failed(
                    f"the role that syncd connects as may not read {each.source.name}: GRANT SELECT ON {each.source.name} TO it",
                    now=time.monotonic(),
                )
            else:
                locked.append(each)
            self.connection.execute(passes("release_savepoint"))
        return locked

    def move(self, due: Sequence[WatchedSource], locked: Sequence[WatchedSource]) -> PassOutcome:
        """Everything after the locks: from the snapshot to the new cursors."""
        oldest = min([self.position.snapshot, *(each.cursor.position.snapshot for each in due)], key=Snapshot.age)
        snapshot, newest_outbox_id, names_changed, marked = self.take_snapshot(locked, oldest)
        if names_changed or (marked and registry_changed(self.connection, self.position.snapshot)):
            sources = read_sources(self.connection)
            self.commit()
            return PassOutcome(snapshot, newest_outbox_id, more=True, sources=sources)
        outcome = PassOutcome(snapshot, newest_outbox_id, locked={each.source.id for each in locked})
        now = time.monotonic()
        ready = [each for each in due if each.retry_at <= now and each.source.table is not None]
        for cursor, group in by_cursor(ready).items():
            ids = [each.source.id for each in group]
            markers = read_markers(self.connection, cursor, ids) if marked and cursor.window is None else []
            changes = read_changes(self.connection, cursor, ids, snapshot)
            outcome.outbox_rows += changes.rows
            dirty = {marker.source for marker in markers} | set(changes.keys)
            for each in group:
                if each.source.id in dirty or each.scan is not None or each.reread:
                    each.dirty_at = now
            unlocked = [each for each in group if each.dirty_at == now and each.source.id not in outcome.locked]
            if unlocked:
                raise StartAgain(unlocked)
            for each in group:
                for marker in markers:
                    if marker.source == each.source.id:
                        apply_marker(each, marker.op)
                outcome.changed_rows += self.bring(each, changes)
                outcome.more |= changes.cursor.window is not None or bool(each.reread)
        for each in ready:
            if each.scan is not None and each.cursor.window is None and each.failure is None:
                self.scan_page(each)
                outcome.more = True
                break  # one page a pass: changes of the others are not kept waiting
        outcome.handed_over = self.hand_over(snapshot, newest_outbox_id, watched=due)
        self.commit()
        for each in ready:
            if each.retry_at <= now:
                each.caught_up()
        return outcome

    def hand_over(self, snapshot: Snapshot, newest_outbox_id: int, watched: Sequence[WatchedSource]) -> bool:
        """Let whoever waits for it take the indexes and the snapshot, if all that was asked for is there; whether that was so."""
        if self.handover is None:
            return False
        wanted = [each for each in watched if each.source.id in self.handover.wanted]
        if any(not each.is_failed and (each.lags or each.cursor.position.snapshot != snapshot) for each in wanted):
            return False
        row = self.connection.execute(passes("export_snapshot")).fetchone()
        assert row is not None
        self.handover.take(row[0], Position(snapshot, newest_outbox_id), wanted)
        return True

    def take_snapshot(self, locked: Sequence[WatchedSource], oldest: Snapshot) -> tuple[Snapshot, int, bool, bool]:
        """S1, the newest outbox id, whether a locked table's name belongs to another oid by now, and whether there are markers.

        Raises when this is no longer our place to be.
        """
        query = passes("read_snapshot").format(
            consumer=sql.Literal(self.consumer),
            oids=sql.Literal([each.source.oid for each in locked]),
            range=sql.SQL(window_range(oldest)),
        )
        row = self.connection.execute(query, prepare=False).fetchone()
        assert row is not None
        snapshot, newest_outbox_id, in_recovery, run_id, names, marked = row
        if in_recovery:
            raise DatabaseUnreachable("the server has become a standby", hint="name all hosts in SYNCD_DSN")
        if run_id != self.run_id:
            raise ConsumerReplaced(
                f"another process has taken the consumer name {self.consumer!r}",
                hint="stop one of them, or give each its own SYNCD_CONSUMER",
            )
        expected = {(each.source.oid, each.source.schema, each.source.table) for each in locked}
        return Snapshot.parse(snapshot), newest_outbox_id, {tuple(name) for name in names} != expected, marked

    def bring(self, each: WatchedSource, changes: Changes) -> int:
        """Read one source's changed rows, apply them, and move its cursor. Returns how many rows changed."""
        asked = changes.keys.get(each.source.id, [])
        each.note_unconfirmed(asked)
        reread = set(itertools.islice(each.reread, REREAD_PER_PASS))
        each.reread -= reread
        try:
            changed = self.read_and_apply(each, list(dict.fromkeys([*asked, *reread])) if reread else asked)
        except BaseException as error:
            each.reread |= reread
            if self.is_of_source(each, error):
                return 0
            raise
        each.cursor = changes.cursor
        return changed

    def read_and_apply(self, each: WatchedSource, asked: Sequence[str]) -> int:
        """Rows by key, some at a time so that memory stays bounded."""
        changed = 0
        for start in range(0, len(asked), KEYS_PER_READ):
            some = asked[start : start + KEYS_PER_READ]
            rows = self.rows.execute(each.source.read_keys(), [each.source.key_array(some)], binary=True).fetchall()
            changed += each.apply([each.source.parse_key(key) for key in some], rows)
        return changed

    def is_of_source(self, each: WatchedSource, error: BaseException) -> bool:
        """Whether an error concerns one source only, which then waits while the others go on.

        An error of the server's ended the transaction: then the pass starts again, without that source.
        """
        if isinstance(error, psycopg.Error):
            if self.connection.broken or isinstance(error, psycopg.OperationalError):
                return False
            each.failed(first_line(error), now=time.monotonic())
            raise StartAgain from error
        if isinstance(error, SyncdError | OSError | ValueError):
            each.failed(str(error), now=time.monotonic())
            return True
        return False

    def scan_page(self, each: WatchedSource) -> None:
        """Read one page of a scan at the pass's snapshot; later changes of its rows come through the outbox."""
        scan, begun = each.scan, time.monotonic()
        assert scan is not None
        try:
            query = each.source.read_page_end(scan.after, scan.page_rows)
            end = self.rows.execute(query, prepare=False, binary=True).fetchone()
            until = None if end is None else each.source.parse_key(end[0])
            query = each.source.read_range(scan.after, until, None if scan.only is None else sorted(scan.only))
            rows = self.rows.execute(query, prepare=False, binary=True).fetchall()
            each.apply([], rows)
        except Exception as error:
            if self.is_of_source(each, error):
                return
            raise
        scan.note_page(until, rows, time.monotonic() - begun)
        if until is None:
            each.end_scan()

    def commit(self) -> None:
        """End the transaction."""
        self.connection.execute(passes("commit"))

    def rollback(self) -> None:
        """End the transaction, if the connection is still there."""
        if not self.connection.closed:
            self.connection.execute(passes("rollback"))


def by_cursor(watched: Sequence[WatchedSource]) -> dict[Cursor, list[WatchedSource]]:
    """Sources that stand at the same place share one reading of the outbox; in ordinary times that is all of them."""
    groups: dict[Cursor, list[WatchedSource]] = {}
    for each in watched:
        groups.setdefault(each.cursor, []).append(each)
    return groups


def apply_marker(watched: WatchedSource, op: str) -> None:
    """A truncation, or a trigger that could not record keys."""
    if op == "t":
        watched.clear()
    elif op == "r":
        watched.begin_scan(reason="resync")
