"""Checks of the whole database: encoding, writes allowed by default, publications."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
from psycopg import sql

from syncd.errors import DatabaseError
from syncd.ops.findings import Finding, fail, ok, warn
from syncd.ops.look import Look
from syncd.postgres import schema
from syncd.postgres.publications import foreign_rows, read_carriers, read_subscriptions


def check_encoding(look: Look) -> Iterator[Finding]:
    """The database's encoding is one that syncd can read."""
    (encoding,) = look.row("read_encoding")
    try:
        schema.check_encoding(encoding)
    except DatabaseError as error:
        yield fail("encoding", error.message, error.hint)
    else:
        yield ok("encoding", encoding)


def check_read_only(look: Look) -> Iterator[Finding]:
    """Transactions may write by default; syncd's own sessions always set it so."""
    is_on, source, database, user = look.row("read_read_only")
    if not is_on:
        yield ok("read-only", "no: transactions may write")
        return
    # A role's settings take effect at its login: a later SET ROLE does not apply another role's.
    role, name = sql.Identifier(user).as_string(), sql.Identifier(database).as_string()
    setting = "RESET default_transaction_read_only;"
    fixes = {
        "database": f"ALTER DATABASE {name} {setting}",
        "user": f"ALTER ROLE {role} {setting}",
        "database user": f"ALTER ROLE {role} IN DATABASE {name} {setting}",
        "client": "take default_transaction_read_only out of SYNCD_DSN or PGOPTIONS",
    }
    detail = (
        f"default_transaction_read_only is on, set by: {source}; "
        "syncd sets it off for its own sessions, and the server is not a standby"
    )
    yield warn(
        "read-only",
        detail,
        fixes.get(
            source,
            "check whether the disk is full, since hosted servers set it then; "
            f"if it is not: ALTER SYSTEM {setting}",
        ),
    )


def check_publications(look: Look) -> Iterator[Finding]:
    """No publication sends syncd's own tables, and no subscription writes them here."""
    with look.transaction():
        carriers, subscriptions = (
            read_carriers(look.connection),
            read_subscriptions(look.connection),
        )
    for each in carriers:
        yield warn(f"publication {each.name}", each.problem, each.fix)
    if subscriptions:
        error = foreign_rows(subscriptions)
        yield fail("subscriptions", error.message, error.hint)
    if not carriers and not subscriptions:
        yield ok("publications", "none carries syncd's own tables")


def check_search(look: Look) -> Iterator[Finding]:
    """The database reaches the service for ``syncd.search``, if that is set up."""
    is_connected, may_search, owner = look.row("read_search")
    what = "search from SQL"
    if not is_connected:
        if look.settings.sql_address is not None:
            yield warn(
                what,
                "SYNCD_SQL_LISTEN is set, but the database is not connected to it",
                f"as {sql.Identifier(owner).as_string()}: SELECT syncd.connect_search("
                "'host=HOST port=PORT password=TOKEN');",
            )
        return
    if not may_search:
        detail = f'connected, but role "{look.role}" may not search: the way was not tried'
        yield warn(what, detail, f"run syncd check as role {owner}")
        return
    try:
        look.rows("try_search")
    except psycopg.Error as error:
        if error.diag.message_detail == "unknown_dataset":
            yield ok(what, "the database reaches the service")
        elif look.connection.broken:
            raise
        else:
            level = warn if look.service.status is None else fail
            yield level(
                what, str(error.diag.message_primary), error.diag.message_hint or "syncd status"
            )
