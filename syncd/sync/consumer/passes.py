"""One pass: it brings each index from its present snapshot to the one that the pass takes.

Invariant: snapshot, changed keys and rows are read in one REPEATABLE READ transaction. A source's
rows are read only under a lock on its table that is older than the snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import psycopg
import structlog
from psycopg import errors as pg
from psycopg import sql

from syncd.postgres import session
from syncd.postgres.batch import PreparingConnection, Query
from syncd.postgres.layout import read_sources
from syncd.postgres.outbox import (
    PAGE_ROWS,
    Asked,
    Changes,
    Cursor,
    has_markers,
    read_changes,
    read_markers,
    registry_changed,
    who_locks_the_outbox,
)
from syncd.shard import WHOLE, Shard
from syncd.statements import statement
from syncd.sync.consumer.ahead import (
    BEGIN,
    Answers,
    Prepared,
    guess,
    prepare_reads,
    read_first,
)
from syncd.sync.consumer.bringing import bring, is_read_at_once, scan_page
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
from syncd.sync.consumer.transaction import Transaction
from syncd.sync.consumer.unrecorded import DOUBT, Doubts
from syncd.sync.source.estimates import nearest_to_its_end
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.looking import FEW_SOURCES, choose_looks, is_late, look, trouble
from syncd.types import Position, Snapshot

LOCK_ALL_UP_TO = 8
"""Up to this many sources, a pass locks all; of more, only those that have had changes lately."""
RECENTLY_DIRTY_SECONDS = 5.0
"""Age of a source's last change up to which a pass locks it in advance."""

logger = structlog.get_logger()


