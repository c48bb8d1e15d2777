"""Publications that send the tables of schema ``syncd``, and subscriptions that write to them.

A PostgreSQL subscriber stops at the first change of a table that it does not have. If it has the
table and subscribes to it, syncd would read another server's outbox as its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import psycopg
from psycopg import sql

from syncd.errors import DatabaseError
from syncd.statements import statement


@dataclass(frozen=True, slots=True)
class Carrier:
    """A publication that carries tables of schema ``syncd``, or will as soon as they exist."""

    name: str
    all_tables: bool

    @property
    def problem(self) -> str:
        """Consequence of the publication, as a message."""
        scope = " is FOR ALL TABLES, so it" if self.all_tables else ""
        return (
            f"publication {self.name}{scope} carries the tables of schema syncd: "
            "a PostgreSQL subscriber without schema syncd stops at their first change"
        )

    @property
    def fix(self) -> str:
        """Commands for the user: on the subscriber, to continue at once, or against the cause."""
        cause = (
            "CREATE PUBLICATION NEW FOR TABLE ...; and on each subscriber: "
            "ALTER SUBSCRIPTION NAME SET PUBLICATION NEW WITH (copy_data = false);"
            if self.all_tables
            else f"ALTER PUBLICATION {sql.Identifier(self.name).as_string()} "
            "DROP TABLES IN SCHEMA syncd; or DROP TABLE, if they are named one by one"
        )
        return f"on each subscriber: syncd init, and no REFRESH PUBLICATION there; or: {cause}"


def read_carriers(connection: psycopg.Connection) -> list[Carrier]:
    """The publications that carry schema ``syncd``, by name; the schema need not exist yet."""
    return [
        Carrier(*row)
        for row in connection.execute(statement("schema", "read_publications")).fetchall()
    ]


def read_subscriptions(connection: psycopg.Connection) -> list[str]:
    """Names of the subscriptions that write another server's rows into syncd's own tables."""
    row = connection.execute(statement("schema", "read_subscriptions")).fetchone()
    return [] if row is None else list(row[0])


def foreign_rows(subscriptions: list[str]) -> DatabaseError:
    """The error for a database whose outbox holds another server's rows."""
    names = ", ".join(subscriptions)
    return DatabaseError(
        f"subscription {names} brings another server's rows into syncd's own tables: "
        "changes of this database may be missed",
        hint="on the publisher: CREATE PUBLICATION NEW FOR TABLE ...; without schema syncd; "
        f"and here: ALTER SUBSCRIPTION {sql.Identifier(subscriptions[0]).as_string()} "
        "SET PUBLICATION NEW WITH (copy_data = false);",
    )
