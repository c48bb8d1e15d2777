"""The keys that changed between two snapshots.

The cursor is a snapshot (the technique of PgQ): new rows are of transactions that the old snapshot
does not see and the current one does. An id as cursor would lose a transaction that took a lower
id and committed later. A bound at the oldest open transaction would stop there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import psycopg
from psycopg import sql

from syncd.postgres.source import condition_of
from syncd.shard import WHOLE, Shard
from syncd.statements import filled, number_list, statement
from syncd.types import Position, Snapshot

PAGE_ROWS = 5000


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
    parameters = [*unseen(cursor.position.snapshot), array(sources)]
    result = connection.execute(statement("passes", "read_markers"), parameters, prepare=True)
    return [Marker(*row) for row in result.fetchall()]


def registry_changed(connection: psycopg.Connection, snapshot: Snapshot) -> bool:
    """Whether anything was attached or detached since a snapshot."""
    query = statement("passes", "read_registry_changes")
    return connection.execute(query, unseen(snapshot), prepare=True).fetchone() is not None


def read_changes(
    connection: psycopg.Connection,
    cursor: Cursor,
    sources: Sequence[int],
    now: Snapshot,
    page_rows: int,
    newer_than: int = 0,
    shard: Shard = WHOLE,
    unfiltered: Sequence[int] = (),
    answers: Sequence[psycopg.Cursor] | None = None,
) -> Changes:
    """The next page of keys that changed since ``cursor``, read at the snapshot ``now``.

    Keys of other shards are left out, except those of the sources ``unfiltered``. ``answers`` are
    those of ``ask_keys`` for each of ``key_queries``, if they were asked before: with the same
    ``page_rows``, or a page that is not the last one would be taken for it.
    """
    keys: dict[int, dict[str, None]] = {}
    last = cursor.window.after if cursor.window is not None else None
    rows, newer_rows, newest_id, unkeyed = 0, 0, cursor.position.outbox_id, set[int]()
    for place, (name, bounds) in enumerate(key_queries(cursor)):
        if answers is None:
            parameters = key_parameters(bounds, sources, page_rows - rows, newer_than, unfiltered)
            answer = ask_keys(connection, name, parameters, shard)
        else:
            answer = answers[place]
        page = read_page(answer, newer_than, shard)
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
        if rows >= page_rows:
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


@dataclass(frozen=True, slots=True)
class Page:
    """The result of one statement that reads changed keys.

    ``keys`` are sources with keys. ``last`` is the (xid, id) of the last row; it is (0, 0) for a
    page without rows. See ``Changes`` for the numbers of rows.
    """

    keys: Sequence[tuple[int, str | None]]
    rows: int
    newer_rows: int
    last: tuple[int, int]
    newest_id: int


def key_parameters(
    bounds: Sequence[str],
    sources: Sequence[int],
    page_rows: int,
    newer_than: int,
    unfiltered: Sequence[int],
) -> list[str]:
    """The parameters of ``ask_keys``; the last two are for shards only."""
    return [*bounds, array(sources), str(page_rows), str(newer_than), array(unfiltered)]


def ask_keys(
    connection: psycopg.Connection, name: str, parameters: Sequence[str], shard: Shard
) -> psycopg.Cursor:
    """Run one statement that reads changed keys. In a pipeline the answer comes later.

    For a shard, the server leaves out the others.
    """
    if shard.is_whole:
        query, parameters = statement("passes", name), parameters[:-2]
        return connection.execute(query, parameters, prepare=True, binary=True)
    return connection.execute(of_shard(name, shard), parameters, prepare=True, binary=True)


def read_page(answer: psycopg.Cursor, newer_than: int, shard: Shard) -> Page:
    """The page of an answer to ``ask_keys``."""
    found = answer.fetchall()
    if shard.is_whole:
        return Page(
            [row[2:] for row in found],
            len(found),
            sum(row[1] > newer_than for row in found),
            found[-1][:2] if found else (0, 0),
            max((row[1] for row in found), default=0),
        )
    rows, newer_rows, last_xid, last_id, newest_id = found[0][:5]
    return Page(
        [row[7:] for row in found if row[7] is not None],
        rows,
        newer_rows,
        (last_xid or 0, last_id or 0),
        newest_id or 0,
    )


@cache
def of_shard(name: str, shard: Shard) -> bytes:
    """A statement that reads changed keys, for a shard. Composing it takes 0.1 ms."""
    page = sql.SQL(statement("passes", name))
    mine = condition_of(shard, sql.Identifier("syncd_p", "key"))
    return filled("passes", "of_shard", page=page, mine=mine).as_bytes()


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
