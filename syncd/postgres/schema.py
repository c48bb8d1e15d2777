"""Install, check and remove schema ``syncd``."""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import psycopg
import structlog
from psycopg import sql

from syncd.errors import DatabaseError, LockTaken, WrongSchemaVersion
from syncd.postgres import session
from syncd.postgres.connection import LOCK_TAKEN, connect_blocking, not_installed
from syncd.settings import Settings
from syncd.statements import filled, statement

if TYPE_CHECKING:
    from alembic.config import Config

MINIMUM_SERVER_VERSION = 140000
NOTIFY_OFF, NOTIFY_GUARDED_BY_DEFAULT, NOTIFY_GUARDED = 0, 1, 2
"""The values of the sequence ``syncd.notify_mode``."""

TRY_SECONDS = 20.0
"""A change of the schema is tried again for this long if another session's locks end it.

A running service holds locks of syncd's tables for moments, in another order.
"""
PAUSE_SECONDS = 0.2
"""Mean time between two tries."""

T = TypeVar("T")
logger = structlog.get_logger()


def newest_revision() -> str:
    """The schema revision that this program needs.

    It comes from the names of the revisions' files: only ``init`` needs Alembic, and its import
    takes as long as the rest of a start.
    """
    names = [file.name for file in (files("syncd.migrations") / "versions").iterdir()]
    return max(name[1:5] for name in names if name.startswith("r"))


def install(conninfo: str, revision: str = "head") -> tuple[str | None, str]:
    """Upgrade the database to the newest revision; a second call changes nothing.

    Returns the revisions before and after. Another ``revision`` is for tests of upgrades.
    """
    return despite_locks(lambda: install_once(conninfo, revision))


def install_once(conninfo: str, revision: str) -> tuple[str | None, str]:
    """One try of ``install``."""
    import sqlalchemy
    from alembic import command

    before = None
    with connect_blocking(conninfo) as connection:
        check_server(connection)
        before = installed_revision(connection)
        if before == newest_revision():
            return before, before
        with as_file(files("syncd.migrations")) as folder:
            engine = sqlalchemy.create_engine(
                "postgresql+psycopg://", creator=lambda: connection, poolclass=sqlalchemy.StaticPool
            )
            # connect() rolls back the transaction of the reads before it.
            with engine.connect() as opened:
                # Alembic takes a while: no time-out may end it.
                opened.exec_driver_sql(session.settings(connection))
                config = alembic_config(folder)
                config.attributes["connection"] = opened
                try:
                    command.upgrade(config, revision)
                    opened.commit()
                except sqlalchemy.exc.DBAPIError as error:
                    opened.rollback()
                    raise (
                        blamed(connection, error.orig, "init")
                        if isinstance(error.orig, psycopg.Error)
                        else error
                    ) from error
        return before, newest_revision()


def store_settings(connection: psycopg.Connection, settings: Settings) -> None:
    """Store the set ones of ``SYNCD_NOTIFY`` and ``SYNCD_OUTBOX_MAX_ROWS`` in the database."""
    for name, parameters in database_settings(settings):
        connection.execute(statement("consumer", name), parameters)


def database_settings(settings: Settings) -> list[tuple[str, list[int]]]:
    """The statements that store the database's settings, with their parameters."""
    found: list[tuple[str, list[int]]] = []
    if settings.notify is not None:
        found.append(
            ("set_notify_mode", [NOTIFY_GUARDED if settings.notify == "guarded" else NOTIFY_OFF])
        )
    if settings.outbox_max_rows is not None:
        found.append(("set_outbox_max_rows", [settings.outbox_max_rows]))
    return found


def install_script() -> str:
    """The SQL that ``install`` would run on an empty database."""
    from alembic import command

    output = io.StringIO()
    with as_file(files("syncd.migrations")) as folder:
        config = alembic_config(folder, output)
        command.upgrade(config, "head", sql=True)
    return output.getvalue()


def check_installed(revision: str | None) -> None:
    """Raise unless the database's revision is the one that this program needs."""
    if revision is None:
        raise not_installed()
    if revision != newest_revision():
        raise WrongSchemaVersion(
            f"the database's schema syncd is at revision {revision}, "
            f"this syncd needs {newest_revision()}",
            hint="run: syncd init"
            if revision < newest_revision()
            else "this syncd is older than the database: "
            "install the newer one with: pip install --upgrade syncd",
        )


def installed_revision(connection: psycopg.Connection) -> str | None:
    """The database's revision, ``None`` without schema syncd."""
    row = connection.execute(statement("schema", "has_version_table")).fetchone()
    if row is None or not row[0]:
        return None
    row = connection.execute(statement("schema", "read_revision")).fetchone()
    return str(row[0]) if row else None


