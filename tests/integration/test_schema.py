"""Schema syncd: each way to install it gives the same schema; the rights for it and for attach."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from syncd.errors import LockTaken
from syncd.postgres import schema
from syncd.postgres.catalogue import Look, read_catalogues
from syncd.postgres.identity import read_doubts
from syncd.postgres.layout import read_sources
from tests.faults.following import until
from tests.integration.commands import run
from tests.integration.sources import attach, connected_as, everything, refused, role
from tests.servers import PostgresServer, bindir


def definitions(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    """Definitions in schema syncd that are equal in all installations."""
    return db.execute(
        "SELECT 'column', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), "
        "pg_get_expr(d.adbin, d.adrelid)"
        " FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid LEFT JOIN pg_attrdef d ON "
        "d.adrelid = c.oid AND d.adnum = a.attnum"
        " WHERE c.relnamespace = 'syncd'::regnamespace AND a.attnum > 0 UNION ALL"
        " SELECT 'function', proname, pg_get_functiondef(oid), NULL, NULL FROM pg_proc WHERE "
        "pronamespace = 'syncd'::regnamespace UNION ALL"
        " SELECT 'index', indexname, indexdef, NULL, NULL FROM pg_indexes WHERE schemaname = "
        "'syncd' UNION ALL"
        " SELECT 'trigger', tgname, pg_get_triggerdef(oid), tgenabled::text, NULL FROM pg_trigger "
        "WHERE NOT tgisinternal UNION ALL"
        " SELECT 'version', version_num, NULL, NULL, NULL FROM syncd.alembic_version UNION ALL"
        " SELECT 'source', source::text, arguments::text, NULL, NULL FROM syncd.attachments ORDER "
        "BY 1, 2, 3"
    ).fetchall()


# Installing


def test_installing_twice_changes_nothing(any_db: psycopg.Connection, any_database: str) -> None:
    before = everything(any_db)
    assert schema.install(any_database) == (schema.newest_revision(), schema.newest_revision())
    assert everything(any_db) == before


def test_the_printed_sql_installs_the_same(
    any_server: PostgresServer, any_db: psycopg.Connection
) -> None:
    name = "from_script"
    conninfo = any_server.create_database(name)
    try:
        psql = [str(bindir(18) / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", conninfo]
        done = subprocess.run(
            psql, input=schema.install_script(), text=True, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
        with psycopg.connect(conninfo, autocommit=True) as scripted:
            assert definitions(scripted) == definitions(any_db)
        assert schema.install(conninfo) == (schema.newest_revision(), schema.newest_revision())
    finally:
        any_server.drop_database(name)


def test_a_role_that_may_create_in_the_database_installs_and_attaches_without_being_superuser(
    any_server: PostgresServer,
) -> None:
    with role(any_server, "plain_owner"):
        conninfo = any_server.create_database("plain")
        any_server.execute("ALTER DATABASE plain OWNER TO plain_owner")
        try:
            schema.install(make_conninfo(conninfo, user="plain_owner"))
            with connected_as(conninfo, "plain_owner") as db:
                db.execute(
                    "CREATE SCHEMA mine CREATE TABLE items (id int PRIMARY KEY, embedding real[])"
                )
                db.execute("INSERT INTO mine.items VALUES (1, '{1,2}')")
                assert attach(db, "mine.items") == (1, 1, 1)
                db.execute("INSERT INTO mine.items VALUES (2, '{1,2}')")
                assert db.execute("SELECT syncd.detach('mine.items')").fetchone() == (True,)
            assert schema.uninstall(make_conninfo(conninfo, user="plain_owner"))
        finally:
            any_server.drop_database("plain")


DEADLOCK = """
CREATE SEQUENCE public.tries;
CREATE FUNCTION public.ended_once() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('public.tries') = 1 THEN RAISE deadlock_detected; END IF;
    RETURN old;
END $$;
CREATE FUNCTION public.ended_once_too() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    IF nextval('public.tries') = 1 THEN RAISE deadlock_detected; END IF;
END $$;
"""
"""Functions that raise the server's error for a deadlock at their first call."""


def test_uninstall_waits_for_a_lock_for_a_moment_then_tries_again_or_names_the_next_step(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(database) as holder:
        holder.execute("LOCK TABLE syncd.outbox IN ACCESS SHARE MODE")
        with monkeypatch.context() as impatient:
            impatient.setattr(schema, "TRY_SECONDS", 0)
            with pytest.raises(LockTaken, match="lock timeout") as caught:
                schema.uninstall(database)
            assert "try again" in caught.value.hint
        monkeypatch.setattr("time.sleep", lambda _: holder.rollback())
        assert schema.uninstall(database)


def test_uninstall_keeps_no_table_locked_while_it_waits_for_another_one(
    database: str, db: psycopg.Connection
) -> None:
    for table in ("first", "other"):
        db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, embedding real[])".encode())
        attach(db, table)
    with psycopg.connect(database) as reader, ThreadPoolExecutor(1) as thread:
        reader.execute("SELECT FROM other")
        removed = thread.submit(schema.uninstall, database)
        until(
            lambda: db.execute("SELECT FROM pg_locks WHERE NOT granted").fetchone() is not None,
            "uninstall waits for the table that is read",
        )
        with db.transaction():
            db.execute("SET LOCAL lock_timeout = '5s'")  # longer than uninstall's own
            db.execute("INSERT INTO first VALUES (1, '{1}')")
        reader.rollback()
        assert removed.result()


