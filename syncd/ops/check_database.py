"""Checks of the database as a whole: its encoding, whether it takes writes, and who else gets its tables."""

from __future__ import annotations

from collections.abc import Iterator

from psycopg import sql

from syncd.errors import DatabaseError
from syncd.ops.findings import Finding, fail, ok, warn
from syncd.ops.look import Look
from syncd.postgres import schema
from syncd.postgres.publications import foreign_rows, read_carriers, read_subscriptions


def check_encoding(look: Look) -> Iterator[Finding]:
    """Text has an encoding."""
    (encoding,) = look.row("read_encoding")
    try:
        schema.check_encoding(encoding)
    except DatabaseError as error:
        yield fail("encoding", error.message, error.hint)
    else:
        yield ok("encoding", encoding)


def check_read_only(look: Look) -> Iterator[Finding]:
    """No default keeps other programs from writing; syncd's own sessions set it off."""
    is_on, source, database, user = look.row("read_read_only")
    if not is_on:
        yield ok("read-only", "no: transactions may write")
        return
    # a role's settings take effect at its login: SET role later does not bring those of another role
    role, name = sql.Identifier(user).as_string(), sql.Identifier(database).as_string()
    setting = "RESET default_transaction_read_only;"
    fixes = {
        "database": f"ALTER DATABASE {name} {setting}",
        "user": f"ALTER ROLE {role} {setting}",
        "database user": f"ALTER ROLE {role} IN DATABASE {name} {setting}",
        "client": "take default_transaction_read_only out of SYNCD_DSN or PGOPTIONS",
    }
    detail = f"default_transaction_read_only is on, set by: {source}; syncd sets it off for its own sessions, and the server is not a standby"
    yield warn(
        "read-only",
        detail,
        fixes.get(
            source,
            f"see whether the disk is full, since hosted servers set it then; else: ALTER SYSTEM {setting}",
        ),
    )


def check_publications(look: Look) -> Iterator[Finding]:
    """No subscriber gets syncd's own tables, and this database gets those of no other server."""
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
