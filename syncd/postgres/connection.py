"""Connections to the database, and the driver's errors as messages with a next step."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg import errors as pg
from psycopg.abc import PQGen
from psycopg.conninfo import conninfo_to_dict

from syncd.errors import DatabaseError, DatabaseUnreachable, LockTaken, NotInstalled
from syncd.postgres import session
from syncd.postgres.batch import PreparingConnection
from syncd.postgres.rights import missing_grant
from syncd.statements import statement

KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}
CONNECT_TIMEOUT_SECONDS = 10
CONNECT: dict[str, Any] = {
    "client_encoding": "UTF8",
    "target_session_attrs": "primary",
}
"""Keywords of every connection.

Poolers keep ``client_encoding`` for each of their clients. With ``primary`` libpq skips a standby,
for example after a failover. ``read-write`` would also skip a primary with
``default_transaction_read_only``, which syncd's own sessions set off.
"""

SILENCE_SECONDS = 40.0
"""After this time without a byte the server counts as lost, although the connection is open.

It is longer than any statement may take (``statement_timeout``). Keepalives detect a lost host.
They do not detect a proxy, pooler or firewall that has dropped the connection's state and still
acknowledges our packets.
"""
SILENCE_AT_STOP_SECONDS = 4.0
"""The same limit while the service stops: an operator waits, and only work is lost, never a row."""

STANDBY_HINT = (
    "the server is a standby: name the primary in SYNCD_DSN, or all hosts and let libpq choose"
)

LOCK_TAKEN = (pg.LockNotAvailable, pg.DeadlockDetected)
"""Errors of a transaction that another session's locks ended. The same one may succeed later."""

T = TypeVar("T")


class Patience:
    """Time that a server may be silent on one service's connections.

    It shrinks when the service stops, also for waits that have begun.
    """

    def __init__(self) -> None:
        self.stopping = False

    @property
    def seconds(self) -> float:
        """The present limit."""
        return min(SILENCE_SECONDS, SILENCE_AT_STOP_SECONDS) if self.stopping else SILENCE_SECONDS


class PassConnection(PreparingConnection):
    """A blocking connection that raises ``ServerSilent`` after ``patience`` without a byte."""

    patience = Patience()
    """Default for ``open_pass_connection``."""

    def wait(self, gen: PQGen[T], *arguments: Any, **named: Any) -> T:
        """Wait as psycopg does, at most as long as ``patience`` allows."""
        try:
            return super().wait(heard(gen, self.patience), *arguments, **named)
        except ServerSilent:
            self.close()
            raise


class ServerSilent(psycopg.OperationalError):
    """The server has not answered, and the connection was closed."""


def heard(generator: PQGen[T], patience: Patience) -> PQGen[T]:
    """The same generator; raises ``ServerSilent`` if the socket is idle for too long.

    psycopg resumes it a few times a second.
    """
    try:
        wanted = next(generator)
        since = time.monotonic()
        while True:
            ready = yield wanted
            if ready:
                since = time.monotonic()
            elif time.monotonic() - since > patience.seconds:
                raise ServerSilent(f"the server has been silent for {patience.seconds:g} s")
            wanted = generator.send(ready)
    except StopIteration as end:
        result: T = end.value
        return result


@asynccontextmanager
async def connect(
    conninfo: str, consumer: str, *, autocommit: bool = True
) -> AsyncIterator[psycopg.AsyncConnection]:
    """Open one of a service's connections; raises ``DatabaseUnreachable``.

    The caller sets the session's settings when it begins a transaction.
    """
    with translated_errors(conninfo):
        connection = await psycopg.AsyncConnection.connect(
            conninfo,
            autocommit=autocommit,
            application_name=f"syncd/{consumer}",
            prepare_threshold=None,  # behind a pooler the next transaction may be another session's
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            **CONNECT,
            **KEEPALIVE,
        )
    try:
        yield connection
    finally:  # without a ROLLBACK, which a hanging server would not answer: closing undoes it all
        await connection.close()


def open_pass_connection(
    conninfo: str, consumer: str, patience: Patience | None = None
) -> PassConnection:
    """Open the blocking connection that reads rows in a worker thread.

    Raises ``DatabaseUnreachable``.

    It blocks because libpq passes a large result to an event loop in pieces of 16 kB: that took a
    third of the time of a pass.
    """
    with translated_errors(conninfo):
        connection = PassConnection.connect(
            conninfo,
            autocommit=True,
            application_name=f"syncd/{consumer}",
            prepare_threshold=None,  # ``batch`` prepares
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            **CONNECT,
            **KEEPALIVE,
        )
    session.defaults(connection)
    if patience is not None:
        connection.patience = patience
    return connection


@contextmanager
def connect_blocking(conninfo: str, *, own_forms: bool = True) -> Iterator[psycopg.Connection]:
    """Open a connection for one transaction of the command line; raises ``DatabaseUnreachable``.

    The transaction has begun. A next one on the connection has the driver's defaults and none of
    the settings. Without ``own_forms`` text is read in the user's forms, as in psql, but literals
    follow the SQL standard.
    """
    with translated_errors(conninfo):
        connection = psycopg.connect(
            conninfo, application_name="syncd", connect_timeout=CONNECT_TIMEOUT_SECONDS, **CONNECT
        )
    session.defaults(connection)
    with connection:
        with translated_errors(conninfo):
            connection.execute(
                session.settings(connection) if own_forms else session.user_settings(connection)
            )
            role = current_role(connection)
        with translated_errors(conninfo, role=role):
            yield connection


