"""Sources: attach as any role, be refused, and list the triggers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.servers import PostgresServer

STATEMENT_FORM = ["delete", "insert", "truncate", "update"]
ROW_FORM = ["row", "truncate"]


@contextmanager
def refused(db: psycopg.Connection, message: str, hint: str | None = None) -> Iterator[None]:
    """The block raises a server error with these words in its message and its hint.

    Every refusal has a hint.
    """
    with pytest.raises(psycopg.Error, match=message) as caught, db.transaction():
        yield
    assert caught.value.diag.message_hint, "every refusal has a hint"
    assert hint is None or hint in caught.value.diag.message_hint


def attach(db: psycopg.Connection, source: str, **arguments: Any) -> tuple[int, int, int]:
    """Attach a source; returns its rows, live rows and datasets."""
    named = sql.SQL(", ").join(
        [
            sql.Literal(source),
            *(
                sql.SQL("{} => {}").format(sql.SQL(name), value)
                for name, value in arguments.items()
            ),
        ]
    )
    row = db.execute(
        sql.SQL("SELECT rows, live_rows, datasets FROM syncd.attach({})").format(named)
    ).fetchone()
    assert row is not None
    return row


def everything(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    """Every object of schema syncd and every trigger, with the transaction that last wrote it."""
    return db.execute(
        "SELECT 'relation', oid, relname, xmin::text FROM pg_class WHERE relnamespace = "
        "'syncd'::regnamespace AND relkind <> 'S' UNION ALL"
        " SELECT 'function', oid, proname, xmin::text FROM pg_proc WHERE pronamespace = "
        "'syncd'::regnamespace UNION ALL"
        " SELECT 'attachment', id::oid, source::text, xmin::text FROM syncd.attachments UNION ALL"
        " SELECT 'trigger', oid, tgname, xmin::text FROM pg_trigger WHERE NOT tgisinternal ORDER "
        "BY 1, 2"
    ).fetchall()


@contextmanager
def role(server: PostgresServer, name: str, options: str = "LOGIN") -> Iterator[str]:
    """A role for one test."""
    server.execute(f"CREATE ROLE {name} {options}")
    try:
        yield name
    finally:
        server.execute(f"DROP ROLE {name}")


@contextmanager
def connected_as(conninfo: str, user: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection of a role."""
    with psycopg.connect(make_conninfo(conninfo, user=user), autocommit=True) as connection:
        yield connection


def events(db: psycopg.Connection, table: str = "items") -> list[str]:
    """Events of syncd's triggers on a table."""
    return [
        row[0].rpartition("_")[2]
        for row in db.execute(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = %s::regclass AND tgname LIKE 'syncd%%' "
            "ORDER BY 1",
            [table],
        ).fetchall()
    ]
