"""Passes whose first message also reads the changed rows: the same index, in one message."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psycopg
import pytest
from psycopg.pq import TransactionStatus

from syncd.keys import parse_keys
from syncd.postgres.connection import PassConnection, open_pass_connection
from syncd.settings import load_settings
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.consumer.session import Session
from syncd.sync.registry.datasets import Registry
from syncd.sync.source import looking
from syncd.types import DatasetName

RUN_ID = "00000000-0000-0000-0000-000000000001"
KEYS = {
    "int": "id int PRIMARY KEY",
    "text": "id text PRIMARY KEY",
    "timestamptz": "id timestamptz PRIMARY KEY",
    "composite": "a int, b text, PRIMARY KEY (a, b)",
}
VALUES = {
    "int": "{0}",
    "text": "'it''s {{\"{0}\"}}, \\'",
    "timestamptz": "'2026-01-01 00:00:00+02'::timestamptz + make_interval(secs => {0})",
    "composite": "{0}, 'b\"{0}'",
}


class Following:
    """A consumer without a service: each call of ``messages`` is one pass."""

    def __init__(self, conninfo: str, folder: Path, connection: PassConnection) -> None:
        settings = load_settings(dsn=conninfo, data_dir=folder, consumer="it")
        self.consumer = Consumer(Session(settings, RUN_ID), Registry(folder), None)
        self.connection = connection
        self.consumer.begin(connection, True)
        self.catch_up()

    def catch_up(self) -> None:
        """Passes until nothing is left to do, and one more, which prepares what comes next."""
        while self.consumer.look_and_pass(self.connection).more:
            pass
        self.consumer.look_and_pass(self.connection)

    def messages(self) -> int:
        """Number of messages of a pass."""
        with patch.object(
            PassConnection, "wait", autospec=True, side_effect=PassConnection.wait
        ) as wait:
            outcome = self.consumer.look_and_pass(self.connection)
        self.catch_up() if outcome.more else None
        return wait.call_count

    def count(self) -> int:
        """Number of rows in the index of table ``items``."""
        return self.consumer.registry.by_name[DatasetName("default/items")].index.count

    def in_step(self, db: psycopg.Connection, key: str) -> None:
        """The index has exactly the table's live keys."""
        columns = {"composite": "json_build_array(a, b)::text", "timestamptz": "syncd.key_text(id)"}
        column = columns.get(key, "id")
        rows = db.execute(f"SELECT {column} FROM items WHERE live".encode()).fetchall()
        dataset = self.consumer.registry.by_name[DatasetName("default/items")]
        keys = parse_keys(dataset.source.key_kinds, [each for (each,) in rows])
        assert dataset.index.count == len(keys)
        assert dataset.index.view.contains(keys).all()


@pytest.fixture
def following(
    db: psycopg.Connection, database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Following]:
    key = getattr(request, "param", "int")
    db.execute(f"CREATE TABLE items (live bool, v real[], {KEYS[key]})".encode())
    db.execute("CREATE TABLE others (id int PRIMARY KEY, v real[])")
    db.execute("SELECT syncd.attach('others')")
    db.execute("SELECT syncd.attach('items', vector => 'v', live => 'live')")
    insert(db, key, range(20))
    with (
        # On a busy machine a whole look would be due in the middle of a test.
        patch("syncd.sync.source.looking.LOOK_SECONDS", 3600.0),
        open_pass_connection(database, "it") as connection,
    ):
        yield Following(database, tmp_path, connection)


def insert(db: psycopg.Connection, key: str, numbers: range) -> None:
    """Insert live rows, in one transaction."""
    rows = ", ".join(f"(true, '{{1,{each}}}', {VALUES[key].format(each)})" for each in numbers)
    db.execute(f"INSERT INTO items VALUES {rows}".encode())


@pytest.mark.parametrize(
    ("following", "key"), [(key, key) for key in KEYS], indirect=["following"], ids=KEYS
)
def test_a_pass_of_a_few_changes_is_one_message(
    following: Following, db: psycopg.Connection, key: str
) -> None:
    assert following.messages() == 1
    changes: list[Callable[[], object]] = [
        lambda: insert(db, key, range(100, 130)),
        lambda: db.execute("UPDATE items SET live = false WHERE v[2] < 3"),
        lambda: db.execute("UPDATE items SET v = '{2,2}' WHERE v[2] > 120"),
        lambda: db.execute("DELETE FROM items WHERE v[2] BETWEEN 5 AND 7"),
    ]
    for change in changes:
        change()
        assert following.messages() == 1
        following.in_step(db, key)