@dataclass(slots=True)
class Pass:
    """A pass over some sources, on its own connection in autocommit mode."""

    connection: PreparingConnection
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
    history: str = ""
    next_xid: int = 0
    shard: Shard = WHOLE
    guesses: bool = False
    """Whether the first message may read the changed rows as well, and end the transaction."""
    expects: bool = True
    """Whether there are changes, as far as it is known."""
    transaction: Transaction = field(init=False)

    OWN: ClassVar[bool] = True
    """Whether the pass takes a snapshot of its own."""

    def __post_init__(self) -> None:
        self.transaction = Transaction(self.connection, self.pooled, self.prepared)

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
        due, wanted = self.choose(due)
        kept, guesses = True, self.guess(due, wanted)
        while True:
            try:
                locked, answers = self.begin(wanted, due, all_sources, guesses)
                return self.move(due, locked, all_sources, answers)
            except StartAgain as again:
                self.transaction.rollback()
                guesses = None
                retry = [] if not again.args else again.args[0]
                wanted = [each for each in (*wanted, *retry) if each.retry_at <= time.monotonic()]
            except (pg.UndefinedTable, pg.InvalidSchemaName, ReadRegistryAgain):
                # a table was renamed or dropped: the registry gives its name by its oid
                self.transaction.rollback()
                with session.transaction(self.connection, "service_settings"):
                    sources = read_sources(self.connection, self.shard)
                return PassOutcome(
                    self.position.snapshot, more=True, sources=sources, took_snapshot=False
                )
            except pg.InvalidSqlStatementName:  # something else has deallocated it
                self.transaction.rollback()
                self.transaction.forget_prepared()
                if not kept:
                    raise
                kept = False
            except pg.LockNotAvailable:  # of the outbox; a locked source is handled elsewhere
                self.transaction.rollback()
                with session.transaction(self.connection, "service_settings"):
                    reason = who_locks_the_outbox(self.connection)
                return PassOutcome(self.position.snapshot, took_snapshot=False, put_off=reason)
            except BaseException:
                self.transaction.rollback()
                raise

    def choose(
        self, due: list[FollowedSource]
    ) -> tuple[list[FollowedSource], list[FollowedSource]]:
        """The sources that the pass brings to its snapshot, and those that it locks in advance."""
        needed = self.handover.wanted if self.handover is not None else frozenset()
        recently = time.monotonic() - RECENTLY_DIRTY_SECONDS
        wanted = [
            each
            for each in due
            if len(due) <= LOCK_ALL_UP_TO or each.dirty_at > recently or each.source.id in needed
        ]
        return due, wanted

    def guess(
        self, due: Sequence[FollowedSource], wanted: Sequence[FollowedSource]
    ) -> list[FollowedSource] | None:
        """The sources whose changed rows the first message reads; None: their keys come first."""
        if (
            not self.guesses
            or self.pooled
            or self.handover is not None
            or not self.OWN
            or not self.shard.is_whole
            or self.doubts.due
            or self.doubts.ended
            or not self.prepared.is_done(wanted)
        ):
            return None
        found = guess(self.position, due, wanted)
        return found if found is None or self.expects else []

    def begin(
        self,
        wanted: Sequence[FollowedSource],
        due: Sequence[FollowedSource],
        all_sources: Sequence[FollowedSource],
        guesses: Sequence[FollowedSource] | None = None,
    ) -> tuple[list[FollowedSource], Answers]:
        """Open the transaction, lock the sources before there is a snapshot, and take it.

        Returns the sources that could be locked, and the answers to the first statements.
        """
        try:
            if not self.pooled and self.OWN:
                first = [BEGIN, self.prepared.lock_of(wanted)]
                return list(wanted), self.read_first(first, wanted, due, all_sources, guesses)
            locks = [each.source.lock() for each in wanted]
            self.connection.execute(sql.SQL(";\n").join([*self.transaction.beginning(), *locks]))
            locked = list(wanted)
        except psycopg.Error as error:
            if self.connection.closed or (
                guesses is None
                and not isinstance(error, pg.LockNotAvailable | pg.InsufficientPrivilege)
            ):
                raise
            self.transaction.rollback()
            if not isinstance(error, pg.LockNotAvailable | pg.InsufficientPrivilege):
                raise StartAgain from error  # a source's own read tells which one it is
            begin_with_outbox(self.connection, sql.SQL(";\n").join(self.transaction.beginning()))
            locked = lock_each(self.connection, wanted)
        self.after_locks()
        return locked, self.read_first([], locked, due, all_sources)

    def read_first(
        self,
        begin: Sequence[Query],
        locked: Sequence[FollowedSource],
        due: Sequence[FollowedSource],
        all_sources: Sequence[FollowedSource],
        guesses: Sequence[FollowedSource] | None = None,
    ) -> Answers:
        """The answers to the first statements, after ``begin``."""
        looks = choose_looks(all_sources, locked, later=self.looks_later(all_sources))
        asked = [self.asked(cursor, group) for cursor, group in by_cursor(due).items()]
        return read_first(self.connection, begin, self.consumer, looks, locked, asked, guesses)

    def after_locks(self) -> None:
        """Choose the snapshot: the first statement that follows takes it."""

    def looks_later(self, all_sources: Sequence[FollowedSource]) -> bool:
        """Whether whole looks are left to a pass of their own: changes do not wait for them.

        That pass follows at once, and passes of a shard must keep a distance.
        """
        few = self.shard.is_whole and len(all_sources) <= FEW_SOURCES
        return few and self.guesses and self.expects

    def move(
        self,
        due: Sequence[FollowedSource],
        locked: Sequence[FollowedSource],
        all_sources: Sequence[FollowedSource],
        answers: Answers,
    ) -> PassOutcome:
        """The pass after the locks: from the snapshot to the new cursors."""
        if answers.guessed is not None and not self.holds(answers, locked):
            raise StartAgain
        taken = self.checked(answers.taken, all_sources)
        snapshot, newest_outbox_id, freed = taken.snapshot, taken.newest_outbox_id, taken.freed
        marked = self.marked(due, answers)
        if (
            taken.renamed(locked)
            or self.position.snapshot.lacks(freed)
            or (marked and registry_changed(self.connection, self.position.snapshot))
        ):
            self.needs_another_snapshot("the attached tables have changed")
            sources = read_sources(self.connection, self.shard)
            self.transaction.commit()
            return PassOutcome(snapshot, newest_outbox_id, more=True, sources=sources)
        if look(self.connection, answers.looks, answers.found, taken.marks):
            self.needs_another_snapshot("the catalogue has changed")
            sources = read_sources(self.connection, self.shard)
            self.transaction.rollback()
            self.transaction.forget_prepared()  # columns may have other types
            return PassOutcome(snapshot, newest_outbox_id, more=True, sources=sources)
        outcome = PassOutcome(
            snapshot, newest_outbox_id, locked={each.source.id for each in locked}
        )
        now = time.monotonic()
        ready = [each for each in due if each.retry_at <= now]
        present = [each for each in all_sources if each.source.table is not None]
        lacking = (
            []
            if freed is None or not self.OWN
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
                if marked and cursor.window is None
                else []
            )
            changes = self.changes(cursor, group, answers)
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
            one = len(groups) == 1 and not marked and answers.guessed is None
            last = self.last_read(group, changes) if one else None
            for each in group:
                with guarded(self.connection, each):
                    for marker in markers:
                        if marker.source == each.source.id:
                            each.apply_marker(marker.op)
                    if each.catalogue.rewritten:  # there was no marker of a truncation
                        each.catalogue.rewritten = False
                        each.doubt(f"{each.source.name}: the table was rewritten", believed=True)
                    outcome.changed_rows += bring(
                        self.connection,
                        each,
                        changes,
                        commit=each is last,
                        guessed=answers.rows_of(each.source.id),
                    )
                outcome.more |= changes.cursor.window is not None or each.rereads
        scanned = [
            each
            for each in ready
            if each.scan is not None and each.cursor.window is None and each.failure is None
        ]
        # one page per pass: changes of the other sources do not wait
        if scanned and self.OWN:
            if not self.doubts.begins_again and not self.transaction.ended:
                nearest = nearest_to_its_end(self.connection, scanned)
                with guarded(self.connection, nearest):
                    scan_page(self.connection, nearest)
            outcome.more = True
        outcome.handed_over = self.hand_over(snapshot, newest_outbox_id, all_sources)
        outcome.looks_wait = self.looks_later(all_sources) and is_late(all_sources)
        if not outcome.more and not self.transaction.ended and not self.pooled and self.OWN:
            prepare_reads(self.connection, self.prepared, locked)
        self.transaction.commit()
        for each in ready:
            if each.retry_at <= now:
                with guarded(self.connection, each):
                    each.caught_up()
        return outcome

    def hand_over(
        self, snapshot: Snapshot, newest_outbox_id: int, all_sources: Sequence[FollowedSource]
    ) -> bool:
        """Hand over indexes and snapshot, if the wanted sources are at it; returns if so."""
        wanted = None if self.handover is None else self.handover.at(snapshot, all_sources)
        if self.handover is None or wanted is None:
            return False
        row = self.connection.execute(statement("passes", "export_snapshot")).fetchone()
        assert row is not None
        self.handover.take(row[0], Position(snapshot, newest_outbox_id), wanted)
        return True

    def holds(self, answers: Answers, locked: Sequence[FollowedSource]) -> bool:
        """Whether a pass whose transaction has ended can go on with its answers."""
        taken = answers.taken
        return (
            taken.doubts == self.doubts.seen
            and not self.position.snapshot.lacks(taken.freed)
            and answers.hold(locked)
        )

    def checked(self, taken: Taken, all_sources: Sequence[FollowedSource]) -> Taken:
        """Check the facts of the snapshot, and note them.

        Raises an error if this process or this server must no longer be followed.
        """
        taken.check(consumer=self.consumer, run_id=self.run_id, incarnation=self.incarnation)
        self.history, self.next_xid = taken.history or "", taken.next_xid
        self.doubts.note(taken.doubts, taken.snapshot)
        for each in all_sources if self.doubts.moved else ():
            if each.source.table is not None:
                each.doubt(f"{each.source.name}: {DOUBT}")
        return taken

    def needs_another_snapshot(self, why: str) -> None:
        """Note that the pass must begin again, or that another one must follow."""

    def marked(self, due: Sequence[FollowedSource], answers: Answers) -> bool:
        """Whether there are markers since the oldest position.

        The pages of changed keys show it, if they begin there and are not full.
        """
        oldest = min(
            [self.position.snapshot, *(each.cursor.position.snapshot for each in due)],
            key=Snapshot.age,
        )
        for asked, pages in answers.pages.values():
            if any(page.marked for page in pages):
                return True
            is_whole = sum(page.rows for page in pages) < asked.page_rows
            if is_whole and asked.cursor.position.snapshot == oldest:
                return False
        return has_markers(self.connection, oldest)

    def asked(self, cursor: Cursor, group: Sequence[FollowedSource]) -> Asked:
        """The changed keys of the sources at one cursor."""
        ids, unfiltered = [each.source.id for each in group], unfiltered_of(group)
        return Asked(cursor, ids, PAGE_ROWS, self.known_outbox_id, self.shard, unfiltered)

    def changes(self, cursor: Cursor, group: Sequence[FollowedSource], answers: Answers) -> Changes:
        """The next page of changed keys of the sources at one cursor."""
        asked, now = self.asked(cursor, group), answers.taken.snapshot
        was_asked, pages = answers.pages.get(tuple(asked.sources), (None, None))
        return read_changes(self.connection, asked, now, pages if was_asked == asked else None)

    def last_read(self, group: Sequence[FollowedSource], changes: Changes) -> FollowedSource | None:
        """The source whose rows are the last that this pass reads: COMMIT goes with that message.

        None if it is not sure which one that is.
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
        return reads[-1]


def unfiltered_of(group: Sequence[FollowedSource]) -> list[int]:
    """The sources of which a shard needs the changed keys of all shards."""
    return [each.source.id for each in group if each.needs_every_change]
