"""The first statements of a pass in one message, from BEGIN to the changed keys.

None of them needs the answer of another one. One message saves most of a small pass's processor
time in the server: its session wakes up once, and not each time with cold caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psycopg
from psycopg import sql

from syncd.postgres.batch import Query, ask, named
from syncd.postgres.catalogue import questions, told_catalogues
from syncd.postgres.outbox import Asked, Page, array
from syncd.postgres.source import Source
from syncd.statements import filled, statement
from syncd.sync.consumer.taken import Taken
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.looking import Looks

PREPARED_SOURCES = 8
"""Number of sources whose reads are prepared in advance; 100 statements are kept."""
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


def read_first(
    connection: psycopg.Connection,
    begin: Sequence[Query],
    consumer: str,
    looks: Looks,
    locked: Sequence[FollowedSource],
    asked: Sequence[Asked],
) -> Answers:
    """Take the snapshot, and read the first facts with it, after the statements ``begin``.

    An error is the first one of the message; the transaction is open then.
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
        )
    )
    for _ in begin:
        next(answers)
    (row,) = next(answers)
    taken = Taken.parse(row)
    told = told_catalogues(looks.looks, {name: next(answers) for name in facts})
    return Answers(
        taken,
        looks,
        told,
        {
            tuple(each.sources): (each, [each.page(next(answers)) for _ in some])
            for each, some in zip(at_once, pages, strict=True)
        },
    )


def prepare_reads(
    connection: psycopg.Connection, prepared: Prepared, locked: Sequence[FollowedSource]
) -> None:
    """Prepare what the next pass may read, in a pass that has time: it finds the plans made.

    If a rule is no longer valid, its statement is not prepared. The source fails later, when its
    rows are read.
    """
    for each in locked[:PREPARED_SOURCES]:
        source = each.source
        if source.keys_query in prepared.tried or each.careful or each.failure is not None:
            continue
        prepared.tried.add(source.keys_query)
        connection.execute(statement("passes", "savepoint"))
        try:
            ask(connection, source.read([]))
        except psycopg.Error:
            if connection.broken:
                raise
            connection.execute(statement("passes", "rollback_to_savepoint"))
        connection.execute(statement("passes", "release_savepoint"))
