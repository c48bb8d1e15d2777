"""A write notes its keys in the outbox, wakes the service, and never fails because of syncd."""

from __future__ import annotations

from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from tests.integration.captured import Entry, execute, keys, listening, outbox


@pytest.fixture
def items(any_db: psycopg.Connection) -> psycopg.Connection:
    """A database with an attached table of three rows, and an empty outbox."""
    return with_items(any_db)


@pytest.fixture
def rolled_back(scratch: psycopg.Connection) -> psycopg.Connection:
    """The attached table inside a transaction that is rolled back."""
    return with_items(scratch)


def with_items(db: psycopg.Connection) -> psycopg.Connection:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, name text, embedding real[])")
    db.execute("INSERT INTO items VALUES (1, 'a', '{1}'), (2, 'b', '{2}'), (3, 'c', '{3}')")
    db.execute("SELECT syncd.attach('items')")
    db.execute("TRUNCATE syncd.outbox")
    return db


# Noted keys


@pytest.mark.parametrize(
    ("write", "noted"),
    [
        ("INSERT INTO items VALUES (4), (5), (6)", keys(4, 5, 6)),
        ("INSERT INTO items SELECT id + 10 FROM items", keys(11, 12, 13)),
        ("INSERT INTO items VALUES (1), (4) ON CONFLICT DO NOTHING", keys(4)),
        ("INSERT INTO items VALUES (1), (4) ON CONFLICT (id) DO UPDATE SET name = 'z'", keys(1, 4)),
        ("INSERT INTO items VALUES (1), (4) ON CONFLICT (id) DO UPDATE SET id = 9", keys(1, 4, 9)),
        (
            "INSERT INTO items VALUES (1), (2) "
            "ON CONFLICT (id) DO UPDATE SET name = 'z' WHERE items.id = 2",
            keys(2),
        ),
        ("UPDATE items SET name = 'z' WHERE id < 3", keys(1, 2)),
        ("UPDATE items SET name = name", keys(1, 2, 3)),
        ("UPDATE items SET id = id + 10 WHERE id < 3", keys(1, 11, 12, 2)),
        ("UPDATE items SET id = 4 - id WHERE id = 2", keys(2)),
        ("DELETE FROM items WHERE id > 1", keys(2, 3)),
        ("TRUNCATE items", [("t", None)]),
        (
            "WITH gone AS (DELETE FROM items WHERE id = 1 RETURNING id), "
            "new AS (INSERT INTO items VALUES (7) RETURNING id) "
            "UPDATE items SET name = 'z' WHERE id = 2",
            keys(1, 2, 7),
        ),
        (
            "MERGE INTO items USING (VALUES (1, 'd'), (2, 'u'), (8, 'i')) AS s (id, what) "
            "ON items.id = s.id "
            "WHEN MATCHED AND what = 'd' THEN DELETE "
            "WHEN MATCHED THEN UPDATE SET id = items.id + 20 "
            "WHEN NOT MATCHED THEN INSERT VALUES (s.id)",
            keys(1, 2, 22, 8),
        ),
    ],
)
def test_a_statement_notes_each_key_that_it_touched(
    rolled_back: psycopg.Connection, write: LiteralString, noted: list[Entry]
) -> None:
    execute(rolled_back, write)
    assert outbox(rolled_back) == noted


def test_copy_notes_its_rows(rolled_back: psycopg.Connection) -> None:
    with rolled_back.cursor().copy("COPY items (id, embedding) FROM STDIN") as copy:
        for number in range(10, 13):
            copy.write_row((number, "{1}"))
    assert outbox(rolled_back) == keys(10, 11, 12)


@pytest.mark.parametrize(
    "write",
    [
        "UPDATE items SET name = 'z' WHERE id > 100",
        "DELETE FROM items WHERE id > 100",
        "INSERT INTO items SELECT * FROM items WHERE false",
        "INSERT INTO items VALUES (1) ON CONFLICT DO NOTHING",
        "MERGE INTO items USING (VALUES (100)) AS s (id) ON items.id = s.id WHEN MATCHED THEN "
        "DELETE",
        "SELECT * FROM items FOR UPDATE",
    ],
)
def test_a_statement_that_touches_no_row_notes_no_key_and_wakes_no_service(
    items: psycopg.Connection, any_database: str, write: LiteralString
) -> None:
    with listening(any_database) as heard:
        execute(items, write)
        assert outbox(items) == []
        assert heard() == 0


