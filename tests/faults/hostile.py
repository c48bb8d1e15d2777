"""Settings that a role, a database, a connection string or the environment may bring.

Each differs from the value that syncd's SQL depends on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.servers import PostgresServer

HOSTILE: Mapping[str, str] = {
    "client_encoding": "latin1",
    "datestyle": "SQL, DMY",
    "intervalstyle": "sql_standard",
    "timezone": "Asia/Kathmandu",
    "quote_all_identifiers": "on",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "search_path": "odd, pg_catalog",
    "array_nulls": "off",
    "standard_conforming_strings": "off",
    "escape_string_warning": "off",
    "transform_null_equals": "on",
    "client_min_messages": "error",
    "default_transaction_read_only": "on",
    "default_transaction_isolation": "serializable",
    "default_transaction_deferrable": "on",
    "statement_timeout": "300ms",
    "lock_timeout": "50ms",
    "idle_in_transaction_session_timeout": "300ms",
    "idle_session_timeout": "1s",
    "transaction_timeout": "500ms",
    "enable_indexscan": "off",
    "enable_bitmapscan": "off",
    "enable_partition_pruning": "off",
    "plan_cache_mode": "force_custom_plan",
    "synchronous_commit": "off",
    "check_function_bodies": "off",
    "plpgsql.extra_errors": "all",
}
USUAL: Mapping[str, str] = {
    "default_transaction_read_only": "off",
    "default_transaction_isolation": "read committed",
    "search_path": "public",
    "datestyle": "ISO,YMD",
    "standard_conforming_strings": "on",
    "extra_float_digits": "1",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
}
"""Settings that a test itself depends on."""
ODD_SCHEMA = (
    "CREATE SCHEMA odd",
    "CREATE FUNCTION odd.now() RETURNS timestamptz LANGUAGE sql "
    "AS $$ SELECT '1999-01-01'::timestamptz $$",
    "CREATE FUNCTION odd.md5(text) RETURNS text LANGUAGE sql AS $$ SELECT 'odd' $$",
    "CREATE FUNCTION odd.concat(VARIADIC text[]) RETURNS text LANGUAGE sql AS $$ SELECT 'odd' $$",
    "CREATE FUNCTION odd.current_setting(text) RETURNS text LANGUAGE sql AS $$ SELECT 'odd' $$",
    "CREATE FUNCTION odd.pg_is_in_recovery() RETURNS boolean LANGUAGE sql AS $$ SELECT true $$",
    "CREATE FUNCTION odd.equal(jsonb, jsonb) RETURNS boolean LANGUAGE sql IMMUTABLE "
    "AS $$ SELECT false $$",
    "CREATE OPERATOR odd.= (LEFTARG = jsonb, RIGHTARG = jsonb, FUNCTION = odd.equal)",
    "GRANT USAGE ON SCHEMA odd TO PUBLIC",
)
"""Objects that a session finds before those of ``pg_catalog``."""
SOURCES = ("role", "database", "role in database", "DSN", "environment")


@dataclass(frozen=True, slots=True)
class Hostile:
    """A connection string with odd settings for syncd, and one without them for the test."""

    dsn: str
    direct: str
    environment: Mapping[str, str] = field(default_factory=dict)


def settings_of(server: PostgresServer) -> dict[str, str]:
    """The hostile settings that a server's version has."""
    return {
        name: value
        for name, value in HOSTILE.items()
        if name != "transaction_timeout" or server.version >= 17
    }


def as_options(settings: Mapping[str, str]) -> str:
    """Settings for libpq's ``options``."""
    return " ".join(
        f"-c {name}={value.replace(' ', chr(92) + ' ')}" for name, value in settings.items()
    )


@contextmanager
def hostile(
    server: PostgresServer, source: str, settings: Mapping[str, str] | None = None
) -> Iterator[Hostile]:
    """A new database without schema syncd; its role gets odd settings from one source."""
    given = settings_of(server) if settings is None else settings
    name = f"hostile_{os.getpid()}_{source.replace(' ', '_').lower()}"
    direct = server.create_database(name)
    database, role = sql.Identifier(name), sql.Identifier(name)
    dsn = make_conninfo(direct, user=name)
    environment: dict[str, str] = {}
    try:
        with psycopg.connect(direct, autocommit=True) as db:
            for statement in ODD_SCHEMA:
                db.execute(statement.encode())
            db.execute(sql.SQL("CREATE ROLE {} LOGIN SUPERUSER").format(role))
            for setting, value in given.items():
                names = {
                    "role": role,
                    "database": database,
                    "name": sql.SQL(setting),
                    "value": sql.Literal(value),
                }
                if setting == "search_path":
                    names["value"] = sql.SQL(value)  # a list of names
                if source == "role":
                    db.execute(sql.SQL("ALTER ROLE {role} SET {name} = {value}").format(**names))
                elif source == "role in database":
                    db.execute(
                        sql.SQL(
                            "ALTER ROLE {role} IN DATABASE {database} SET {name} = {value}"
                        ).format(**names)
                    )
                elif source == "database":
                    db.execute(
                        sql.SQL("ALTER DATABASE {database} SET {name} = {value}").format(**names)
                    )
                    db.execute(
                        sql.SQL(
                            "ALTER ROLE postgres IN DATABASE {database} SET {name} FROM CURRENT"
                        ).format(**names)
                    )
        if source == "DSN":
            dsn = make_conninfo(
                dsn, options=as_options(given), client_encoding=given.get("client_encoding")
            )
        elif source == "environment":
            variables = {
                "client_encoding": "PGCLIENTENCODING",
                "datestyle": "PGDATESTYLE",
                "timezone": "PGTZ",
            }
            environment = {
                variable: given[setting]
                for setting, variable in variables.items()
                if setting in given
            }
            environment["PGOPTIONS"] = as_options(
                {key: given[key] for key in given.keys() - variables.keys()}
            )
        yield Hostile(dsn, direct, environment)
    finally:
        server.drop_database(name)
        server.execute(f'DROP ROLE "{name}"')
