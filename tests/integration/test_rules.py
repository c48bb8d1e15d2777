"""Rules are kept as PostgreSQL parsed them: they have the present names, also after a dump.

attach compares their meaning.
"""

from __future__ import annotations

import io
import subprocess
from importlib.resources import as_file, files
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from syncd.postgres import schema
from syncd.postgres.layout import read_sources
from tests.integration.sources import attach
from tests.servers import PostgresServer

SETUP = """
CREATE SCHEMA app;
CREATE TYPE app.st AS ENUM ('active', 'gone');
CREATE FUNCTION app.label(int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'app-' || $1 $$;
CREATE TABLE items (was int, id int PRIMARY KEY, status app.st DEFAULT 'active',
                    lang text COLLATE "C", embedding real[]);
ALTER TABLE items DROP COLUMN was;
INSERT INTO items (id, lang, embedding) VALUES (1, 'en', '{1,2}');
"""
RULES = {"live": "status = 'active' AND label(id) <> ''", "dataset": "lang"}


def attached(db: psycopg.Connection) -> psycopg.Connection:
    """A source whose rules name a type, its value, a function, and columns behind a dropped one."""
    db.execute(SETUP)
    db.execute("SET search_path = app, public")
    attach(db, "items", **RULES)
    return db


def rules(db: psycopg.Connection) -> tuple[str, str, bool]:
    """Dataset and live as a pass reads them, and whether they are kept."""
    row = db.execute(
        "SELECT p.dataset, p.live, p.kept FROM syncd.present_rules AS p JOIN syncd.sources AS s ON "
        "s.id = p.id "
        "WHERE s.source = 'public.items'::regclass"
    ).fetchone()
    assert row is not None
    return row


def source_id(db: psycopg.Connection) -> int:
    row = db.execute(
        "SELECT id FROM syncd.sources WHERE source = 'public.items'::regclass"
    ).fetchone()
    assert row is not None
    return int(row[0])


def test_rules_have_the_present_names_of_their_objects(scratch: psycopg.Connection) -> None:
    db = attached(scratch)
    assert rules(db) == (
        "(lang)",
        "(((status = 'active'::app.st) AND (app.label(id) <> ''::text)))",
        True,
    )
    db.execute(
        "ALTER TYPE app.st RENAME VALUE 'active' TO 'it''s'; ALTER TYPE app.st RENAME TO \"St\""
    )
    db.execute("ALTER FUNCTION app.label RENAME TO name_of; ALTER SCHEMA app RENAME TO other")
    db.execute(
        'ALTER TABLE items RENAME COLUMN status TO "Status"; ALTER TABLE items RENAME COLUMN lang '
        "TO language"
    )
    now = (
        "(language)",
        "(((\"Status\" = 'it''s'::other.\"St\") AND (other.name_of(id) <> ''::text)))",
        True,
    )
    assert rules(db) == now
    assert db.execute(f"SELECT {now[0]}, {now[1]} FROM items".encode()).fetchone() == ("en", True)


def test_a_rule_with_a_dropped_object_is_its_text_until_it_can_be_compiled_again(
    scratch: psycopg.Connection,
) -> None:
    db = attached(scratch)
    before = rules(db)
    db.execute("DROP FUNCTION app.label")
    assert rules(db) == (*before[:2], False)
    db.execute(
        "CREATE FUNCTION app.label(int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'new-' || "
        "$1 $$"
    )
    db.execute("SELECT syncd.remember(%s)", [source_id(db)])
    assert rules(db) == before
    db.execute("ALTER TABLE items DROP COLUMN lang, ADD COLUMN lang text DEFAULT 'de'")
    assert rules(db) == (*before[:2], False)


def test_a_rule_keeps_no_object_of_the_user_from_being_dropped(scratch: psycopg.Connection) -> None:
    db = attached(scratch)
    db.execute(
        "DROP FUNCTION app.label; ALTER TABLE items DROP COLUMN status, DROP COLUMN lang; DROP "
        "TYPE app.st"
    )
    db.execute("DROP TABLE items; DROP SCHEMA app")


def test_the_same_rules_under_present_names_change_nothing(scratch: psycopg.Connection) -> None:
    db = attached(scratch)
    before = source_id(db)
    db.execute(
        "ALTER TYPE app.st RENAME VALUE 'active' TO 'live'; ALTER FUNCTION app.label RENAME TO "
        "name_of"
    )
    attach(db, "items", live="status = 'live' AND name_of(id) <> ''", dataset="lang")
    assert source_id(db) == before


def test_the_same_text_makes_a_new_attachment_if_its_meaning_has_changed(
    scratch: psycopg.Connection,
) -> None:
    db = attached(scratch)
    before = source_id(db)
    attach(db, "items", **RULES)
    assert source_id(db) == before
    db.execute("CREATE SCHEMA first")
    db.execute(
        "CREATE FUNCTION first.label(int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'first' "
        "$$"
    )
    db.execute("SET search_path = first, app, public")
    attach(db, "items", **RULES)
    assert source_id(db) != before
    assert "first.label" in rules(db)[1]


def test_the_stored_rules_are_brought_up_to_date(scratch: psycopg.Connection) -> None:
    db = attached(scratch)
    db.execute(
        "ALTER TYPE app.st RENAME VALUE 'active' TO 'live'; ALTER TABLE items RENAME TO things"
    )
    db.execute("SELECT syncd.remember(id) FROM syncd.sources WHERE source = 'things'::regclass")
    row = db.execute(
        "SELECT live, table_name FROM syncd.attachments WHERE source = 'things'::regclass"
    ).fetchone()
    assert row == ("(((status = 'live'::app.st) AND (app.label(id) <> ''::text)))", "things")
    given = db.execute(
        "SELECT p.arguments ->> 'live', p.arguments ->> 'dataset' FROM syncd.present_rules AS p "
        "JOIN syncd.sources AS s ON s.id = p.id WHERE s.source = 'things'::regclass"
    ).fetchone()
    assert given == (row[0], "lang")  # a rule without a renamed object is unchanged


