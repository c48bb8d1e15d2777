"""Which keys changed between two snapshots.

The cursor is a snapshot (the technique of PgQ): new rows are those of transactions that the old snapshot did not see and the current one does. An
id cursor would lose a transaction that took a lower id and committed later; a bound at the oldest open transaction would stop at it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import psycopg

from syncd.statements import number_list, statement, with_numbers
from syncd.types import Position, Snapshot

PAGE_ROWS = 5000


@dataclass(frozen=True, slots=True)
class Window:
    """The part of the outbox between a position and ``end``, read up to ``after`` (xid, id) so far."""

    end: Snapshot
    after: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a source's changes were applied: everything at ``position``, and of the window behind it the pages up to ``window.after``."""

    position: Position
    window: Window | None = None


@dataclass(frozen=True, slots=True)
class Changes:
    """One page of changed keys by source, as the outbox has them, each once, and the cursor to be had once they are applied.

    ``unkeyed``: the sources of which rows without a key were written.
    """

    keys: dict[int, list[str]]
    cursor: Cursor
    rows: int
    unkeyed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Marker:
    """A change of a whole source. ``op``: t truncated, r to be read again."""

    source: int
    op: str


def read_markers(
    connection: psycopg.Connection, cursor: Cursor, sources: Sequence[int]
) -> list[Marker]:
    """Markers newer than the cursor, in order. They are read when a window begins, so that a page never undoes an earlier one."""
    query = with_numbers(
        "passes", "read_markers", **unseen(cursor.position.snapshot), sources=number_list(sources)
    )
    result = connection.execute(query, prepare=False)
    return [Marker(*row) for row in result.fetchall()]


def registry_changed(connection: psycopg.Connection, snapshot: Snapshot) -> bool:
    """Whether anything was attached or detached since a snapshot."""
    query = with_numbers("passes", "read_registry_changes", **unseen(snapshot))
    return connection.execute(query, prepare=False).fetchone() is not None


def read_changes(
    connection: psycopg.Connection,
    cursor: Cursor,
    sources: Sequence[int],
    now: Snapshot,
    page_rows: int = PAGE_ROWS,
) -> Changes:
    """The next page of keys that changed since ``cursor``, inside the transaction whose snapshot is ``now``."""
    keys: dict[int, dict[str, None]] = {}
    last = cursor.window.after if cursor.window is not None else None
    rows, newest_id, unkeyed = 0, cursor.position.outbox_id, set[int]()
    for name, bounds in key_queries(cursor):
        query = with_numbers(
            "passes", name, **bounds, sources=number_list(sources), page_rows=page_rows - rows
        )
        result = connection.execute(query, prepare=False, binary=True)
        found = result.fetchall()
        for _, outbox_id, source, key in found:
            some = keys.setdefault(source, {})
            if key is None:
                unkeyed.add(source)
            else:
                some[key] = None
            newest_id = max(newest_id, outbox_id)
        if found:
            last = found[-1][:2]
            rows += len(found)
        if rows >= page_rows:
            end = cursor.window.end if cursor.window else now
            assert last is not None, "a full page has a last row"
            following = Cursor(replace(cursor.position, outbox_id=newest_id), Window(end, last))
            break
    else:
        following = Cursor(Position(cursor.window.end if cursor.window else now, newest_id))
    return Changes(
        {source: list(found) for source, found in keys.items()}, following, rows, frozenset(unkeyed)
    )


def who_locks_the_outbox(connection: psycopg.Connection) -> str:
    """Why the outbox cannot be read now, in words."""
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


def key_queries(cursor: Cursor) -> Iterator[tuple[str, dict[str, object]]]:
    """The statements that read changed keys behind a cursor, each with its bounds.

    Transactions in progress at the position come first: their ids are below xmax, so the two ranges
    are in order of (xid, id).
    """
    snapshot, window = cursor.position.snapshot, cursor.window
    in_progress = number_list(snapshot.in_progress)
    if window is None:
        if in_progress:
            yield "read_keys_in_progress", {"in_progress": in_progress}
        yield "read_keys_begun_since", {"xmax": snapshot.xmax}
        return
    if in_progress:
        xid, outbox_id = window.after
        yield (
            "read_more_keys_in_progress",
            {"in_progress": in_progress, "xid": xid, "id": outbox_id, "window_end": window.end},
        )
    xid, outbox_id = max(window.after, (snapshot.xmax, 0))
    yield (
        "read_more_keys_begun_since",
        {"xid": xid, "id": outbox_id, "window_end": window.end},
    )


def unseen(snapshot: Snapshot) -> dict[str, str]:
    """The bounds of both ranges of the outbox's index that a snapshot did not see."""
    return {
        "any_in_progress": "true" if snapshot.in_progress else "false",
        "in_progress": number_list(snapshot.in_progress),
        "xmax": str(snapshot.xmax),
    }
