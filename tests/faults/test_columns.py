"""Columns that get other values or another type, or are renamed, dropped or made again.

The service notices it, and indexes the rows again if needed. If it can no longer read a table, it
says the reason and the next command.
"""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.daemon import Daemon
from tests.faults.altered import (
    LIVE,
    ROWS,
    UPSERT,
    Followed,
    Readers,
    eventually,
    make_items,
    other_source,
    read_index,
    serving,
    writers,
)

# Changed values and types


def test_vectors_that_an_alter_column_computes_again_are_found(
    database: str, followed: Followed
) -> None:
    with writers(database, UPSERT):
        followed.db.execute(
            "ALTER TABLE items ALTER COLUMN v TYPE vector(3) USING ARRAY[id, 9, 9]::vector(3)"
        )
    followed.in_step()
    assert followed.client.search("items", [3, 9, 9], k=1)[0].key == 3
    followed.logged("column v was altered")


def test_other_values_in_the_column_of_the_live_rule_are_noticed(
    followed: Followed,
) -> None:
    followed.db.execute(
        "ALTER TABLE items ALTER COLUMN deleted_at TYPE date "
        "USING CASE WHEN id % 10 = 1 THEN date '2000-01-01' END"
    )
    followed.in_step()
    assert 10 in read_index(followed.client, "items")


def test_a_column_dropped_and_added_again_under_its_name_is_noticed(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items DROP COLUMN deleted_at, ADD COLUMN deleted_at date")
    followed.in_step()
    assert len(read_index(followed.client, "items")) == ROWS


def test_a_changed_vector_dimension_makes_a_new_index_and_the_old_one_answers_meanwhile(
    followed: Followed,
) -> None:
    with Readers(followed.daemon) as readers:
        followed.db.execute(
            "ALTER TABLE items ALTER COLUMN v TYPE vector(4) USING ARRAY[id, 1, 2, 3]::vector(4)"
        )
        followed.in_step()
    assert not [error for error in readers.errors if "Dimension" not in error], readers.errors[:3]
    assert followed.client.search("items", [3, 1, 2, 3], k=1)[0].key == 3
    followed.db.execute("UPDATE items SET v = '[0,0,0,1]' WHERE id = 3")
    followed.in_step()
    followed.db.execute("ALTER TABLE items ALTER COLUMN v TYPE vector")
    followed.in_step()


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE items ALTER COLUMN v TYPE real[] USING v || ARRAY[4]::real[]",
        "UPDATE items SET v = v || ARRAY[4]::real[]",
    ],
)
def test_arrays_of_another_length_are_indexed(
    db: psycopg.Connection, daemon: Daemon, change: str
) -> None:
    make_items(db, "real[]")
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 1, 2]::real[] FROM generate_series(1001, 4000) AS i"
    )
    with serving(db, daemon) as followed:
        followed.in_step()
        db.execute(change.encode())
        followed.in_step()
        assert followed.client.search("items", [3, 3, 1, 4], k=1)[0].key == 3


@pytest.mark.parametrize("vector", ["halfvec(3)", "real[]"])
def test_vectors_of_another_type_are_indexed(followed: Followed, vector: str) -> None:
    followed.db.execute(
        f"ALTER TABLE items ALTER COLUMN v TYPE {vector} USING v::{vector}".encode()
    )
    followed.db.execute("UPDATE items SET v = v WHERE id = 1")
    followed.in_step()


def test_a_key_that_becomes_longer_is_followed_without_a_new_index(
    database: str, followed: Followed
) -> None:
    with Readers(followed.daemon) as readers, writers(database, UPSERT):
        followed.db.execute("ALTER TABLE items ALTER COLUMN id TYPE bigint")
    followed.db.execute("INSERT INTO items VALUES (5000000000, '[1,2,3]')")
    followed.in_step()
    assert not readers.errors, readers.errors[:3]
    assert "source_altered" not in followed.log


