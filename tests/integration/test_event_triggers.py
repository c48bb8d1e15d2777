"""Event triggers that forbid DDL: the error names one and the command that disables it."""

from __future__ import annotations

from typing import LiteralString

import psycopg
import pytest

from syncd.errors import DatabaseError
from syncd.postgres import schema
from tests.integration.sources import attach, refused
from tests.servers import PostgresServer

FORBID = """
CREATE FUNCTION no_ddl() RETURNS event_trigger LANGUAGE plpgsql
    AS $$ BEGIN RAISE EXCEPTION 'no DDL in working hours'; END $$;
CREATE EVENT TRIGGER "Guard" ON {event} {tags} EXECUTE FUNCTION no_ddl();
"""
SAID = 'event trigger "Guard" does not allow the DDL of syncd: no DDL in working hours'
HINT = 'ALTER EVENT TRIGGER "Guard" DISABLE;'


def forbid(db: psycopg.Connection, event: str = "ddl_command_start", tags: str = "") -> None:
    db.execute(FORBID.format(event=event, tags=tags).encode())


@pytest.fixture
def items(any_db: psycopg.Connection) -> psycopg.Connection:
    """A table, not attached."""
    any_db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    return any_db


@pytest.mark.parametrize(
    ("event", "tags"),
    [
        ("ddl_command_start", ""),
        ("ddl_command_end", ""),
        ("sql_drop", ""),
        *(
            ("ddl_command_start", f"WHEN TAG IN ('{tag}')")
            for tag in (
                "CREATE TABLE",
                "CREATE INDEX",
                "CREATE FUNCTION",
                "CREATE TRIGGER",
                "ALTER TABLE",
            )
        ),
    ],
)
def test_attach_names_the_event_trigger_that_forbids_its_ddl(
    items: psycopg.Connection, event: str, tags: str
) -> None:
    forbid(items, event, tags)
    with refused(items, SAID, HINT):
        attach(items, "items")
    items.execute('ALTER EVENT TRIGGER "Guard" DISABLE')
    attach(items, "items")


CHANGES: tuple[LiteralString, ...] = ("SELECT syncd.mend('items')", "SELECT syncd.detach('items')")


@pytest.mark.parametrize("change", CHANGES)
def test_detach_and_mend_name_it_too(items: psycopg.Connection, change: LiteralString) -> None:
    attach(items, "items")
    items.execute(
        "DO $$ BEGIN EXECUTE (SELECT format('DROP TRIGGER %I ON items', tgname) FROM pg_trigger "
        "WHERE tgname LIKE 'syncd%insert' AND tgrelid = 'items'::regclass); END $$"
    )
    forbid(items)
    with refused(items, SAID, HINT):
        items.execute(change)


def test_another_error_is_not_blamed_on_an_event_trigger(items: psycopg.Connection) -> None:
    items.execute(
        "CREATE FUNCTION watch_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN END $$"
    )
    items.execute("CREATE EVENT TRIGGER harmless ON ddl_command_start EXECUTE FUNCTION watch_ddl()")
    with refused(items, "the live expression cannot be used"):
        attach(items, "items", live="nothing > 3")


def test_init_and_uninstall_name_it(any_server: PostgresServer) -> None:
    conninfo = any_server.create_database("guarded")
    try:
        with psycopg.connect(conninfo, autocommit=True) as db:
            forbid(db)
            with pytest.raises(DatabaseError, match=SAID) as caught:
                schema.install(conninfo)
            assert HINT in (caught.value.hint or "")
            db.execute('ALTER EVENT TRIGGER "Guard" DISABLE')
            schema.install(conninfo)
            db.execute('ALTER EVENT TRIGGER "Guard" ENABLE')
            with pytest.raises(DatabaseError, match=SAID):
                schema.uninstall(conninfo)
    finally:
        any_server.drop_database("guarded")