def test_detach_and_init_try_again_after_a_deadlock(
    database: str, db: psycopg.Connection, server: PostgresServer
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    attach(db, "items")
    db.execute(DEADLOCK)
    db.execute(
        "CREATE TRIGGER busy BEFORE DELETE ON syncd.attachments "
        "FOR EACH ROW EXECUTE FUNCTION public.ended_once()"
    )
    assert schema.detach(database, "items")
    conninfo = server.create_database("deadlock")
    try:
        with psycopg.connect(conninfo, autocommit=True) as other:
            other.execute(DEADLOCK)
            other.execute(
                "CREATE EVENT TRIGGER busy ON ddl_command_start WHEN TAG IN ('CREATE VIEW') "
                "EXECUTE FUNCTION public.ended_once_too()"
            )
            assert schema.install(conninfo) == (None, schema.newest_revision())
            tries = other.execute("SELECT last_value > 1 FROM public.tries").fetchone()
            assert tries == (True,)
    finally:
        server.drop_database("deadlock")


def test_of_two_inits_at_once_each_succeeds(server: PostgresServer) -> None:
    conninfo = server.create_database("twice")
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    try:
        with (
            psycopg.connect(conninfo, autocommit=True) as other,
            psycopg.connect(conninfo) as holder,
            ThreadPoolExecutor(2) as threads,
        ):
            other.execute(
                "CREATE FUNCTION public.held() RETURNS event_trigger LANGUAGE plpgsql "
                "AS 'BEGIN PERFORM pg_advisory_xact_lock(1); END'"
            )
            other.execute(
                "CREATE EVENT TRIGGER held ON ddl_command_start WHEN TAG IN ('CREATE VIEW') "
                "EXECUTE FUNCTION public.held()"
            )
            holder.execute("SELECT pg_advisory_xact_lock(1)")
            inits = [threads.submit(run, "init", SYNCD_DSN=conninfo) for _ in range(2)]
            until(lambda: other.execute(waiting).fetchone() == (2,), "both wait")
            holder.rollback()
            assert [each.result().returncode for each in inits] == [0, 0]
    finally:
        server.drop_database("twice")


def test_the_role_of_a_service_reads_the_sources_after_an_upgrade(
    any_server: PostgresServer,
) -> None:
    with role(any_server, "service_role"):
        conninfo = any_server.create_database("upgraded_role")
        try:
            schema.install(conninfo, "0001")
            with psycopg.connect(conninfo, autocommit=True) as db:
                db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
                attach(db, "items")
                db.execute(
                    "GRANT USAGE ON SCHEMA syncd TO service_role; "
                    "GRANT ALL ON ALL TABLES IN SCHEMA syncd TO service_role; "
                    "GRANT ALL ON ALL SEQUENCES IN SCHEMA syncd TO service_role"
                )
            schema.install(conninfo)
            with connected_as(conninfo, "service_role") as service:
                service.execute("SET search_path = pg_catalog, syncd")
                assert "items" in [source.table for source in read_sources(service)]
                looks = {source.id: Look("") for source in read_sources(service)}
                assert read_catalogues(service, looks).keys() == looks.keys()
                assert read_doubts(service) == 0
        finally:
            any_server.drop_database("upgraded_role")


# Rights to attach


def test_only_the_owner_attaches_and_detaches(
    any_server: PostgresServer, any_db: psycopg.Connection, any_database: str
) -> None:
    any_db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    with role(any_server, "stranger"):
        any_db.execute("GRANT USAGE ON SCHEMA syncd TO stranger; GRANT ALL ON items TO stranger")
        with connected_as(any_database, "stranger") as stranger:
            with refused(stranger, "must be owner", "owner of the table"):
                attach(stranger, "items")
            attach(any_db, "items")
            with refused(stranger, "must be owner", "owner of the table"):
                stranger.execute("SELECT syncd.detach('items')")
        any_db.execute("DROP OWNED BY stranger")


def test_a_table_owner_attaches_with_only_usage_on_the_schema(
    any_server: PostgresServer, any_db: psycopg.Connection, any_database: str
) -> None:
    with role(any_server, "table_owner"):
        any_db.execute(
            "CREATE SCHEMA theirs AUTHORIZATION table_owner; GRANT USAGE ON SCHEMA syncd TO "
            "table_owner"
        )
        with connected_as(any_database, "table_owner") as owner:
            owner.execute("CREATE TABLE theirs.items (id int PRIMARY KEY, embedding real[])")
            assert attach(owner, "theirs.items") == (0, 0, 0)
            before = everything(any_db)
            attach(owner, "theirs.items")
            assert everything(any_db) == before
            attach(owner, "theirs.items", metric="ip")
            owner.execute("INSERT INTO theirs.items VALUES (1, '{1}')")
            assert any_db.execute("SELECT key FROM syncd.outbox WHERE op = 'k'").fetchall() == [
                ("1",)
            ]
            for forbidden in (
                "SELECT * FROM syncd.outbox",
                "SELECT * FROM syncd.attachments",
                "DELETE FROM syncd.consumers",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    owner.execute(forbidden)
            assert owner.execute("SELECT syncd.detach('theirs.items')").fetchone() == (True,)
        any_db.execute("DROP OWNED BY table_owner")