def check_usable(connection: psycopg.Connection) -> None:
    """Raise ``NotInstalled`` or ``WrongSchemaVersion``.

    The revision is not read for a role that may use the schema but not its tables.
    """
    installed = connection.execute(statement("schema", "has_version_table")).fetchone() == (True,)
    if not installed or connection.execute(statement("schema", "may_read_revision")).fetchone() == (
        True,
    ):
        check_installed(installed_revision(connection))


def check_server(connection: psycopg.Connection) -> None:
    """Raise for a server older than PostgreSQL 14, and for a database without an encoding."""
    check_server_version(connection.info.server_version)
    check_encoding(connection.info.parameter_status("server_encoding") or "")


def check_encoding(encoding: str) -> None:
    """Raise for an encoding under which the server does not know the characters of a text."""
    if encoding == "SQL_ASCII":
        raise DatabaseError(
            "the database's encoding is SQL_ASCII, "
            "under which PostgreSQL does not know which characters a key has",
            hint="move it into a database with an encoding: "
            "createdb --template=template0 --encoding=UTF8 NEW; pg_dump OLD | psql NEW",
        )


def check_server_version(version: int) -> None:
    """Raise for a version (as in ``server_version_num``) before PostgreSQL 14."""
    if version < MINIMUM_SERVER_VERSION:
        raise WrongSchemaVersion(
            f"the server is PostgreSQL {version // 10000}, syncd needs 14 or later",
            hint="upgrade the server",
        )


def uninstall(conninfo: str) -> bool:
    """Remove all triggers and the schema; returns whether the schema existed.

    Raises ``DatabaseError`` if users' own views or functions use the schema: they would go with it.
    """
    return despite_locks(lambda: uninstall_once(conninfo))


def uninstall_once(conninfo: str) -> bool:
    """One try of ``uninstall``."""
    with connect_blocking(conninfo) as connection:
        if installed_revision(connection) is None:
            return False
        try:
            connection.execute(statement("schema", "uninstall_limits"))
            lock_tables(connection)
            for (source,) in connection.execute(statement("schema", "list_sources")).fetchall():
                connection.execute(statement("schema", "detach"), {"source": source})
            using = [name for (name,) in connection.execute(statement("schema", "list_dependents"))]
            if using:
                raise DatabaseError(
                    f"schema syncd is used by: {', '.join(using)}",
                    hint="drop or replace what uses it, then: syncd uninstall",
                )
            connection.execute(statement("schema", "drop_search_server"))
            connection.execute(statement("schema", "drop_schema"))
        except psycopg.Error as error:
            connection.rollback()
            raise blamed(connection, error, "uninstall") from error
    return True


def lock_tables(connection: psycopg.Connection) -> None:
    """Lock all attached tables as their triggers' removal will."""
    tables = [sql.SQL(name) for name, _ in connection.execute(statement("schema", "list_tables"))]
    if tables:
        connection.execute(filled("schema", "lock_tables", tables=sql.SQL(", ").join(tables)))


def detach(conninfo: str, source: str) -> bool:
    """Stop following a table, named as in SQL; returns whether it was attached."""
    return despite_locks(lambda: detach_once(conninfo, source))


def detach_once(conninfo: str, source: str) -> bool:
    """One try of ``detach``."""
    with connect_blocking(conninfo) as connection:
        check_usable(connection)
        row = connection.execute(statement("schema", "detach"), {"source": source}).fetchone()
    return row is not None and bool(row[0])


def despite_locks(transaction: Callable[[], T]) -> T:
    """Do a transaction, again for ``TRY_SECONDS`` if another session's locks end it.

    Raises ``LockTaken`` after that.
    """
    deadline = time.monotonic() + TRY_SECONDS
    while True:
        try:
            return transaction()
        except LockTaken as error:
            if time.monotonic() > deadline:
                raise
            logger.info("trying_again", reason=error.message)
            # Two commands at once must not meet again.
            time.sleep(random.uniform(0.5, 1.5) * PAUSE_SECONDS)  # noqa: S311  not a secret


def blamed(connection: psycopg.Connection, error: psycopg.Error, command: str) -> Exception:
    """The error that names the event trigger whose function raised ``error``.

    If no event trigger did, ``error`` itself. Call it outside a transaction.
    """
    if isinstance(error, LOCK_TAKEN):
        return error
    if not connection.broken and error.diag.context:
        for name, function in connection.execute(
            statement("schema", "read_event_triggers")
        ).fetchall():
            if f"{function}() line " in error.diag.context:
                return DatabaseError(
                    f"event trigger {name} does not allow the DDL of syncd: "
                    f"{error.diag.message_primary}",
                    hint=f"as a superuser: ALTER EVENT TRIGGER {name} DISABLE; "
                    f"then: syncd {command}; then: ALTER EVENT TRIGGER {name} ENABLE;",
                )
    return error


def alembic_config(folder: Path, output: io.StringIO | None = None) -> Config:
    """Alembic's configuration with the installed package's revisions."""
    from alembic.config import Config

    config = Config(output_buffer=output) if output is not None else Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("version_path_separator", "os")
    return config
