"""Table ``items`` and the outbox of its changes.

A test frees the outbox itself, or a syncd with small slots frees it all the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from syncd.client.client import Client
from syncd.types import Snapshot
from tests.daemon import Daemon

A_MOMENT = "100ms"
WITHIN_SECONDS = 60.0
UPSERT = "INSERT INTO items VALUES (%s, ARRAY[%s, 1]) ON CONFLICT (id) DO UPDATE SET v = excluded.v"


def rotate(db: psycopg.Connection, *, rows: int = 1) -> tuple[int, bool, str | None]:
    """One rotation that switches the slot after this many rows.

    Returns how many slots it freed, whether a slot is to be tried later, and which consumer was
    told to rebuild.
    """
    try:
        row = db.execute(
            "SELECT freed, later, marked FROM syncd.rotate_outbox(%s, 3600)", [rows]
        ).fetchone()
    except psycopg.errors.LockNotAvailable:
        # Another session has a consumer's row: perhaps a service that was stopped at that moment.
        return 0, True, None
    assert row is not None
    return row[0], row[1], row[2]


def value(db: psycopg.Connection, query: str) -> Any:
    """The single value that a query returns."""
    row = db.execute(query).fetchone()
    assert row is not None
    return row[0]


def snapshot(db: psycopg.Connection) -> Snapshot:
    """The snapshot of a statement now."""
    return Snapshot.parse(value(db, "SELECT pg_current_snapshot()::text"))


def freed(db: psycopg.Connection) -> Snapshot | None:
    """The snapshot that a consumer must have seen to have missed none of the freed changes."""
    text = value(db, "SELECT freed::text FROM syncd.outbox_limit")
    return None if text is None else Snapshot.parse(text)


def outbox_rows(db: psycopg.Connection) -> int:
    """Rows in the outbox, as syncd counts them."""
    return int(value(db, "SELECT syncd.outbox_rows()"))


def make_items(db: psycopg.Connection) -> None:
    """Make the table with one row, and attach it."""
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items VALUES (0, '{0,1}')")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")


def fill(db: psycopg.Connection, rows: int, start: int = 1) -> None:
    """Change many rows, in some transactions."""
    for first in range(start, start + rows, 500):
        db.execute(
            "INSERT INTO items SELECT i, ARRAY[i, 1] FROM generate_series(%s::int, %s::int) AS i "
            "ON CONFLICT (id) DO UPDATE SET v = excluded.v",
            [first, first + 499],
        )


@contextmanager
def following(conninfo: str, data_dir: Path, **settings: object) -> Iterator[Daemon]:
    """A syncd, not started, that ends with the block."""
    daemon = Daemon(conninfo, data_dir, **{"checkpoint_seconds": 0.2} | settings).with_small_slots()
    try:
        yield daemon
    finally:
        if daemon.process is not None:
            daemon.kill()


def assert_in_step(client: Client, db: psycopg.Connection, seconds: float = WITHIN_SECONDS) -> None:
    """The index equals the table, once it includes every transaction that committed before."""
    with db.transaction():
        token = value(db, "SELECT syncd.token()")
    client.wait(token, timeout_ms=int(seconds * 1000))
    expected: dict[object, float] = dict(db.execute("SELECT id, v[1] FROM items").fetchall())
    keys = list(client.keys("items"))
    assert len(keys) == len(expected)
    assert set(keys) == set(expected)
    for start in range(0, len(keys), 1000):
        for row in client.get("items", keys[start : start + 1000], vectors=True):
            assert row.vector is not None
            assert row.vector[0] == expected[row.key], row.key
