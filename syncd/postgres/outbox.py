"""Which keys changed between two snapshots.

The cursor is a snapshot (the technique of PgQ): new rows are those of transactions that the old snapshot did not see and the current one does. An
id cursor would lose a transaction that took a lower id and committed later; a bound at the oldest open transaction would stop at it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import psycopg

from syncd.statements import statement
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


def read_markers(connection: psycopg.Connection, cursor: Cursor, sources: Sequence[int]) -> list[Marker]:
    """Markers newer than the cursor, in order. They are read when a window begins, so that a page never undoes an earlier one."""
    query = bounded("read_markers", range=window_range(cursor.position.snapshot), sources=numbers(sources))
    result = connection.execute(query, prepare=False)
    return [Marker(*row) for row in result.fetchall()]


def registry_changed(connection: psycopg.Connection, snapshot: Snapshot) -> bool:
    """Whether anything was attached or detached since a snapshot."""
    query = bounded("read_registry_changes", range=window_range(snapshot))
    return connection.execute(query, prepare=False).fetchone() is not None


def read_changes(
    connection: psycopg.Connection,
    cursor: Cursor,
    sources: Sequence[int],
    now: Snapshot,
    page_rows: int = PAGE_ROWS,
) -> Changes:
    """The next page of keys that changed since ``cursor``, inside the transaction whose snapshot is ``now``."""
    window = part("window_end").format(snapshot=cursor.window.end) if cursor.window is not None else part("no_bound")
    keys: dict[int, dict[str, None]] = {}
    last = cursor.window.after if cursor.window is not None else None
    rows, newest_id, unkeyed = 0, cursor.position.outbox_id, set[int]()
    # Transactions in progress at the position come first: their ids are below xmax, so the two ranges are in order of (xid, id).
    for outbox_range in ranges(cursor.position.snapshot, last):
        query = bounded(
            "read_changed_keys",
            range=outbox_range,
            after=part("no_bound") if last is None else part("after_row").format(xid=last[0], id=last[1]),
            window=window,
            sources=numbers(sources),
            page_rows=page_rows - rows,
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
    return Changes({source: list(found) for source, found in keys.items()}, following, rows, frozenset(unkeyed))


def who_locks_the_outbox(connection: psycopg.Connection) -> str:
    """Why the outbox cannot be read now, in words."""
    row = connection.execute(part("read_outbox_locks").encode(), prepare=False).fetchone()
    who = "" if row is None else f" by process {row[0]}" if row[0] is not None else " by a prepared transaction"
    return f"table syncd.outbox is locked{who}" + (f": {row[1]}" if row is not None and row[1] else "")


def ranges(snapshot: Snapshot, after: tuple[int, int] | None = None) -> list[str]:
    """The outbox's two index ranges that a snapshot did not see, the second from ``after`` (xid, id) on if that is further; the first
    is left out when nothing was in progress."""
    newer = part("newer_range").format(xmax=max(snapshot.xmax, after[0]) if after is not None else snapshot.xmax)
    if not snapshot.in_progress:
        return [newer]
    return [part("in_progress_range").format(in_progress=numbers(sorted(snapshot.in_progress))), newer]


def window_range(snapshot: Snapshot) -> str:
    """Both ranges as one condition."""
    return " OR ".join(ranges(snapshot))


def bounded(name: str, **bounds: str | int) -> bytes:
    """A statement with its bounds. They are numbers, and texts made of numbers here, never anything that a user wrote."""
    return part(name).format(**bounds).encode()


def numbers(values: Iterable[int]) -> str:
    """The elements of an array literal."""
    return ",".join(map(str, values))


def part(name: str) -> str:
    """A statement, or a part of one, of ``queries/passes.sql``."""
    return statement("passes", name)