def test_a_key_of_another_kind_makes_a_new_index(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items ALTER COLUMN id TYPE text")
    followed.db.execute("INSERT INTO items VALUES ('4444', '[1,2,3]')")
    followed.in_step()
    assert followed.client.search("items", [1, 2, 3], k=1)[0].key == "4444"


def test_a_column_of_a_type_that_cannot_be_read_fails_with_the_reason_until_it_is_repaired(
    followed: Followed,
) -> None:
    followed.db.execute("ALTER TABLE items ALTER COLUMN v TYPE text USING v::text")
    followed.failed("column v is of type text, which holds no vector")
    followed.db.execute("ALTER TABLE items ALTER COLUMN v TYPE vector(3) USING v::vector(3)")
    followed.in_step()
    followed.db.execute("ALTER TABLE items ALTER COLUMN id TYPE numeric")
    followed.failed("column id is of type numeric, which cannot be a key")
    followed.db.execute("ALTER TABLE items ALTER COLUMN id TYPE int")
    followed.in_step()


# Columns to filter on


@pytest.fixture
def filtered(db: psycopg.Connection, daemon: Daemon) -> Iterator[Followed]:
    make_items(db, attach=", columns => ARRAY['note', 'part']")
    with serving(db, daemon) as it:
        yield it
        daemon.stop()


def found_by(followed: Followed, wanted: dict[str, object]) -> set[object]:
    return {hit.key for hit in followed.client.search("items", [1, 0, 0], k=ROWS, filter=wanted)}


def test_other_values_in_a_column_to_filter_on_are_found_by_them(filtered: Followed) -> None:
    filtered.db.execute("ALTER TABLE items ALTER COLUMN note TYPE text USING 'm' || id % 3")

    def check() -> None:
        assert found_by(filtered, {"note": "m0"}) == {
            key for key in range(1, ROWS) if key % 3 == 0 and key % 10
        }

    eventually(check)
    filtered.logged("column note was altered")


def test_a_column_to_filter_on_that_is_given_another_type_makes_a_new_index(
    filtered: Followed,
) -> None:
    assert found_by(filtered, {"note": "n"})
    filtered.db.execute("ALTER TABLE items ALTER COLUMN note TYPE int USING id % 4")

    def check() -> None:
        assert found_by(filtered, {"note": {"gt": 2}}) == {
            key for key in range(1, ROWS) if key % 4 == 3 and key % 10
        }

    eventually(check)
    filtered.daemon.stop()
    filtered.daemon.start()
    check()
    filtered.db.execute("ALTER TABLE items ALTER COLUMN note TYPE bigint")
    filtered.in_step()
    check()
    assert filtered.log.count("source_altered") == 1  # a longer integer fits the same index


def test_a_dropped_column_to_filter_on_fails_with_the_command_that_goes_on_without(
    filtered: Followed,
) -> None:
    filtered.db.execute("ALTER TABLE items DROP COLUMN note")
    said = filtered.failed("there is no column note")
    assert "--column part" in said
    assert "--column note" not in said
    filtered.db.execute(
        f"SELECT syncd.attach('items', live => '{LIVE}', metric => 'l2', "
        "columns => ARRAY['part'])".encode()
    )
    filtered.in_step()
    assert len(found_by(filtered, {"part": "a"})) == ROWS * 9 // 10


def test_a_dropped_column_to_filter_on_that_is_added_again_goes_on_with_its_values(
    filtered: Followed,
) -> None:
    filtered.db.execute("ALTER TABLE items DROP COLUMN note")
    filtered.failed("there is no column note")
    filtered.db.execute("ALTER TABLE items ADD COLUMN note int DEFAULT 7")
    filtered.in_step()
    assert len(found_by(filtered, {"note": {"gte": 7}})) == ROWS * 9 // 10


def test_a_renamed_column_to_filter_on_fails_with_the_command_that_names_it(
    filtered: Followed,
) -> None:
    filtered.db.execute("ALTER TABLE items RENAME COLUMN note TO remark")
    assert "--column remark --column part" in filtered.failed("there is no column note")


def test_a_column_to_filter_on_that_gets_a_wrong_type_fails_with_the_reason(
    filtered: Followed,
) -> None:
    filtered.db.execute("ALTER TABLE items ALTER COLUMN note TYPE interval USING NULL")
    filtered.failed("column note was given a type or a collation that cannot be filtered on")
    filtered.db.execute("ALTER TABLE items ALTER COLUMN note TYPE text USING 'back'")
    filtered.in_step()
    assert len(found_by(filtered, {"note": "back"})) == ROWS * 9 // 10


# Renamed columns


RENAMED = {
    "the key": (
        "id",
        "key => ARRAY['renamed']",
        "SELECT renamed, v::real[] FROM items WHERE deleted_at IS NULL",
    ),
    "the vector": (
        "v",
        "vector => 'renamed'",
        "SELECT id, renamed::real[] FROM items WHERE deleted_at IS NULL",
    ),
}


@pytest.mark.parametrize("what", RENAMED)
@pytest.mark.parametrize("way_out", ["attached again", "renamed back"])
def test_a_renamed_column_fails_its_dataset_alone_until_it_is(
    db: psycopg.Connection, daemon: Daemon, what: str, way_out: str
) -> None:
    column, argument, query = RENAMED[what]
    make_items(db, attach=", dataset => $$'items' || left(part, 0)$$")
    other_source(db)
    with serving(db, daemon) as followed:
        followed.in_step()
        db.execute(f"ALTER TABLE items RENAME COLUMN {column} TO renamed".encode())
        said = followed.failed(f"column {column} was renamed to renamed")
        assert "attach it again: syncd attach public.items" in said
        assert "renamed" in said.partition("syncd attach")[2]
        key = "renamed" if column == "id" else "id"
        db.execute(f"UPDATE items SET note = 'm' WHERE {key} = 1".encode())
        db.execute("UPDATE others SET v = '[3,2,1]'")
        followed.in_step("SELECT id, v::real[] FROM others", "others")
        if way_out == "renamed back":
            db.execute(f"ALTER TABLE items RENAME COLUMN renamed TO {column}".encode())
            db.execute("UPDATE items SET v = '[7,7,7]' WHERE id = 2")
            followed.in_step()
            return
        given = {
            "key": "key => ARRAY['id']",
            "live": f"live => '{LIVE}'",
            "dataset": "dataset => $$'items' || left(part, 0)$$",
        }
        given[argument.partition(" ")[0]] = argument
        db.execute(
            f"SELECT syncd.attach('items', {', '.join(given.values())}, metric => 'l2')".encode()
        )
        followed.in_step(query)


@pytest.mark.parametrize("column", ["deleted_at", "part"])
def test_a_renamed_column_of_a_rule_is_followed_and_no_reader_turned_away(
    db: psycopg.Connection, daemon: Daemon, column: str
) -> None:
    make_items(db, attach=", dataset => $$'items' || left(part, 0)$$")
    with serving(db, daemon) as followed:
        followed.in_step()
        gone = "renamed" if column == "deleted_at" else "deleted_at"
        with Readers(daemon) as readers:
            db.execute(f"ALTER TABLE items RENAME COLUMN {column} TO renamed".encode())
            db.execute(f"UPDATE items SET {gone} = now() WHERE id % 3 = 0".encode())
            db.execute(f"ALTER TABLE items ADD COLUMN {column} date DEFAULT now()".encode())
            followed.in_step(f"SELECT id, v::real[] FROM items WHERE {gone} IS NULL")
        assert readers.answers
        assert not readers.errors, readers.errors[:3]