@contextmanager
def open_session(conninfo: str) -> Iterator[psycopg.Connection]:
    """Open syncd's own session in autocommit mode; raises ``DatabaseError``.

    It is for connections without a pooler: benchmarks and the embedded server.
    """
    with translated_errors(conninfo):
        connection = psycopg.connect(
            conninfo,
            application_name="syncd",
            autocommit=True,
            connect_timeout=CONNECT_TIMEOUT_SECONDS,
            **CONNECT,
        )
    with connection:
        with translated_errors(conninfo):
            connection.execute(session.own_session_settings(connection))
            role = current_role(connection)
        with translated_errors(conninfo, role=role):
            yield connection


def current_role(connection: psycopg.Connection) -> str:
    """The role whose rights count: ``ALTER ROLE … SET role`` may make it differ from the user."""
    row = connection.execute(statement("session", "read_role")).fetchone()
    assert row is not None
    return str(row[0])


@contextmanager
def translated_errors(conninfo: str = "", *, role: str | None = None) -> Iterator[None]:
    """Raise the driver's errors as syncd's own; ``role`` is the role whose rights count."""
    try:
        yield
    except (pg.InvalidSchemaName, pg.UndefinedTable, pg.UndefinedFunction) as error:
        if isinstance(error, pg.UndefinedFunction) and "syncd." in (
            error.diag.message_primary or ""
        ):
            raise DatabaseError(  # for a missing schema the server has another error
                "schema syncd is damaged, or another build installed it: "
                f"{error.diag.message_primary}",
                hint="run: syncd uninstall && syncd init, then attach again",
            ) from error
        if "syncd." in (error.diag.message_primary or "") or '"syncd"' in (
            error.diag.message_primary or ""
        ):
            raise not_installed() from error
        raise as_database_error(error) from error
    except pg.InsufficientPrivilege as error:
        role = role or str(conninfo_to_dict(conninfo).get("user") or "") or None
        raise DatabaseError(
            described(error), hint=error.diag.message_hint or missing_grant(error, role)
        ) from error
    except pg.ReadOnlySqlTransaction as error:
        raise read_only(error) from error
    except pg.FeatureNotSupported as error:
        # A pooler sent a writing transaction to a standby.
        if "during recovery" in first_line(error):
            raise DatabaseUnreachable(
                f"the server is a standby: {first_line(error)}", hint=STANDBY_HINT
            ) from error
        raise as_database_error(error) from error
    except pg.QueryCanceled as error:
        raise DatabaseUnreachable(
            f"the database has not answered in time: {first_line(error)}",
            hint="find the session that holds a lock in pg_stat_activity and pg_locks",
        ) from error
    except LOCK_TAKEN as error:
        raise LockTaken(
            f"another session holds a lock that this command needs: {first_line(error)}",
            hint="find that session in pg_locks, and try again",
        ) from error
    except psycopg.OperationalError as error:
        if error.sqlstate is not None and not error.sqlstate.startswith(("08", "28", "3D", "57")):
            raise as_database_error(error) from error
        raise DatabaseUnreachable(
            f"the database cannot be reached: {first_line(error)}",
            hint=connect_hint(str(error), conninfo),
        ) from error
    except psycopg.Error as error:
        raise as_database_error(error) from error


def translated(error: psycopg.Error | DatabaseError, conninfo: str = "") -> DatabaseError:
    """One error as syncd's own."""
    try:
        with translated_errors(conninfo):
            raise error
    except DatabaseError as own:
        return own


def not_installed() -> NotInstalled:
    """The database has no schema syncd."""
    return NotInstalled("the database has no schema syncd", hint="install it with: syncd init")


def read_only(error: pg.ReadOnlySqlTransaction) -> DatabaseError:
    """The error for a server that refuses writes and is not a standby.

    A standby would refuse the read-write transaction itself.
    """
    return DatabaseError(
        f"the database refuses to write, and is not a standby: {first_line(error)}",
        hint="check whether its disk is full, and which setting keeps it read-only: "
        "SELECT name, setting, source FROM pg_settings WHERE name LIKE '%read_only';",
    )


def as_database_error(error: psycopg.Error) -> DatabaseError:
    """The server's error with its own detail and hint."""
    if isinstance(error, pg.InsufficientPrivilege):
        return DatabaseError(
            described(error), hint=error.diag.message_hint or missing_grant(error, None)
        )
    return DatabaseError(
        described(error), hint=error.diag.message_hint or "see the server's log, and: syncd check"
    )


def described(error: psycopg.Error) -> str:
    """The server's message with its detail."""
    detail = f" ({error.diag.message_detail})" if error.diag.message_detail else ""
    return (error.diag.message_primary or first_line(error)) + detail


def first_line(error: Exception) -> str:
    """Message of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def connect_hint(text: str, conninfo: str) -> str:
    """The next step after a connection that failed."""
    if "password" in text or "authentication" in text:
        return "give user and password in SYNCD_DSN, PGPASSWORD or ~/.pgpass"
    if 'database "' in text and "does not exist" in text:
        return "create the database, or name another one in SYNCD_DSN"
    if "hot standby" in text:
        return STANDBY_HINT
    if "timeout expired" in text:
        return (
            "the server hangs, or a firewall blocks it: try psql with the same address; "
            "--embedded uses syncd's own PostgreSQL"
        )
    now = "" if conninfo else " (now: libpq's defaults)"
    return (
        f"start the server, or set SYNCD_DSN to a server that runs{now}; "
        "--embedded uses syncd's own PostgreSQL"
    )
