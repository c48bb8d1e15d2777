"""Which keys changed between two snapshots.

The cursor is a snapshot (the technique of PgQ): new rows are those of transactions that the old snapshot did not see and the current one does. An
id cursor would lose a transaction that took a lower id and committed later; a bound at the oldest open transaction would stop at it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import psycopg
from psycopg import sql

from syncd.postgres.source import passes
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
    """One page of changed keys by source, as the outbox has them, each once, and the cursor to be had once they are applied."""

    keys: dict[int, list[str]]
    cursor: Cursor
    rows: int


@dataclass(frozen=True, slots=True)
class Marker:
    """A change of a whole source. ``op``: t truncated, r to be read again."""

    source: int
    op: str


async def read_markers(connection: psycopg.AsyncConnection, cursor: Cursor, sources: Sequence[int]) -> list[Marker]:
    """Markers newer than the cursor, in order. They are read when a window begins, so that a page never undoes an earlier one."""
    query = passes("read_markers").format(
        range=window_range(cursor.position.snapshot), sources=sql.Literal(list(sources))
    )
    result = await connection.execute(query, prepare=False)
    return [Marker(*row) for row in await result.fetchall()]


async def registry_changed(connection: psycopg.AsyncConnection, snapshot: Snapshot) -> bool:
    """Whether anything was attached or detached since a snapshot."""
    query = passes("read_registry_changes").format(range=window_range(snapshot))
    return await (await connection.execute(query, prepare=False)).fetchone() is not None


async def read_changes(
    connection: psycopg.AsyncConnection,
    cursor: Cursor,
    sources: Sequence[int],
    now: Snapshot,
    page_rows: int = PAGE_ROWS,
) -> Changes:
    """The next page of keys that changed since ``cursor``, inside the transaction whose snapshot is ``now``."""
    start = cursor.position.snapshot
    after = cursor.window.after if cursor.window else (0, 0)
    window = (
        passes("window_end").format(snapshot=sql.Literal(str(cursor.window.end)))
        if cursor.window
        else sql.Composed([passes("no_window_end")])
    )
    keys: dict[int, dict[str, None]] = {}
    last, rows, newest_id = after, 0, cursor.position.outbox_id
    # Transactions in progress at the position come first: their ids are below xmax, so the two ranges are in order of (xid, id).
    for outbox_range in ranges(start):
        query = passes("read_changed_keys").format(
            range=outbox_range,
            after_xid=sql.Literal(str(last[0])),
            after_id=sql.Literal(last[1]),
            window=window,
            sources=sql.Literal(list(sources)),
            page_rows=sql.Literal(page_rows - rows),
        )
        result = await connection.execute(query, prepare=False)
        for xid, outbox_id, source, key in await result.fetchall():
            keys.setdefault(source, {})[key] = None
            last = (int(xid), outbox_id)
            newest_id = max(newest_id, outbox_id)
            rows += 1
        if rows >= page_rows:
            end = cursor.window.end if cursor.window else now
            following = Cursor(replace(cursor.position, outbox_id=newest_id), Window(end, last))
            break
    else:
        following = Cursor(Position(cursor.window.end if cursor.window else now, newest_id))
    return Changes({source: list(found) for source, found in keys.items()}, following, rows)


def ranges(snapshot: Snapshot) -> list[sql.Composable]:
    """The outbox's two index ranges that a snapshot did not see; the first is left out when nothing was in progress."""
    newer = passes("newer_range").format(xmax=sql.Literal(str(snapshot.xmax)))
    if not snapshot.in_progress:
        return [newer]
    in_progress = [str(xid) for xid in sorted(snapshot.in_progress)]
    return [passes("in_progress_range").format(in_progress=sql.Literal(in_progress)), newer]


def window_range(snapshot: Snapshot) -> sql.Composable:
    """Both ranges as one condition."""
    return sql.SQL(" OR ").join(ranges(snapshot))
