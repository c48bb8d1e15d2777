"""Transactions of the command line: a shadowed catalogue, the role whose rights count, literals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.integration.checking import ROWS, TABLE, about, examine
from tests.integration.commands import run
from tests.servers import PostgresServer, fetch

SHADOWED_TABLES = (
    "pg_class",
    "pg_event_trigger",
    "pg_namespace",
    "pg_proc",
    "pg_publication",
    "pg_publication_tables",
    "pg_roles",
)
SHADOWED_FUNCTIONS = (
    "to_regclass(text) RETURNS regclass",
    "has_table_privilege(text, text) RETURNS boolean",
    "quote_ident(text) RETURNS text",
    "setval(regclass, bigint) RETURNS bigint",
)
SHADOW_PATH = "other, public, pg_catalog"


@contextmanager
def two_roles(db: psycopg.Connection) -> Iterator[tuple[str, str]]:
    """A role that logs in, and the group whose rights its sessions have."""
    login, group = f"login_{db.info.dbname}", f"group_{db.info.dbname}"
    names = {"login": sql.Identifier(login), "team": sql.Identifier(group)}
    script = (
        "CREATE ROLE {team}; CREATE ROLE {login} LOGIN IN ROLE {team}; "
        "ALTER ROLE {login} SET role = {team}"
    )
    db.execute(sql.SQL(script).format(**names))
    try:
        yield login, group
    finally:
        db.execute(
            sql.SQL("DROP OWNED BY {login}, {team}; DROP ROLE {login}, {team}").format(**names)
        )


def test_every_command_works_if_the_search_path_shadows_the_catalogue(
    old_or_new_server: PostgresServer,
) -> None:
    conninfo = old_or_new_server.create_database("shadowed")
    try:
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute(f"CREATE SCHEMA other; {TABLE}; {ROWS}".encode())
            for table in SHADOWED_TABLES:
                db.execute(f"CREATE TABLE other.{table} (x int)".encode())
            for function in SHADOWED_FUNCTIONS:
                body = "LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the wrong one'; END $$"
                db.execute(f"CREATE FUNCTION other.{function} {body}".encode())
            db.execute(f"ALTER DATABASE shadowed SET search_path = {SHADOW_PATH}".encode())
        for words in (
            ("init",),
            ("attach", "items"),
            ("attach", "items", "--metric", "l2"),
            ("detach", "items"),
            ("attach", "public.items"),
            ("init",),
            ("uninstall", "--yes"),
        ):
            done = run(*words, SYNCD_DSN=conninfo, SYNCD_NOTIFY="guarded")
            assert done.returncode == 0, (words, done.stderr)
        assert (
            fetch(conninfo, "SELECT count(*) FROM pg_catalog.pg_namespace WHERE nspname = 'syncd'")
            == 0
        )
    finally:
        old_or_new_server.drop_database("shadowed")


def test_check_resets_an_inherited_setting_of_the_role_that_logged_in(
    database: str, tmp_path: Path
) -> None:
    with psycopg.connect(database, autocommit=True) as db, two_roles(db) as (login, group):
        db.execute(f'ALTER ROLE "{login}" SET default_transaction_read_only = on'.encode())
        for where in ("", f' IN DATABASE "{db.info.dbname}"'):
            db.execute(
                f'ALTER ROLE "{login}"{where} SET default_transaction_read_only = on'.encode()
            )
            found = about(examine(db, tmp_path, user=login), "read-only")
            assert found.fix == f'ALTER ROLE "{login}"{where} RESET default_transaction_read_only;'
            assert group not in found.fix


def test_a_missing_right_is_granted_to_the_role_whose_rights_count(server: PostgresServer) -> None:
    conninfo = server.create_database("lacking")
    try:
        with psycopg.connect(conninfo, autocommit=True) as db, two_roles(db) as (login, group):
            dsn = make_conninfo(conninfo, user=login)
            refused = run("init", SYNCD_DSN=dsn)
            assert refused.returncode != 0
            grant = f'GRANT CREATE ON DATABASE lacking TO "{group}";'
            assert grant in refused.stderr
            db.execute(grant.encode())
            done = run("init", SYNCD_DSN=dsn)
            assert done.returncode == 0, done.stderr
    finally:
        server.drop_database("lacking")


def test_attach_reads_a_backslash_in_a_rule_as_a_backslash(any_db: psycopg.Connection) -> None:
    any_db.execute(f"{TABLE}; {ROWS}".encode())
    name = any_db.info.dbname
    any_db.execute(f'ALTER DATABASE "{name}" SET standard_conforming_strings = off'.encode())
    done = run(
        "attach",
        "items",
        "--dataset",
        r"'a\b'",
        "--live",
        r"lang <> 'c\n'",
        SYNCD_DSN=any_db.info.dsn,
    )
    assert done.returncode == 0, done.stderr
    row = any_db.execute(
        "SELECT dataset, live FROM syncd.sources WHERE source = 'public.items'::regclass"
    ).fetchone()
    assert row == (r"'a\b'", r"lang <> 'c\n'")
    with psycopg.connect(any_db.info.dsn, autocommit=True) as db:
        compiled = db.execute(
            "SELECT p.dataset FROM syncd.present_rules AS p WHERE p.dataset LIKE '%a_b%'"
        ).fetchone()
        assert compiled is not None
        db.execute("SET standard_conforming_strings = on")
        assert db.execute(f"SELECT {compiled[0]}".encode()).fetchone() == (r"a\b",)
