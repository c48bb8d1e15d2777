"""Reading the outbox: each change once, at a cost that follows the change."""

from __future__ import annotations

import json

import psycopg
import pytest

from syncd.postgres.outbox import Cursor, read_changes
from syncd.types import Position, Snapshot

SOURCE = 7
PAGE_ROWS = 100


def write(db: psycopg.Connection, *keys: int) -> None:
    db.cursor().executemany(
        "INSERT INTO syncd.outbox (source, op, key) VALUES (7, 'k', %s)", [[str(key)] for key in keys]
    )


def snapshot(db: psycopg.Connection) -> Snapshot:
    row = db.execute("SELECT pg_current_snapshot()::text").fetchone()
    assert row is not None
    return Snapshot.parse(row[0])


def follow(db: psycopg.Connection, cursor: Cursor) -> tuple[list[int], Cursor]:
    """One pass of a consumer, in as many pages as it takes."""
    found: list[int] = []
    while True:
        with db.transaction():
            db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            changes = read_changes(db, cursor, [SOURCE], snapshot(db), PAGE_ROWS)
        found += map(int, changes.keys.get(SOURCE, []))
        cursor = changes.cursor
        if cursor.window is None:
            return found, cursor


@pytest.fixture
def start(db: psycopg.Connection) -> Cursor:
    return Cursor(Position(snapshot(db), 0))


def test_a_transaction_that_took_lower_ids_and_commits_later_is_read_once(
    db: psycopg.Connection, database: str, start: Cursor
) -> None:
    with psycopg.connect(database) as early:
        write(early, 1)
        write(db, 2)
        found, cursor = follow(db, start)
        assert found == [2]
        early.commit()
        found, cursor = follow(db, cursor)
        assert found == [1]
        assert follow(db, cursor)[0] == []


def test_pages_of_a_large_window_give_each_key_once_while_others_write(db: psycopg.Connection, start: Cursor) -> None:
    with db.transaction():
        write(db, *range(PAGE_ROWS * 3 + 7))
    first = read_changes(db, start, [SOURCE], snapshot(db), PAGE_ROWS)
    assert first.cursor.window is not None
    write(db, 1_000_000)
    found, cursor = follow(db, first.cursor)
    assert sorted([*map(int, first.keys[SOURCE]), *found]) == list(range(PAGE_ROWS * 3 + 7))
    assert follow(db, cursor)[0] == [1_000_000]


@pytest.mark.parametrize("behind_an_open_transaction", [False, True])
def test_a_page_reads_what_changed_and_not_the_outbox(
    db: psycopg.Connection, database: str, monkeypatch: pytest.MonkeyPatch, behind_an_open_transaction: bool
) -> None:
    with psycopg.connect(database) as early:
        if behind_an_open_transaction:
            write(early, 1)
        db.execute("INSERT INTO syncd.outbox (source, op, key) SELECT 7, 'k', i FROM generate_series(1, 50000) AS i")
        db.execute("ANALYZE syncd.outbox")
        position = Cursor(Position(snapshot(db), 0))
        write(db, 2, 3)
        queries: list[bytes | str] = []
        execute = psycopg.Connection.execute

        def noting(self: psycopg.Connection, query: bytes | str, *args: object, **options: object) -> object:
            queries.append(query)
            return execute(self, query, *args, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(psycopg.Connection, "execute", noting)
            read_changes(db, position, [SOURCE], snapshot(db))
        db.execute("SET enable_seqscan = off")  # as in a pass
        for query in queries:
            if isinstance(query, bytes) and b"FROM syncd.outbox" in query:
                row = db.execute(b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + query).fetchone()
                assert row is not None
                plan = row[0][0]["Plan"]
                assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < 50, json.dumps(plan, indent=1)
