"""A trigger on a table that is not its source: it notes no change.

A dump restores such triggers with a table, and a former partition keeps them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest

from syncd.postgres import schema
from tests.integration.captured import keys, outbox
from tests.integration.checking import about, examine
from tests.integration.partitions import source_id
from tests.integration.sources import attach
from tests.servers import PostgresServer

WRITES: tuple[LiteralString, ...] = (
    "INSERT INTO other VALUES (1, '{1}')",
    "UPDATE other SET id = 2",
    "DELETE FROM other",
    "TRUNCATE other",
)


@pytest.fixture(params=["statement", "row", "partitioned"])
def strayed(any_db: psycopg.Connection, request: pytest.FixtureRequest) -> psycopg.Connection:
    """A source, and another table with the same triggers, as after pg_restore."""
    partitioned = request.param == "partitioned"
    parent = "PARTITION BY RANGE (id)" if partitioned else ""
    any_db.execute(f"CREATE TABLE items (id int PRIMARY KEY, embedding real[]) {parent}".encode())
    if partitioned:
        any_db.execute("CREATE TABLE leaf PARTITION OF items DEFAULT")
    any_db.execute("CREATE TABLE other (id int PRIMARY KEY, embedding real[])")
    attach(any_db, "items", row_triggers=request.param == "row")
    triggers = (
        "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid IN ('items'::regclass, "
        "to_regclass('leaf'))"
        " AND tgname LIKE 'syncd%' AND tgparentid = 0"
    )
    for (definition,) in any_db.execute(triggers).fetchall():
        any_db.execute(
            definition.replace("public.items", "public.other")
            .replace("public.leaf", "public.other")
            .encode()
        )
    any_db.execute("TRUNCATE syncd.outbox")
    return any_db


@pytest.mark.parametrize("write", WRITES)
def test_a_trigger_on_another_table_notes_nothing_and_fails_no_write(
    strayed: psycopg.Connection, write: LiteralString
) -> None:
    strayed.execute("INSERT INTO items VALUES (7, '{7}')")
    strayed.execute(write)
    strayed.execute("DELETE FROM items")
    assert outbox(strayed) == keys(7, 7)


def test_a_write_that_looks_up_its_source_waits_for_no_lock(
    strayed: psycopg.Connection, any_database: str
) -> None:
    """VACUUM FULL locks syncd's table: the change is noted, since an extra key does no harm."""
    with psycopg.connect(any_database) as other:
        other.execute("LOCK TABLE syncd.attachments IN ACCESS EXCLUSIVE MODE")
        strayed.execute("SET statement_timeout = '20s'")
        for write in WRITES:
            strayed.execute(write)
        strayed.execute("INSERT INTO items VALUES (7, '{7}')")
    assert ("k", "7") in outbox(strayed)


def test_check_names_it_and_the_command_that_drops_it(
    strayed: psycopg.Connection, tmp_path: Path
) -> None:
    found = about(examine(strayed, tmp_path), "stray triggers of public.items")
    assert "public.other" in found.detail
    assert (
        f'DROP TRIGGER "syncd_{source_id(strayed, "items")}_truncate" ON public.other;' in found.fix
    )
    strayed.execute(found.fix.encode())
    assert "stray triggers of public.items" not in {
        each.what for each in examine(strayed, tmp_path)
    }


def test_a_transaction_older_than_the_attachment_is_noted_all_the_same(
    any_db: psycopg.Connection, any_database: str
) -> None:
    """The transaction does not see the attachment, and the triggers fire."""
    any_db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, embedding real[]) PARTITION BY RANGE (id)"
    )
    any_db.execute("CREATE TABLE leaf PARTITION OF items DEFAULT")
    with psycopg.connect(any_database) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT count(*) FROM pg_class")
        attach(any_db, "items")
        old.execute("INSERT INTO items VALUES (7, '{7}')")
        old.execute("TRUNCATE leaf")
        old.commit()
    assert outbox(any_db)[-2:] == [*keys(7), ("r", None)]


def test_a_restored_copy_of_the_whole_database_notes_its_own_writes(
    any_server: PostgresServer, any_db: psycopg.Connection, any_database: str
) -> None:
    """Its tables have other numbers than those in its trigger functions."""
    if not (any_server.bindir / "pg_dump").exists():
        pytest.skip("these programs have no pg_dump")
    any_db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    attach(any_db, "items")
    dump = subprocess.run(
        [any_server.bindir / "pg_dump", any_database], check=True, capture_output=True, text=True
    ).stdout
    restored = any_server.create_database("restored_copy")
    try:
        subprocess.run(
            [any_server.bindir / "psql", "-q", "-v", "ON_ERROR_STOP=1", restored],
            input=dump,
            check=True,
            capture_output=True,
            text=True,
        )
        with psycopg.connect(restored, autocommit=True) as db:
            db.execute("DELETE FROM syncd.outbox")
            db.execute("INSERT INTO items VALUES (7, '{7}')")
            assert outbox(db) == keys(7)
    finally:
        any_server.drop_database("restored_copy")


def test_a_source_of_the_previous_revision_gets_the_new_functions(
    any_server: PostgresServer,
) -> None:
    conninfo = any_server.create_database("upgraded")
    try:
        schema.install(conninfo, "0001")
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
            db.execute("SELECT syncd.attach('items')")
            db.execute("INSERT INTO items VALUES (1, '{1}')")
            before = outbox(db)
            schema.install(conninfo)
            assert outbox(db) == before
            assert db.execute(
                "SELECT count(*) FROM syncd.missing_triggers(%s)", [source_id(db, "items")]
            ).fetchone() == (0,)
            db.execute("SET statement_timeout = '20s'")
            with psycopg.connect(conninfo) as other:
                other.execute("LOCK TABLE syncd.outbox IN SHARE MODE")
                db.execute("INSERT INTO items VALUES (2, '{2}')")
            db.execute("INSERT INTO items VALUES (3, '{3}')")
            assert outbox(db)[len(before) :] == keys(3)
            attach(db, "items")  # the same arguments: nothing changes
            assert outbox(db)[len(before) :] == keys(3)
    finally:
        any_server.drop_database("upgraded")