def test_a_cascade_notes_the_rows_of_the_table_it_reaches(rolled_back: psycopg.Connection) -> None:
    rolled_back.execute("CREATE TABLE parents (id int PRIMARY KEY)")
    rolled_back.execute("INSERT INTO parents VALUES (1), (2)")
    rolled_back.execute(
        "CREATE TABLE children (id int PRIMARY KEY, parent int REFERENCES parents ON DELETE "
        "CASCADE ON UPDATE CASCADE, embedding real[])"
    )
    rolled_back.execute("INSERT INTO children VALUES (10, 1), (11, 1), (12, 2)")
    rolled_back.execute("SELECT syncd.attach('children')")
    rolled_back.execute("TRUNCATE syncd.outbox")
    rolled_back.execute("DELETE FROM parents WHERE id = 1")
    assert outbox(rolled_back) == keys(10, 11)
    rolled_back.execute("UPDATE parents SET id = 3")
    assert outbox(rolled_back) == keys(10, 11, 12)
    rolled_back.execute("TRUNCATE parents CASCADE")
    assert outbox(rolled_back)[-1] == ("t", None)


def test_a_write_under_the_replica_role_is_noted_like_any_other(
    rolled_back: psycopg.Connection,
) -> None:
    rolled_back.execute("SET session_replication_role = replica")
    rolled_back.execute("INSERT INTO items VALUES (4)")
    rolled_back.execute("RESET session_replication_role")
    assert outbox(rolled_back) == keys(4)


def test_a_write_that_is_rolled_back_is_not_noted(rolled_back: psycopg.Connection) -> None:
    with rolled_back.transaction():
        rolled_back.execute("INSERT INTO items VALUES (4)")
        with rolled_back.transaction(force_rollback=True):
            rolled_back.execute("INSERT INTO items VALUES (5)")
        rolled_back.execute("INSERT INTO items VALUES (6)")
    with rolled_back.transaction(force_rollback=True):
        rolled_back.execute("INSERT INTO items VALUES (7)")
    assert outbox(rolled_back) == keys(4, 6)


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_every_isolation_level_can_write(
    items: psycopg.Connection, isolation: LiteralString
) -> None:
    with items.transaction():
        items.execute(sql.SQL("SET TRANSACTION ISOLATION LEVEL {}").format(sql.SQL(isolation)))
        items.execute("UPDATE items SET name = 'z'")
    assert outbox(items) == keys(1, 2, 3)


def test_keys_are_noted_as_text_that_reads_back_as_the_same_key(
    scratch: psycopg.Connection,
) -> None:
    """The key of one column is its text; several columns make a JSON array."""
    strange = "quo\"te 's \\ \n \t ü 😀 %s {x} [1]"
    scratch.execute("CREATE TABLE texts (id text PRIMARY KEY, embedding real[])")
    scratch.execute(
        "CREATE TABLE pairs (a bigint, b text, c uuid, embedding real[], PRIMARY KEY (a, b, c))"
    )
    scratch.execute("SELECT syncd.attach('texts'), syncd.attach('pairs')")
    scratch.execute("TRUNCATE syncd.outbox")
    scratch.execute("INSERT INTO texts VALUES (%s), (''), (repeat('x', 2000))", [strange])
    uuid = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
    scratch.execute("INSERT INTO pairs VALUES (9223372036854775807, %s, %s)", [strange, uuid])
    assert {key for _, key in outbox(scratch)[:-1]} | {outbox(scratch)[-1][1]} >= {
        strange,
        "",
        "x" * 2000,
    }
    row = scratch.execute(
        "SELECT key::json ->> 0, key::json ->> 1, key::json ->> 2 FROM syncd.outbox WHERE key LIKE "
        "'[9%'"
    ).fetchone()
    assert row == ("9223372036854775807", strange, uuid)


def test_the_ready_table_is_attached_from_the_start(scratch: psycopg.Connection) -> None:
    scratch.execute("TRUNCATE syncd.outbox")
    scratch.execute("INSERT INTO syncd.embeddings (id, embedding) VALUES ('a', '{1,2}')")
    assert outbox(scratch) == keys("a")
    assert scratch.execute(
        "SELECT project, dataset, attributes, deleted_at FROM syncd.embeddings"
    ).fetchone() == (
        "default",
        "embeddings",
        {},
        None,
    )


# A write never fails


def test_a_renamed_key_column_fails_no_write_and_has_the_source_read_again(
    rolled_back: psycopg.Connection,
) -> None:
    rolled_back.execute("ALTER TABLE items RENAME COLUMN id TO number")
    rolled_back.execute("INSERT INTO items VALUES (4)")
    rolled_back.execute("UPDATE items SET name = 'z' WHERE number = 4")
    rolled_back.execute("DELETE FROM items WHERE number = 4")
    assert outbox(rolled_back) == [("r", None)]  # once a transaction


