"""Reads a source's rows, even if an expression of the user's fails on some of them.

An error ends the whole statement. So the failing rows are found by halving the batch; each attempt
has its own savepoint in the pass's transaction. Failing rows go to quarantine as
``expression_failed``, the others are read.

A savepoint costs two round trips, so they are used only after the first failure. Then the pass
starts again, and the source is read carefully until none of its rows fails any more.

Invariant: no row goes to quarantine because a rule is broken; that fails the source. A rule is
broken if it raises without any row. It is also broken if it raises for each requested row and also
for indexed rows, for which it worked before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import psycopg

from syncd.postgres.batch import ask, named
from syncd.postgres.source import Source
from syncd.statements import statement
from syncd.sync.source.rows import NO_ROWS, Row, Rows
from syncd.types import DatasetName, Key

OTHER_ROWS = 20
"""Number of indexed rows that are tried if each requested row fails."""
OF_A_ROW = ("21", "22", "23", "2F", "38", "39", "54", "0A", "P0")
"""Classes of SQLSTATE that the value of one row can cause.

The others concern the whole table, the session or the server.
"""

Fetched = list[Row]
SomeIndexed = Callable[[int], list[Key]]
"""Returns keys of about this many indexed rows."""


def is_of_a_row(error: BaseException) -> bool:
    """Whether an error may concern one row only."""
    return isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(OF_A_ROW)


def read_by_keys(
    connection: psycopg.Connection,
    source: Source,
    keys: Sequence[Key],
    *,
    careful: bool,
    some_indexed: SomeIndexed,
    commit: bool = False,
) -> tuple[Rows, list[Key]]:
    """Live rows by key, and the keys of the rows on which an expression fails.

    With ``commit`` they are the last of the transaction, and the read is not careful.
    """
    read = partial(read_some, connection, source)
    if not careful:
        return Rows.of(read(keys, commit=commit)), []
    check_rules(connection, source)
    found, failing = halving(connection, read, keys)
    if failing and not found:
        check_other_rows(connection, source, set(keys), some_indexed)
    return Rows.of(found), failing


def read_some(
    connection: psycopg.Connection, source: Source, keys: Sequence[Key], *, commit: bool = False
) -> Fetched:
    """Live rows by key; with ``commit`` the same message ends the transaction."""
    before = [named("passes", "plan_with_keys")] if source.partitions is not None else []
    after = [named("passes", "commit")] if commit else []
    answers = ask(connection, *before, source.read(keys), *after)
    rows: list[Any] = answers[len(before)]
    return rows


def check_rules(connection: psycopg.Connection, source: Source) -> None:
    """Raise the error of the rules themselves, if there is one."""
    psycopg.RawCursor(connection).execute(source.plan(), prepare=False)


def check_other_rows(
    connection: psycopg.Connection, source: Source, asked: Set[Key], some_indexed: SomeIndexed
) -> None:
    """Raise the error if indexed rows fail as well, after each requested row failed.

    Then the rule has changed, not the rows.
    """
    read = partial(read_some, connection, source)
    others = [key for key in some_indexed(OTHER_ROWS + len(asked)) if key not in asked][:OTHER_ROWS]
    if others and all(attempt(connection, partial(read, [key])) is None for key in others):
        read(others[:1])


def halving(
    connection: psycopg.Connection, read: Callable[[Sequence[Key]], Fetched], keys: Sequence[Key]
) -> tuple[Fetched, list[Key]]:
    """Read some keys; if that fails, read each half of them."""
    found: Fetched = []
    failing: list[Key] = []
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
    """One page of a scan: its live rows, the keys of the failing rows, and the page's last key.

    The last key is None at the table's end.
    """
    cursor = psycopg.RawCursor(connection)

    def end_of(start: Key | None, count: int) -> Key | None:
        query = source.read_page_end(start, count)
        end = cursor.execute(query, prepare=False, binary=True).fetchone()
        return None if end is None else source.parse_key(end[0])

    def read(start: Key | None, until: Key | None) -> Fetched:
        return cursor.execute(
            source.read_page(start, until, only), prepare=False, binary=True
        ).fetchall()

    until = end_of(after, rows)
    if not careful:
        return Rows.of(read(after, until)), [], until
    check_rules(connection, source)
    found: Fetched = []
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
            read(start, stop)  # it fails without a row, so for another reason
        elif middle is None or middle == stop:  # fewer rows than that are left
            waiting.append((start, stop, half))
        else:
            waiting += [(middle, stop, max(count - half, 1)), (start, middle, half)]
    if failing and not found:
        check_other_rows(connection, source, set(failing), some_indexed)
    return Rows.of(found), failing, until


def read_unkeyed(connection: psycopg.Connection, source: Source, *, careful: bool) -> Rows:
    """The live rows whose key, or a part of it, is NULL; they have labels instead of keys.

    If an expression fails on one of them, it is unknown which of them are live. Then all of them
    are returned, in no dataset.
    """
    cursor = psycopg.RawCursor(connection)
    lacks_none = connection.execute(source.may_lack_keys(), prepare=False).fetchone() == (False,)
    if lacks_none or source.shard.number:  # they have no bucket: the first shard has them
        return NO_ROWS

    def read() -> Fetched:
        return cursor.execute(source.read_unkeyed(), prepare=False, binary=True).fetchall()

    found = attempt(connection, read) if careful else read()
    if found is None:
        labels = cursor.execute(source.read_unkeyed_labels(), prepare=False, binary=True).fetchall()
        found = [(label, None, None, b"", 0, None) for (label,) in labels]
    return Rows.of(found)


def attempt(connection: psycopg.Connection, read: Callable[[], Fetched]) -> Fetched | None:
    """The rows, or None if an expression failed on one of them.

    The transaction goes on either way.
    """
    connection.execute(statement("passes", "savepoint"))
    rows = None
    try:
        rows = read()
    except psycopg.Error as error:
        if connection.broken or not is_of_a_row(error):
            raise
        connection.execute(statement("passes", "rollback_to_savepoint"))
    # a snapshot cannot be exported while a savepoint is open
    connection.execute(statement("passes", "release_savepoint"))
    return rows
