"""The keys that changed between two snapshots.

The cursor is a snapshot (the technique of PgQ): new rows are of transactions that the old snapshot
does not see and the current one does. An id as cursor would lose a transaction that took a lower
id and committed later. A bound at the oldest open transaction would stop there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import psycopg
from psycopg import sql

from syncd.postgres.batch import Query, ask, named, numbered, numbered_text
from syncd.postgres.source import condition_of
from syncd.shard import WHOLE, Shard
from syncd.statements import filled, number_list, statement
from syncd.types import Position, Snapshot

PAGE_ROWS = 5000
KEY = "k"
"""The ``op`` of an outbox row with a key; the other rows are markers."""


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the outbox between a position and ``end``, read up to ``after`` (xid, id)."""

    end: Snapshot
    after: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cursor:
    """Progress of a source's changes.

    All changes at ``position`` are applied, and the window's pages up to ``window.after``.
    """

    position: Position
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """One page of changed keys by source, each once, in the outbox's form.

    ``cursor`` is the cursor after they are applied. ``rows`` is the number of outbox rows read,
    those of other shards too, and ``newer_rows`` the number of them with an id above the given one.
    ``unkeyed`` are the sources with written rows that have no key.
    """

    keys: dict[int, list[str]]
    cursor: Cursor
    rows: int
    newer_rows: int
    unkeyed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Marker:
    """A change of a whole source. ``op``: t truncated, r to be read again."""

    source: int
    op: str


def read_markers(
    connection: psycopg.Connection, cursor: Cursor, sources: Sequence[int]
) -> list[Marker]:
    """Markers newer than the cursor, in order.

    They are read when a window begins, so that a page never undoes an earlier page.
    """
    bounds = unseen(cursor.position.snapshot)
    (rows,) = ask(connection, named("passes", "read_markers", *bounds, array(sources)))
    return [Marker(*row) for row in rows]


def has_markers(connection: psycopg.Connection, snapshot: Snapshot) -> bool:
    """Whether there are markers that a snapshot does not see."""
    (rows,) = ask(connection, named("passes", "read_marked", *unseen(snapshot)))
    return rows == [(True,)]


def registry_changed(connection: psycopg.Connection, snapshot: Snapshot) -> bool:
    """Whether anything was attached or detached since a snapshot."""
    (rows,) = ask(connection, named("passes", "read_registry_changes", *unseen(snapshot)))
    return bool(rows)


@dataclass(frozen=True, slots=True)
class Page:
    """The answer to one statement that reads changed keys.

    ``keys`` are sources with keys. ``last`` is the (xid, id) of the last row; it is (0, 0) for a
    page without rows. ``marked``: whether it has a marker, of any source. See ``Changes`` for the
    numbers of rows.
    """

    keys: Sequence[tuple[int, str | None]]
    rows: int
    newer_rows: int
    last: tuple[int, int]
    newest_id: int
    marked: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """The changed keys that are asked for: those of some sources, at one cursor.

    Keys of other shards are left out, except those of the sources ``unfiltered``. ``newer_than`` is
    the id from which on the rows are counted.
    """

    cursor: Cursor
    sources: Sequence[int]
    page_rows: int
    newer_than: int = 0
    shard: Shard = WHOLE
    unfiltered: Sequence[int] = ()

    def queries(self) -> list[Query]:
        """The statements that read the next page: ``page_rows`` rows each at most."""
        return [self.query(name, bounds) for name, bounds in key_queries(self.cursor)]

    def query(self, name: str, bounds: Sequence[str]) -> Query:
        """One of them. For a shard, the server leaves out the others."""
        parameters = [*bounds, array(self.sources), str(self.page_rows)]
        if self.shard.is_whole:
            return Query(numbered("passes", name), parameters, binary=True)
        more = [str(self.newer_than), array(self.unfiltered)]
        return Query(of_shard(name, self.shard), [*parameters, *more], binary=True)

    def page(self, found: Sequence[Sequence[Any]]) -> Page:
        """The page of the rows that a statement returned."""
        if self.shard.is_whole:
            return Page(
                [(source, key) for _, _, source, op, key in found if op == KEY],
                len(found),
                sum(row[1] > self.newer_than and row[3] == KEY for row in found),
                (found[-1][0], found[-1][1]) if found else (0, 0),
                max((row[1] for row in found), default=0),
                any(row[3] != KEY for row in found),
            )
        rows, newer_rows, last_xid, last_id, newest_id = found[0][:5]
        return Page(
            [(source, key) for *_, source, op, key in found if op == KEY],
            rows,
            newer_rows,
            (last_xid or 0, last_id or 0),
            newest_id or 0,
            any(row[8] not in (None, KEY) for row in found),
        )


