"""What a session of syncd sets before its SQL means what it says, whatever the role, the database, the DSN or the environment have set.

One list in two forms. For one transaction (``SET LOCAL``), which is right behind any pooler: the next transaction may be in another session, and
this session may be another program's next. For a session of our own (``SET``), once, which costs a transaction nothing.
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
    """The list for one transaction, as one message without parameters; ``more`` are further parts of ``queries/session.sql``."""
    return ";\n".join(
        (*(statement("session", name) for name in ("settings", *more)), user_settings(connection))
    )


def user_settings(connection: AnyConnection) -> LiteralString:
    """The part of the list for statements in the user's own text forms: time-outs, and how literals are read."""
    since_17 = connection.info.server_version >= TRANSACTION_TIMEOUT_SINCE
    return ";\n".join(
        statement("session", name)
        for name in ("literals", "time_outs", *(["time_outs_since_17"] if since_17 else []))
    )


def service_settings(connection: AnyConnection) -> LiteralString:
    """The same for SQL whose names are all in ``pg_catalog`` and ``syncd``."""
    return settings(connection, "service_settings")


def own_session_settings(
    connection: AnyConnection, *more: str, limits: LiteralString = ""
) -> LiteralString:
    """The list for a session of our own; ``limits`` are settings in the form for one transaction."""
    local = ";\n".join(filter(None, (settings(connection, *more), limits)))
    return ";\n".join(
        (local.replace("SET LOCAL ", "SET "), statement("session", "own_session_settings"))
    )


def beginning(connection: AnyConnection, limits: LiteralString = "") -> LiteralString:
    """BEGIN of a service's transaction that writes, with its settings and then the ``limits`` of its own; one message."""
    return ";\n".join(
        filter(None, (statement("session", "begin"), service_settings(connection), limits))
    )


def defaults(connection: psycopg.Connection[Any]) -> None:
    """Have the driver begin every transaction as syncd's own begin."""
    connection.isolation_level = IsolationLevel.READ_COMMITTED
    connection.read_only = False
    connection.deferrable = False


@contextmanager
def transaction(connection: psycopg.Connection[Any], *more: str) -> Iterator[None]:
    """A transaction with the list in force, on a connection in autocommit mode that has had ``defaults``."""
    with connection.transaction():
        connection.execute(settings(connection, *more))
        yield
