"""Reading a source's rows although an expression of the user's fails on some of them.

An error ends the whole statement, so the failing rows are found by halving what is asked for, each attempt behind a savepoint of the pass's own
transaction: they go to quarantine as ``expression_failed``, the others are read. Savepoints cost two round trips, so they begin with the first
failure: the pass starts again, and the source is read with care until no row of it fails any more.

Invariant: no row goes to quarantine because a rule is broken; that fails the source. A rule is broken if it raises without any row, or if it raises
for every row that was asked for, and for indexed rows too, for which it worked before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial

import psycopg

from syncd.postgres.source import Source
from syncd.statements import statement
from syncd.sync.source.rows import Rows
from syncd.types import DatasetName, Key

OTHER_ROWS = 20
"""How many indexed rows are tried, if every row that was asked for fails."""
OF_A_ROW = ("21", "22", "23", "2F", "38", "39", "54", "0A", "P0")
"""Classes of SQLSTATE that the value of one row can cause; the others concern the whole table, the session or the server."""

SomeIndexed = Callable[[int], list[Key]]
"""Gives keys of indexed rows, about as many as asked for."""


def is_of_a_row(error: BaseException) -> bool:
    """Whether another row might do better."""
    return isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(OF_A_ROW)


def read_by_keys(
    connection: psycopg.Connection,
    source: Source,
    keys: Sequence[str],
    *,
    careful: bool,
    some_indexed: SomeIndexed,
) -> tuple[Rows, list[str]]:
    """Live rows by key, and the keys whose row an expression fails on."""
    read = partial(read_some, connection, source)
    if not careful:
        return read(keys), []
    check_rules(connection, source)
    found, failing = halving(connection, read, keys)
    if failing and not found:
        check_other_rows(connection, source, {source.parse_key(key) for key in keys}, some_indexed)
    return found, failing


def read_some(connection: psycopg.Connection, source: Source, keys: Sequence[str]) -> Rows:
    """Live rows by key."""
    return (
        psycopg.RawCursor(connection)
        .execute(source.read_keys(), [source.key_array(keys)], prepare=source.prepare, binary=True)
        .fetchall()
    )


def check_rules(connection: psycopg.Connection, source: Source) -> None:
    """Raise what is wrong with the rules themselves."""
    psycopg.RawCursor(connection).execute(source.plan(), prepare=False)


def check_other_rows(
    connection: psycopg.Connection, source: Source, asked: Set[Key], some_indexed: SomeIndexed
) -> None:
    """Every row that was asked for fails. Raise the error if rows that are indexed fail as well: then it is not the rows that have changed."""
    read = partial(read_some, connection, source)
    others = [str(key) for key in some_indexed(OTHER_ROWS + len(asked)) if key not in asked][
        :OTHER_ROWS
    ]
    if others and all(attempt(connection, partial(read, [key])) is None for key in others):
        read(others[:1])


def halving(
    connection: psycopg.Connection, read: Callable[[Sequence[str]], Rows], keys: Sequence[str]
) -> tuple[Rows, list[str]]:
    """Read some keys, or, where that fails, each half of them."""
    found: Rows = []
    failing: list[str] = []
    waiting = [keys]
    while waiting:
        some = waiting.pop()
        rows = attempt(connection, partial(read, some))
        if rows is not None:
            found += rows
        elif len(some) == 1:
            failing.append(some[0])
        else:
            half = len(some) // 2
            waiting += [some[half:], some[:half]]
    return found, failing


def read_page(
    connection: psycopg.Connection,
    source: Source,
    after: Key | None,
    only: Sequence[DatasetName] | None,
    rows: int,
    *,
    careful: bool,
    some_indexed: SomeIndexed,
) -> tuple[Rows, list[Key], Key | None]:
    """One page of a scan: its live rows, the keys whose row an expression fails on, and its last key, None behind the table's end."""
    cursor = psycopg.RawCursor(connection)

    def end_of(start: Key | None, count: int) -> Key | None:
        query = source.read_page_end(start, count)
        end = cursor.execute(query, prepare=False, binary=True).fetchone()
        return None if end is None else source.parse_key(end[0])

    def read(start: Key | None, until: Key | None) -> Rows:
        return cursor.execute(
            source.read_page(start, until, only), prepare=False, binary=True
        ).fetchall()

    until = end_of(after, rows)
    if not careful:
        return read(after, until), [], until
    check_rules(connection, source)
    found: Rows = []
    failing: list[Key] = []
    waiting = [(after, until, rows)]
    while waiting:
        start, stop, count = waiting.pop()
        some = attempt(connection, partial(read, start, stop))
        if some is not None:
            found += some
            continue
        if count == 1 and stop is not None:
            failing.append(stop)
            continue
        half = max(count // 2, 1)
        middle = end_of(start, half)
        if middle is None and count == 1:
            read(start, stop)  # it fails although there is no row: for another reason, then
        elif middle is None or middle == stop:  # fewer rows than that are left
            waiting.append((start, stop, half))
        else:
            waiting += [(middle, stop, max(count - half, 1)), (start, middle, half)]
    if failing and not found:
        check_other_rows(connection, source, set(failing), some_indexed)
    return found, failing, until


def read_unkeyed(connection: psycopg.Connection, source: Source, *, careful: bool) -> Rows:
    """The live rows that have no key, or lack a part of it, with labels in the place of keys.

    If an expression fails on one of them, nothing tells which of them are live, so all of them are given, in no dataset.
    """
    cursor = psycopg.RawCursor(connection)
    lacks_none = connection.execute(source.may_lack_keys(), prepare=False).fetchone() == (False,)
    if lacks_none:
        return []

    def read() -> Rows:
        return cursor.execute(source.read_unkeyed(), prepare=False, binary=True).fetchall()

    found = attempt(connection, read) if careful else read()
    if found is None:
        labels = cursor.execute(source.read_unkeyed_labels(), prepare=False, binary=True).fetchall()
        found = [(label, None, None, b"", 0, None) for (label,) in labels]
    return found


def attempt(connection: psycopg.Connection, read: Callable[[], Rows]) -> Rows | None:
    """The rows, or None where an expression failed on one of them; the transaction goes on either way."""
    connection.execute(statement("passes", "savepoint"))
    rows = None
    try:
        rows = read()
    except psycopg.Error as error:
        if connection.broken or not is_of_a_row(error):
            raise
        connection.execute(statement("passes", "rollback_to_savepoint"))
    connection.execute(
        statement("passes", "release_savepoint")
    )  # none may be open where the snapshot is exported
    return rows
