"""The first statements of a pass in one message, from BEGIN to the changed keys.

None of them needs the answer of another one. One message saves most of a small pass's processor
time in the server: its session wakes up once, and not each time with cold caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from syncd.postgres.batch import Query, ask, named
from syncd.postgres.catalogue import questions, told_catalogues
from syncd.postgres.outbox import Asked, Page, array
from syncd.postgres.source import GUESSED_KEYS, Source
from syncd.statements import filled, statement
from syncd.sync.consumer.taken import Taken
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.looking import Looks
from syncd.types import Position

NO_XID = 10**18
"""A transaction id that no server reaches."""
PREPARED_SOURCES = 8
"""Number of sources whose reads are prepared in advance; 100 statements are kept."""
GUESSED_SOURCES = 2
"""Number of sources whose changed rows the first message reads: each costs the server 0.1 ms."""
BEGIN = Query(statement("passes", "begin_pass").encode())
COMMIT = Query(statement("passes", "commit").encode())

Batch = tuple[int, ...]
"""The ids of the sources that are asked about together; they are at one cursor."""


@dataclass(slots=True)
class Prepared:
    """What a pass prepares for the next one, on one connection."""

    tried: set[bytes] = field(default_factory=set)
    """Text of the statements that ``prepare_reads`` has tried."""
    locked: list[Source] = field(default_factory=list)
    lock: Query = BEGIN
    """The statement that locked the outbox and the tables ``locked`` in the last pass."""

    def is_done(self, sources: Sequence[FollowedSource]) -> bool:
        """Whether ``prepare_reads`` has nothing left to do."""
        return all(
            each.source.keys_query in self.tried or each.careful or each.failure is not None
            for each in sources[:PREPARED_SOURCES]
        )

    def lock_of(self, sources: Sequence[FollowedSource]) -> Query:
        """One statement that locks the outbox and the sources' tables."""
        tables = [each.source for each in sources]
        if self.lock is BEGIN or tables != self.locked:
            names = [sql.Identifier("syncd", "outbox"), *(each.locked for each in tables)]
            lock = filled("passes", "lock_tables", tables=sql.SQL(", ").join(names))
            few = len(tables) <= PREPARED_SOURCES  # with more, it is often another statement
            self.lock, self.locked = Query(lock.as_bytes(None), prepare=few), tables
        return self.lock


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to the first statements of a pass."""

    taken: Taken
    looks: Looks
    found: dict[int, str]
    """Facts of the catalogue by source."""
    pages: Mapping[Batch, tuple[Asked, list[Page]]]
    """The first page of changed keys, for the sources that have no window."""
    guessed: Mapping[int, list[Any]] | None
    """Changed rows by source, if the transaction has ended; None if it is open."""

    def rows_of(self, source_id: int) -> Sequence[Any] | None:
        """The changed rows of a source, if the transaction has ended; None if it is open."""
        return None if self.guessed is None else self.guessed.get(source_id, ())

    def hold(self, locked: Sequence[FollowedSource]) -> bool:
        """Whether the pass needs nothing of its snapshot but these answers.

        Then every changed row is among ``guessed``, there are no markers, and the catalogue is as
        before. Changed facts must be read at the rows' snapshot: if a table is rewritten after it,
        the comparison that begins now would take the rows' old values for the present ones.
        """
        assert self.guessed is not None
        ((_, pages),) = self.pages.values()
        keys = [each for page in pages for each in page.keys]
        sources = {each.source.id: each.source for each in locked}
        return (
            sum(page.rows for page in pages) <= GUESSED_KEYS
            and not any(page.marked for page in pages)
            and not self.taken.renamed(locked)
            and all(
                number in self.guessed and key is not None and not sources[number].is_unkeyed(key)
                for number, key in keys
            )
            and all(
                (self.found.get(number), self.taken.marks.get(each.source.oid))
                == (each.catalogue.seen, each.catalogue.mark)
                for number, each in self.looks.chosen.items()
            )
        )


def read_first(
    connection: psycopg.Connection,
    begin: Sequence[Query],
    consumer: str,
    looks: Looks,
    locked: Sequence[FollowedSource],
    asked: Sequence[Asked],
    guesses: Sequence[FollowedSource] | None = None,
) -> Answers:
    """Take the snapshot, and read the first facts with it, after the statements ``begin``.

    With ``guesses`` the message also reads the changed rows of these sources, and ends the
    transaction. An error is the first one of the message; the transaction is open then.
    """
    oids = {*looks.oids, *(each.source.oid for each in locked)}
    facts = questions(looks.looks)
    at_once = [each for each in asked if each.cursor.window is None]
    pages = [each.queries() for each in at_once]
    answers = iter(
        ask(
            connection,
            *begin,
            named("passes", "read_snapshot", consumer, array(oids)),
            *facts.values(),
            *(query for some in pages for query in some),
            *(
                each.source.read_changed(each.cursor.position.snapshot.xmax, asked[0].sources)
                for each in guesses or ()
            ),
            *([] if guesses is None else [COMMIT]),
        )
    )
    for _ in begin:
        next(answers)
    taken = Taken.parse(next(answers))
    told = told_catalogues(looks.looks, {name: next(answers) for name in facts})
    found = {
        tuple(each.sources): (each, [each.page(next(answers)) for _ in some])
        for each, some in zip(at_once, pages, strict=True)
    }
    guessed = None if guesses is None else {each.source.id: next(answers) for each in guesses}
    return Answers(taken, looks, told, found, guessed)


def guess(
    position: Position, due: Sequence[FollowedSource], wanted: Sequence[FollowedSource]
) -> list[FollowedSource] | None:
    """The sources of which a pass's first message reads the changed rows; None: it cannot end then.

    They are the last that had changes. A transaction that was open at the position may end at any
    time, so its keys are read first.
    """
    if not due or any(
        each.cursor.position.snapshot != position.snapshot
        or each.cursor != due[0].cursor
        or each.cursor.window is not None
        or each.cursor.position.snapshot.in_progress
        or each.scan is not None
        or each.catalogue.rewritten
        or each.careful
        or each.rereads
        or each.quarantine.unkeyed
        for each in due
    ):
        return None
    ids = {each.source.id for each in due}
    able = [each for each in wanted if each.source.partitions is None and each.source.id in ids]
    changed = [each for each in able if each.dirty_at]
    return sorted(changed or able, key=lambda each: -each.dirty_at)[:GUESSED_SOURCES]


def prepare_reads(
    connection: psycopg.Connection, prepared: Prepared, locked: Sequence[FollowedSource]
) -> None:
    """Prepare what the next pass may read, in a pass that has time: it finds the plans made.

    A statement with an invalid rule is not prepared. Its source fails when its rows are read.
    """
    for each in locked[:PREPARED_SOURCES]:
        source = each.source
        if prepared.is_done([each]):
            continue
        prepared.tried.add(source.keys_query)
        connection.execute(statement("passes", "savepoint"))
        try:
            ask(connection, source.read([]))
            if source.partitions is None:
                ask(connection, source.read_changed(NO_XID, ()))
        except psycopg.Error:
            if connection.closed:
                raise
            connection.execute(statement("passes", "rollback_to_savepoint"))
        connection.execute(statement("passes", "release_savepoint"))