def read_changes(
    connection: psycopg.Connection,
    asked: Asked,
    now: Snapshot,
    pages: Sequence[Page] | None = None,
) -> Changes:
    """The next page of keys that changed since a cursor, read at the snapshot ``now``.

    ``pages`` are the answers to ``asked.queries()``, if they were asked before.
    """
    cursor = asked.cursor
    keys: dict[int, dict[str, None]] = {}
    last = cursor.window.after if cursor.window is not None else None
    rows, newer_rows, newest_id, unkeyed = 0, 0, cursor.position.outbox_id, set[int]()
    for page in read_pages(connection, asked) if pages is None else pages:
        for source, key in page.keys:
            some = keys.setdefault(source, {})
            if key is None:
                unkeyed.add(source)
            else:
                some[key] = None
        if page.rows:
            last = page.last
            newest_id = max(newest_id, page.newest_id)
            newer_rows += page.newer_rows
            rows += page.rows
        if rows >= asked.page_rows:
            end = cursor.window.end if cursor.window else now
            assert last is not None, "a full page has a last row"
            following = Cursor(replace(cursor.position, outbox_id=newest_id), Window(end, last))
            break
    else:
        following = Cursor(Position(cursor.window.end if cursor.window else now, newest_id))
    return Changes(
        {source: list(found) for source, found in keys.items()},
        following,
        rows,
        newer_rows,
        frozenset(unkeyed),
    )


def read_pages(connection: psycopg.Connection, asked: Asked) -> Iterator[Page]:
    """The answers to ``asked.queries()``; in a window one by one: the first page is often full."""
    queries = asked.queries()
    if asked.cursor.window is None:
        yield from map(asked.page, ask(connection, *queries))
        return
    for query in queries:
        (rows,) = ask(connection, query)
        yield asked.page(rows)


@cache
def of_shard(name: str, shard: Shard) -> bytes:
    """A statement that reads changed keys, for a shard. Composing it takes 0.1 ms."""
    page = sql.SQL(statement("passes", name))
    mine = condition_of(shard, sql.Identifier("syncd_p", "key"))
    return numbered_text(filled("passes", "of_shard", page=page, mine=mine).as_string())


def who_locks_the_outbox(connection: psycopg.Connection) -> str:
    """Reason why the outbox cannot be read now, in words."""
    row = connection.execute(statement("passes", "read_outbox_locks"), prepare=False).fetchone()
    who = (
        ""
        if row is None
        else f" by process {row[0]}"
        if row[0] is not None
        else " by a prepared transaction"
    )
    return f"table syncd.outbox is locked{who}" + (
        f": {row[1]}" if row is not None and row[1] else ""
    )


def key_queries(cursor: Cursor) -> Iterator[tuple[str, list[str]]]:
    """The statements that read changed keys after a cursor, each with its bounds as parameters.

    Transactions in progress at the position come first: their ids are below xmax, so the two ranges
    are in order of (xid, id).
    """
    snapshot, window = cursor.position.snapshot, cursor.window
    in_progress, xmax = unseen(snapshot)
    if window is None:
        if snapshot.in_progress:
            yield "read_keys_in_progress", [in_progress]
        yield "read_keys_begun_since", [xmax]
        return
    end = str(window.end)
    if snapshot.in_progress:
        xid, outbox_id = window.after
        yield "read_more_keys_in_progress", [in_progress, str(xid), str(outbox_id), end]
    xid, outbox_id = max(window.after, (snapshot.xmax, 0))
    yield "read_more_keys_begun_since", [str(xid), str(xid), str(outbox_id), end]


def unseen(snapshot: Snapshot) -> list[str]:
    """The bounds of both ranges of the outbox's index that a snapshot does not see.

    They are text, so that the parameters of a prepared statement have one type whatever they hold.
    """
    return [array(snapshot.in_progress), str(snapshot.xmax)]


def array(numbers: Iterable[int]) -> str:
    """An array of numbers as PostgreSQL reads it."""
    return f"{{{number_list(numbers)}}}"