@pytest.mark.parametrize(
    "change",
    [
        "INSERT INTO items SELECT true, '{1,1}', i FROM generate_series(1000, 1100) i",
        "INSERT INTO others SELECT i, '{1}' FROM generate_series(1, 100) i; "
        "INSERT INTO items VALUES (true, '{1,1}', 2000)",
        "TRUNCATE items; INSERT INTO items VALUES (true, '{1,1}', 5)",
        "INSERT INTO syncd.outbox (source, op) SELECT id, 'r' FROM syncd.attachments",
        "ALTER TABLE items ALTER COLUMN id TYPE bigint; "
        "INSERT INTO items VALUES (true, '{1,1}', 77)",
        "ALTER TABLE items ALTER COLUMN live TYPE bool USING NOT live",
        "INSERT INTO syncd.outbox (source, op, key) SELECT id, 'k', 'abc' FROM syncd.attachments; "
        "INSERT INTO items VALUES (true, '{1,1}', 5000)",
        "SELECT nextval('syncd.doubts')",
    ],
    ids=[
        "101 rows",
        "others' rows",
        "truncated",
        "marker",
        "key's type",
        "rewritten",
        "no key",
        "doubt",
    ],
)
def test_a_pass_that_meets_more_than_that_begins_again(
    following: Following, db: psycopg.Connection, change: str
) -> None:
    assert following.messages() == 1
    with db.transaction():
        db.execute(change.encode())
    assert following.messages() > 1
    following.catch_up()
    following.in_step(db, "int")


def test_after_an_open_transaction_the_keys_are_read_first(
    following: Following, db: psycopg.Connection, database: str
) -> None:
    with psycopg.connect(database) as early:
        early.execute("INSERT INTO items VALUES (true, '{1,1}', 500)")
        insert(db, "int", range(501, 503))
        following.consumer.look_and_pass(following.connection)
        following.in_step(db, "int")
        early.commit()
        assert following.messages() > 1
        following.in_step(db, "int")


def test_changes_do_not_wait_for_whole_looks(following: Following, db: psycopg.Connection) -> None:
    catalogues = [each.catalogue for each in following.consumer.sources.values()]
    assert following.messages() == 1
    for each in catalogues:
        each.looked_at -= looking.LOOK_SECONDS
    before = [each.looked_at for each in catalogues]
    insert(db, "int", range(100, 101))
    assert following.consumer.look_and_pass(following.connection).more
    following.in_step(db, "int")
    assert [each.looked_at for each in catalogues] == before
    assert not following.consumer.look_and_pass(following.connection).more
    assert all(each.looked_at > time for each, time in zip(catalogues, before, strict=True))


def test_markers_that_the_snapshot_does_not_see_are_left_to_the_next_pass(
    following: Following, db: psycopg.Connection
) -> None:
    wait, messages, truncated = PassConnection.wait, iter(range(1, 1000)), list[int]()

    def wait_and_truncate(*arguments: Any, **named: Any) -> Any:
        if next(messages) == 2:  # after the first snapshot, before anything else is read
            with db.transaction():
                db.execute("TRUNCATE items")
                truncated.append(own_xid(db))
        return wait(*arguments, **named)

    assert following.messages() == 1
    with db.transaction():
        db.execute("TRUNCATE others")  # this marker has the pass ask for more
        insert(db, "int", range(500, 501))
        inserted = own_xid(db)
    with patch.object(PassConnection, "wait", wait_and_truncate):
        following.consumer.look_and_pass(following.connection)
    sees = following.consumer.position.snapshot.sees
    assert sees(inserted)
    assert following.count() == (0 if sees(truncated[0]) else 21)
    following.catch_up()
    following.in_step(db, "int")


def test_a_table_that_is_rewritten_after_a_pass_with_changed_facts_is_compared(
    following: Following, db: psycopg.Connection
) -> None:
    rewritten = []

    def look_late(*arguments: Any) -> bool:
        if following.connection.info.transaction_status is TransactionStatus.IDLE:
            rewrite()  # the pass has ended its transaction
        return look(*arguments)

    def rewrite() -> None:
        db.execute("ALTER TABLE items ALTER COLUMN live TYPE bool USING id < 100")
        rewritten.append(True)

    look = looking.look
    insert(db, "int", range(500, 501))
    db.execute("ALTER TABLE items ADD COLUMN more int")
    with patch("syncd.sync.consumer.passes.look", look_late):
        following.consumer.look_and_pass(following.connection)
    if not rewritten:
        rewrite()
    following.catch_up()
    following.in_step(db, "int")


def own_xid(db: psycopg.Connection) -> int:
    """Id of the open transaction."""
    row = db.execute("SELECT pg_current_xact_id()::text::bigint").fetchone()
    assert row is not None
    return int(row[0])
