"""Changes of a whole table that fire no trigger: soon the index equals the table again.

The service goes on, and while its index is believed to be right, no reader is refused.
``test_columns.py`` has the changes of columns.
"""

from __future__ import annotations

import psycopg
import pytest

from tests.daemon import Daemon
from tests.faults.altered import (
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
from tests.faults.following import is_unknown, until

# Rewrites that change no value


def test_rewriting_alter_tables_under_load_lose_no_row_and_turn_no_reader_away(
    database: str, followed: Followed
) -> None:
    with Readers(followed.daemon) as readers, writers(database, UPSERT):
        for number in range(3):
            followed.db.execute(
                "ALTER TABLE items ALTER COLUMN note TYPE varchar(20) USING note || 'x'"
            )
            followed.db.execute(
                f"ALTER TABLE items ADD COLUMN extra{number} float DEFAULT random()".encode()
            )
            followed.db.execute("ALTER TABLE items ALTER COLUMN note TYPE text USING note || 'y'")
    followed.in_step()
    followed.logged("the table was rewritten")
    assert readers.answers
    assert readers.states == {"ready"}
    assert not readers.errors, readers.errors[:3]


@pytest.mark.parametrize(
    "rewrite", ["VACUUM FULL items", "CLUSTER items USING items_pkey", "REINDEX TABLE items"]
)
def test_a_table_that_is_packed_stays_ready_and_answers(followed: Followed, rewrite: str) -> None:
    with Readers(followed.daemon) as readers:
        for number in range(3):
            followed.db.execute(rewrite.encode())
            followed.db.execute(
                "UPDATE items SET v = ARRAY[%s, 1, 1]::vector WHERE id = 1", [number]
            )
            followed.in_step()
    assert readers.answers
    assert readers.states == {"ready"}
    assert not readers.errors, readers.errors[:3]


def test_unused_columns_come_and_go_unnoticed(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items ADD COLUMN more text DEFAULT 'm', ADD COLUMN other int")
    followed.db.execute("ALTER TABLE items DROP COLUMN note")
    followed.db.execute("UPDATE items SET v = '[5,5,5]', other = 1 WHERE id = 7")
    followed.db.execute("ALTER TABLE items RENAME COLUMN other TO another")
    followed.in_step()
    assert "source_doubted" not in followed.log


def test_a_truncated_table_is_empty_and_is_not_read_a_second_time(followed: Followed) -> None:
    followed.db.execute("TRUNCATE items")
    assert followed.client.search("items", [1, 0, 0], consistency="strong") == []
    followed.db.execute("BEGIN; TRUNCATE items; INSERT INTO items VALUES (5, '[1,2,3]'); COMMIT")
    followed.in_step()
    assert read_index(followed.client, "items") == {5: [1, 2, 3]}
    assert "source_doubted" not in followed.log


# The table itself


def test_a_renamed_table_and_a_table_in_another_schema_are_followed(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items RENAME TO things")
    followed.db.execute("UPDATE things SET v = '[1,1,1]' WHERE id = 1")
    followed.in_step(followed.query.replace("items", "things"))
    followed.db.execute("CREATE SCHEMA elsewhere")
    followed.db.execute("ALTER TABLE things SET SCHEMA elsewhere")
    followed.db.execute("INSERT INTO elsewhere.things VALUES (4000, '[1,1,1]')")
    followed.in_step(followed.query.replace("items", "elsewhere.things"))
    sources = {status.source for status in followed.client.datasets()}
    assert "elsewhere.things" in sources


def test_a_strong_read_alongside_a_renaming_holds_the_rows_that_were_committed_with_it(
    followed: Followed,
) -> None:
    old, new = "items", "things"
    for number in range(5000, 5015):
        with followed.db.transaction():
            followed.db.execute(f"ALTER TABLE {old} RENAME TO {new}".encode())
            followed.db.execute(f"INSERT INTO {new} VALUES ({number}, '[7,{number},7]')".encode())
        hits = followed.client.search("items", [7, number, 7], k=1, consistency="strong")
        assert hits[0].key == number
        old, new = new, old


def test_a_dropped_table_says_so_until_it_is_detached(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    make_items(db)
    other_source(db)
    with serving(db, daemon) as followed:
        followed.in_step()
        (oid,) = db.execute("SELECT 'items'::regclass::oid").fetchone() or [None]
        db.execute("DROP TABLE items")
        followed.failed(f"the table was dropped: run: syncd detach {oid}")
        db.execute("UPDATE others SET v = '[3,2,1]'")
        followed.in_step("SELECT id, v::real[] FROM others", "others")
        db.execute("SELECT syncd.detach(%s)", [str(oid)])
        until(lambda: is_unknown(followed.client, "items"), "the dataset is gone")


@pytest.mark.parametrize("detached", ["before", "after"])
def test_a_table_dropped_and_made_again_under_its_name_is_another_source(
    followed: Followed, detached: str
) -> None:
    db = followed.db
    (oid,) = db.execute("SELECT 'items'::regclass::oid").fetchone() or [None]
    db.execute(
        "BEGIN; DROP TABLE items; "
        "CREATE TABLE items (id int PRIMARY KEY, v vector(3), deleted_at date); COMMIT"
    )
    db.execute("INSERT INTO items VALUES (1, '[3,3,3]')")
    if detached == "before":
        db.execute("SELECT syncd.detach(%s)", [str(oid)])
    db.execute("SELECT syncd.attach('items', live => 'deleted_at IS NULL', metric => 'l2')")
    if detached == "after":

        def taken() -> None:
            assert followed.client.status().quarantined == 1

        eventually(taken)
        db.execute("SELECT syncd.detach(%s)", [str(oid)])
    db.execute("INSERT INTO items VALUES (2, '[4,3,3]')")
    followed.in_step()
