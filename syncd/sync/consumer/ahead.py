"""The first statements of a pass in one message, from BEGIN to the changed keys.

None of them needs the answer of another one. One message instead of five saves most of a small
pass's processor time in the server: its session wakes up once, and not each time with cold caches.

Invariant: a statement that is to stay prepared is sent in a batch only if an earlier pass has
prepared it. So it is known what the server has prepared, also if a batch fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql

from syncd.postgres.catalogue import ask_catalogues, questions, told_catalogues
from syncd.postgres.outbox import Cursor, key_queries
from syncd.postgres.source import Source
from syncd.statements import filled, statement
from syncd.sync.consumer.outcome import by_cursor
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.looking import Looks, choose_looks

PREPARED_SOURCES = 8
"""Number of sources whose reads are prepared in advance; psycopg keeps 100 statements."""

Batch = tuple[Cursor, tuple[int, ...]]
"""A cursor, and the ids of the sources at it."""
AskKeys = Callable[[str, Sequence[str], Sequence[FollowedSource]], psycopg.Cursor]
"""Runs one of ``key_queries``, by name and bounds, for some sources at one cursor."""


@dataclass(slots=True)
class Prepared:
    """What a connection has prepared, as far as batches need it."""

    names: set[str | bytes] = field(default_factory=set)
    """Names of statements, and the text of those that read one source's rows by key."""
    tried: set[bytes] = field(default_factory=set)
    """Text of the statements that ``prepare_reads`` has tried."""
    locked: list[Source] = field(default_factory=list)
    lock: bytes = b""
    """The statement that locked the outbox and the tables ``locked`` in the last batch."""

    def lock_of(self, sources: Sequence[FollowedSource]) -> bytes:
        """One statement that locks the outbox and the sources' tables."""
        tables = [each.source for each in sources]
        if not self.lock or tables != self.locked:
            names = [sql.Identifier("syncd", "outbox"), *(each.locked for each in tables)]
            lock = filled("passes", "lock_tables", tables=sql.SQL(", ").join(names))
            self.lock, self.locked = lock.as_bytes(None), tables
        return self.lock


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers to the first statements of a pass."""

    snapshot: tuple[Any, ...]
    looks: Looks
    found: dict[int, str]
    """Facts of the catalogue by source."""
    keys: dict[Batch, list[psycopg.Cursor]]


def read_ahead(
    connection: psycopg.Connection,
    prepared: Prepared,
    all_sources: Sequence[FollowedSource],
    wanted: Sequence[FollowedSource],
    due: Sequence[FollowedSource],
    snapshot_parameters: Sequence[str],
    ask_keys: AskKeys,
) -> Answers | None:
    """Open the transaction, lock the sources ``wanted``, take the snapshot, and read with it.

    Returns None, without a transaction, if a statement is not prepared yet or a page of a large
    window is next. An error is the first one of the batch; the transaction is open then.
    """
    looks = choose_looks(all_sources, wanted)
    batches = [
        (cursor, group, list(key_queries(cursor))) for cursor, group in by_cursor(due).items()
    ]
    names: set[str | bytes] = {"read_snapshot", *questions(looks.looks)}
    names.update(name for _, _, queries in batches for name, _ in queries)
    if not names <= prepared.names or any(cursor.window for cursor, _, _ in batches):
        return None
    with connection.pipeline():
        connection.execute(statement("passes", "begin_pass"))  # these two are always parsed
        connection.execute(prepared.lock_of(wanted))
        query = statement("passes", "read_snapshot")
        snapshot = connection.execute(query, snapshot_parameters, prepare=True)
        facts = ask_catalogues(connection, looks.looks, prepare=True)
        keys = {
            (cursor, tuple(each.source.id for each in group)): [
                ask_keys(name, bounds, group) for name, bounds in queries
            ]
            for cursor, group, queries in batches
        }
    row = snapshot.fetchone()
    assert row is not None
    return Answers(row, looks, told_catalogues(looks.looks, facts), keys)


def prepare_reads(
    connection: psycopg.Connection,
    prepared: Prepared,
    locked: Sequence[FollowedSource],
    ask_keys: AskKeys,
) -> None:
    """Prepare what the next pass may read, in a pass that has time: it finds the plans made.

    If a rule is no longer valid, its statement is not prepared. The source fails later, when its
    rows are read.
    """
    if "read_keys_in_progress" not in prepared.names:
        for name, bound in (("read_keys_in_progress", "{}"), ("read_keys_begun_since", "9" * 18)):
            ask_keys(name, [bound], [])
            prepared.names.add(name)
    for each in locked[:PREPARED_SOURCES]:
        source = each.source
        if source.prepare is False or source.keys_query in prepared.tried:
            continue
        if each.careful or each.failure is not None:
            continue
        prepared.tried.add(source.keys_query)
        connection.execute(statement("passes", "savepoint"))
        try:
            psycopg.RawCursor(connection).execute(
                source.keys_query, [source.key_array(())], prepare=True, binary=True
            )
            prepared.names.add(source.keys_query)
        except psycopg.Error:
            if connection.broken:
                raise
            connection.execute(statement("passes", "rollback_to_savepoint"))
        connection.execute(statement("passes", "release_savepoint"))
