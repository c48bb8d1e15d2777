"""Settings that make syncd's SQL independent of role, database, DSN and environment.

One list in two forms. ``SET LOCAL`` in each transaction is correct behind any pooler: the next
transaction may be in another session, and another program may use this session next. ``SET`` once
is for syncd's own session, and adds no cost to a transaction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, LiteralString

import psycopg
from psycopg import IsolationLevel

from syncd.statements import statement

TRANSACTION_TIMEOUT_SINCE = 170000

AnyConnection = psycopg.Connection[Any] | psycopg.AsyncConnection[Any]


def settings(connection: AnyConnection, *more: str) -> LiteralString:
    """The list for one transaction, as one message without parameters.

    ``more`` are names of other statements in ``queries/session.sql``.
    """
    return ";\n".join(
        (*(statement("session", name) for name in ("settings", *more)), user_settings(connection))
    )


def user_settings(connection: AnyConnection) -> LiteralString:
    """The settings for statements in the user's own text forms: time-outs and literals."""
    since_17 = connection.info.server_version >= TRANSACTION_TIMEOUT_SINCE
    return ";\n".join(
        statement("session", name)
        for name in ("literals", "time_outs", *(["time_outs_since_17"] if since_17 else []))
    )


def service_settings(connection: AnyConnection) -> LiteralString:
    """The list for SQL whose names are all in ``pg_catalog`` and ``syncd``."""
    return settings(connection, "service_settings")


def own_session_settings(
    connection: AnyConnection, *more: str, limits: LiteralString = ""
) -> LiteralString:
    """The list for syncd's own session; ``limits`` are settings in the form for one transaction."""
    local = ";\n".join(filter(None, (settings(connection, *more), limits)))
    return ";\n".join(
        (local.replace("SET LOCAL ", "SET "), statement("session", "own_session_settings"))
    )


def beginning(connection: AnyConnection, limits: LiteralString = "") -> LiteralString:
    """BEGIN of a service's writing transaction, the list and ``limits``, as one message."""
    return ";\n".join(
        filter(None, (statement("session", "begin"), service_settings(connection), limits))
    )


def defaults(connection: psycopg.Connection[Any]) -> None:
    """Make the driver begin each transaction with the attributes of syncd's own transactions."""
    connection.isolation_level = IsolationLevel.READ_COMMITTED
    connection.read_only = False
    connection.deferrable = False


@contextmanager
def transaction(connection: psycopg.Connection[Any], *more: str) -> Iterator[None]:
    """A transaction with the list, on a connection in autocommit mode after ``defaults``."""
    with connection.transaction():
        connection.execute(settings(connection, *more))
        yield
