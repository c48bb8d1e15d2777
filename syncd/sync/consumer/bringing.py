"""The part of a pass that concerns one source: its changed rows, or a page of its scan.

Invariant: a source's cursor moves only after everything that was read for it has been applied.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import psycopg

from syncd.keys import parse_readable
from syncd.postgres.outbox import Changes
from syncd.sync.consumer.guarding import StartAgain
from syncd.sync.source.applying import apply
from syncd.sync.source.estimates import expected_rows
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.reading import read_by_keys, read_page, read_unkeyed
from syncd.sync.source.rows import Row, Rows
from syncd.types import Key

KEYS_PER_READ = 1000
"""Number of rows that are read by one statement, and held in memory at once."""
REREAD_PER_PASS = 5000
"""Number of unchanged rows that a pass reads again; other changes wait for them."""


def bring(
    connection: psycopg.Connection,
    each: FollowedSource,
    changes: Changes,
    *,
    commit: bool = False,
    guessed: Sequence[Row] | None = None,
) -> int:
    """Read one source's changed rows, apply them, and move its cursor.

    With ``commit`` the transaction ends when they are read. ``guessed`` are the rows of all changed
    keys, if they were read before; then the transaction has ended. Returns the number of changed
    rows.
    """
    written = changes.keys.get(each.source.id, [])
    asked = parsed(each, [text for text in written if not each.source.is_unkeyed(text)])
    # A row trigger does not say which row came by a key: rows without one are read at any change.
    each.reread_unkeyed |= each.source.id in changes.unkeyed or len(asked) < len(written)
    each.reread_unkeyed |= bool(each.quarantine.unkeyed and written)
    if guessed is not None and (each.reread or each.reread_unkeyed):
        raise StartAgain
    each.unconfirmed.note(asked)
    reread = set(itertools.islice(each.reread, REREAD_PER_PASS))
    each.reread -= reread
    try:
        if guessed is not None:
            changed = apply(each, asked, Rows.of(guessed)) if asked else 0
        else:
            keys = list(dict.fromkeys([*asked, *reread])) if reread else asked
            changed = read_and_apply(connection, each, keys, commit=commit)
        if each.reread_unkeyed:
            each.reject_unkeyed(read_unkeyed(connection, each.source, careful=each.careful))
    except BaseException:
        each.reread |= reread
        raise
    each.cursor = changes.cursor
    return changed


def parsed(each: FollowedSource, texts: list[str]) -> list[Key]:
    """Keys of the outbox, as far as they can be parsed. If one cannot, the whole source is read.

    Then the key's type was altered, or something else wrote to the outbox.
    """
    try:
        return each.source.parse_keys(texts)
    except (ValueError, TypeError) as error:
        each.doubt(f"{each.source.name}: a key in the outbox cannot be read: {error}")
        return parse_readable(each.source.key_kinds, texts)


def is_read_at_once(each: FollowedSource, changes: Changes) -> bool:
    """Whether one statement reads all that a pass reads for a source."""
    keys = changes.keys.get(each.source.id, [])
    return (
        len(keys) <= KEYS_PER_READ
        and each.scan is None
        and not each.careful
        and not each.rereads
        and not each.quarantine.unkeyed
        and each.source.id not in changes.unkeyed
        and not any(map(each.source.is_unkeyed, keys))
    )


def read_and_apply(
    connection: psycopg.Connection,
    each: FollowedSource,
    asked: Sequence[Key],
    *,
    commit: bool = False,
) -> int:
    """Read rows by key and apply them, some at a time so that memory is bounded."""
    changed = 0
    for start in range(0, len(asked), KEYS_PER_READ):
        some = asked[start : start + KEYS_PER_READ]
        rows, failing = read_by_keys(
            connection,
            each.source,
            some,
            careful=each.careful,
            some_indexed=each.datasets.some_indexed,
            commit=commit,
        )
        changed += apply(each, some, rows)
        each.quarantine.put_failing(failing)
    return changed


def scan_page(connection: psycopg.Connection, each: FollowedSource) -> None:
    """Read one page of a scan at the pass's snapshot.

    Later changes of its rows come through the outbox.
    """
    scan, begun = each.scan, time.monotonic()
    assert scan is not None
    if scan.expected is None:
        scan.expected = expected_rows(connection, each, scan)
    only = None if scan.only is None else sorted(scan.only)
    rows, failing, until = read_page(
        connection,
        each.source,
        scan.after,
        only,
        scan.page_rows,
        careful=each.careful,
        some_indexed=each.datasets.some_indexed,
    )
    if apply(each, failing, rows):
        each.unconfirmed.everything = True
    each.quarantine.put_failing(failing)
    if until is None:
        each.reject_unkeyed(read_unkeyed(connection, each.source, careful=each.careful))
    scan.note_page(until, rows, time.monotonic() - begun, len(each.datasets))
    if until is None and each.end_scan():
        each.unconfirmed.everything = True