def test_a_dropped_key_column_fails_no_write(rolled_back: psycopg.Connection) -> None:
    rolled_back.execute("ALTER TABLE items DROP COLUMN id")
    rolled_back.execute("INSERT INTO items VALUES ('x')")
    assert outbox(rolled_back) == [("r", None)]


def test_a_key_column_of_another_type_fails_no_write(rolled_back: psycopg.Connection) -> None:
    rolled_back.execute("UPDATE items SET name = 'warm the plan' WHERE id = 1")
    rolled_back.execute("ALTER TABLE items ALTER COLUMN id TYPE numeric")
    rolled_back.execute("UPDATE items SET name = 'y' WHERE id = 1")
    assert {key for _, key in outbox(rolled_back)} == {"1"}


WRITES: tuple[LiteralString, ...] = (
    "INSERT INTO items VALUES (4)",
    "UPDATE items SET id = 5 WHERE id = 4",
    "DELETE FROM items WHERE id = 5",
    "TRUNCATE items",
)


@pytest.mark.parametrize(
    "damage",
    [
        "DROP TABLE syncd.outbox CASCADE",
        "DROP TABLE syncd.outbox_0",
        "DROP SEQUENCE syncd.outbox_slot",
    ],
)
def test_an_outbox_that_cannot_be_written_fails_no_write_and_a_warning_says_so(
    rolled_back: psycopg.Connection, damage: LiteralString
) -> None:
    warnings: list[tuple[str | None, str, str]] = []
    rolled_back.execute(damage)
    rolled_back.add_notice_handler(
        lambda notice: warnings.append(
            (notice.severity, notice.message_primary or "", notice.message_hint or "")
        )
    )
    for write in WRITES:
        execute(rolled_back, write)
    [(severity, text, hint)] = warnings  # once a transaction
    assert severity == "WARNING"
    assert text.startswith("syncd could not note a change of public.items: ")
    assert "syncd init" in hint


def test_a_wake_up_that_fails_fails_no_write_and_loses_no_key(
    rolled_back: psycopg.Connection,
) -> None:
    rolled_back.execute("DROP SEQUENCE syncd.notify_mode")
    for write in WRITES:
        execute(rolled_back, write)
    assert sorted(outbox(rolled_back), key=str) == [
        ("k", "4"),
        ("k", "4"),
        ("k", "5"),
        ("k", "5"),
        ("t", None),
    ]


def test_a_dropped_schema_leaves_the_tables_writable(rolled_back: psycopg.Connection) -> None:
    rolled_back.execute("DROP SCHEMA syncd CASCADE")
    rolled_back.execute("INSERT INTO items VALUES (4)")
    rolled_back.execute("TRUNCATE items")


def test_a_dropped_column_outside_the_key_changes_nothing(rolled_back: psycopg.Connection) -> None:
    rolled_back.execute("INSERT INTO items VALUES (4)")
    rolled_back.execute("ALTER TABLE items DROP COLUMN name")
    rolled_back.execute("ALTER TABLE items ADD COLUMN more int DEFAULT 7")
    rolled_back.execute("UPDATE items SET more = 8 WHERE id = 4")
    assert outbox(rolled_back) == keys(4, 4)


# Waking


def test_a_transaction_notifies_once_however_much_it_writes(
    items: psycopg.Connection, any_database: str
) -> None:
    with listening(any_database) as heard:
        with items.transaction():
            for number in range(10, 20):
                items.execute("INSERT INTO items VALUES (%s)", [number])
            items.execute("TRUNCATE items")
        assert heard() == 1
        items.execute("INSERT INTO items VALUES (1)")
        assert heard() == 1


def test_of_writers_at_the_same_time_one_notifies(
    items: psycopg.Connection, any_database: str
) -> None:
    with listening(any_database) as heard:
        writers = [psycopg.connect(any_database) for _ in range(5)]
        for number, writer in enumerate(writers):
            writer.execute("INSERT INTO items VALUES (%s)", [100 + number])
        for writer in reversed(writers):
            writer.commit()
            writer.close()
        assert heard() == 1
    assert outbox(items) == keys(*range(100, 105))


def test_a_write_that_is_rolled_back_wakes_no_service(
    items: psycopg.Connection, any_database: str
) -> None:
    with listening(any_database) as heard:
        with items.transaction(force_rollback=True):
            items.execute("INSERT INTO items VALUES (4)")
        assert heard() == 0


def test_with_notify_switched_off_no_service_is_notified(
    items: psycopg.Connection, any_database: str
) -> None:
    with listening(any_database) as heard:
        items.execute("SELECT setval('syncd.notify_mode', 0)")
        items.execute("INSERT INTO items VALUES (4)")
        assert heard() == 0
        items.execute("SELECT setval('syncd.notify_mode', 2)")
        items.execute("INSERT INTO items VALUES (5)")
        assert heard() == 1