def test_rules_of_an_older_schema_are_kept_from_the_upgrade_on(any_server: PostgresServer) -> None:
    from alembic import command

    name = "of_an_older_schema"
    conninfo = any_server.create_database(name)
    try:
        output = io.StringIO()
        with as_file(files("syncd.migrations")) as folder:
            command.upgrade(schema.alembic_config(folder, output), "0001", sql=True)
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute(output.getvalue().encode())
            attached(db)
            before = source_id(db)
            schema.install(conninfo)
            assert source_id(db) == before
            assert rules(db)[2]
            db.execute("ALTER TYPE app.st RENAME VALUE 'active' TO 'live'")
            assert "'live'::app.st" in rules(db)[1]
    finally:
        any_server.drop_database(name)


def test_a_dump_has_rules_with_the_present_names_and_is_restored_without_an_error(
    database: str, server: PostgresServer, tmp_path: Path
) -> None:
    name = "with_rules"
    restored = server.create_database(name)
    try:
        with psycopg.connect(database, autocommit=True) as db:
            attached(db)
            db.execute("ALTER TYPE app.st RENAME VALUE 'active' TO 'live'")
            db.execute("SELECT syncd.remember(%s)", [source_id(db)])
            now = rules(db)
        file = tmp_path / "dump"
        subprocess.run([server.bindir / "pg_dump", "-Fc", "-f", file, "-d", database], check=True)
        subprocess.run(
            [server.bindir / "pg_restore", "--exit-on-error", "-d", restored, file], check=True
        )
        with psycopg.connect(restored, autocommit=True) as db:
            assert rules(db) == (*now[:2], False)
            db.execute("SELECT syncd.remember(%s)", [source_id(db)])
            assert rules(db) == now
            db.execute("ALTER TYPE app.st RENAME VALUE 'live' TO 'in use'")
            assert "'in use'::app.st" in rules(db)[1]
    finally:
        server.drop_database(name)


def test_an_attach_in_a_savepoint_is_kept(scratch: psycopg.Connection) -> None:
    with scratch.transaction():
        attached(scratch)
    assert rules(scratch)[2]


def test_a_table_made_again_is_attached_like_before(scratch: psycopg.Connection) -> None:
    db = attached(scratch)
    made_again = (
        "CREATE TABLE public.items (id int PRIMARY KEY, embedding real[], lang text, status app.st)"
    )
    before = source_id(db)
    db.execute("DROP TABLE items")
    db.execute(made_again.encode())
    for _ in range(2):  # the newest of several counts
        db.execute("SELECT * FROM syncd.reattach('items')")
        assert db.execute(
            "SELECT live, dataset, key FROM syncd.sources WHERE id > 1"
        ).fetchall() == [(RULES["live"], RULES["dataset"], ["id"])]
        assert source_id(db) > before
        db.execute("DROP TABLE items")
        db.execute(made_again.encode())
    db.execute("SELECT syncd.reattach('items')")
    with pytest.raises(
        psycopg.Error, match="no table named items was attached and dropped"
    ) as refused:
        db.execute("SELECT syncd.reattach('items')")
    assert "syncd.attach('items')" in (refused.value.diag.message_hint or "")


@pytest.mark.parametrize(
    "exchange",
    [
        "ALTER TABLE items RENAME TO items_old; ALTER TABLE items_new RENAME TO items",
        "ALTER TABLE items SET SCHEMA app; ALTER TABLE items_new RENAME TO items",
        "ALTER TABLE items RENAME TO items_old; ALTER TABLE items_new RENAME TO items; ALTER "
        "SCHEMA public RENAME TO other",
    ],
)
def test_a_table_that_took_a_dropped_ones_name_is_attached_like_it(
    any_server: PostgresServer, exchange: str
) -> None:
    name = "that_took_a_name"
    conninfo = any_server.create_database(name)
    try:
        schema.install(conninfo)
        with psycopg.connect(conninfo, autocommit=True) as db:
            attached(db)
            before = source_id(db)
            db.execute("CREATE TABLE public.items_new (LIKE public.items INCLUDING ALL)")
            db.execute(exchange.encode())
            db.execute("SELECT syncd.remember(%s)", [before])  # as a pass does
            moved = read_sources(db)[-1]
            db.execute(sql.SQL("DROP TABLE {}").format(moved.identifier))
            source = read_sources(db)[-1]
            assert source.successor is not None
            assert source.successor.split(".")[1] == "items"
            db.execute("SELECT syncd.reattach(%s)", [source.successor])
            source = read_sources(db)[-1]
            assert source.id > before
            assert source.arguments["dataset"] == RULES["dataset"]
    finally:
        any_server.drop_database(name)


def test_a_table_made_again_without_a_column_says_which(scratch: psycopg.Connection) -> None:
    db = attached(scratch)
    db.execute(
        "DROP TABLE items; CREATE TABLE public.items (id int PRIMARY KEY, embedding real[], status "
        "app.st)"
    )
    with pytest.raises(psycopg.Error, match='column "lang" does not exist'):
        db.execute("SELECT syncd.reattach('items')")
