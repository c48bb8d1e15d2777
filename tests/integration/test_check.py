"""Findings of ``syncd check`` in a database: each fault is a line that names it, with its fix."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import psycopg
import pytest

from syncd.ops import sessions
from tests.integration.checking import (
    ATTACH,
    ROWS,
    SERVICE_RIGHTS,
    TABLE,
    about,
    assert_only,
    examine,
    role,
)
from tests.integration.commands import run
from tests.servers import PostgresServer


@pytest.fixture
def items(any_db: psycopg.Connection) -> psycopg.Connection:
    """A database with one attached table, on every version."""
    for statement in (TABLE, ROWS, ATTACH):
        any_db.execute(statement)
    return any_db


def test_nothing_is_wrong_with_a_healthy_database(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    findings = examine(items, tmp_path)
    assert_only(findings)
    for what in (
        *("program", "server", "clock", "schema", "rights", "rights on public.items"),
        *("triggers of public.items", "key of public.items", "dimensions of public.items"),
        *("notify", "outbox", "quarantine", "locks", "idle in transaction", "transactions"),
        *("prepared transactions", "data directory", "disk"),
    ):
        assert about(findings, what).level == "ok"
    assert "syncd serve" in about(findings, "service").fix
    assert about(findings, "dimensions of public.items").detail == "2, none declared"


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("ALTER TABLE items DISABLE TRIGGER {}", "is disabled"),
        ("ALTER TABLE items ENABLE TRIGGER {}", "session_replication_role"),
        ("DROP TRIGGER {} ON items", "is missing"),
    ],
)
def test_a_trigger_that_was_disabled_or_dropped_fails_and_the_fix_repairs_it(
    items: psycopg.Connection, tmp_path: Path, how: str, words: str
) -> None:
    row = items.execute(
        "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'syncd%insert' AND tgrelid = "
        "'items'::regclass"
    )
    (name,) = row.fetchone() or [""]
    items.execute(how.format(name).encode())
    found = about(examine(items, tmp_path), "triggers of public.items")
    assert found.level == "fail"
    assert name in found.detail
    assert words in found.detail
    done = run(*shlex.split(found.fix)[1:], SYNCD_DSN=items.info.dsn)
    assert done.returncode == 0, done.stderr
    assert_only(examine(items, tmp_path))
    assert items.execute(
        "SELECT live FROM syncd.sources WHERE source = 'items'::regclass"
    ).fetchone() == ("lang <> 'it''s'",)


def test_a_trigger_that_calls_another_function_fails(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    row = items.execute(
        "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'syncd%delete' AND tgrelid = "
        "'items'::regclass"
    )
    (name,) = row.fetchone() or [""]
    items.execute(
        "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    )
    items.execute(
        f"DROP TRIGGER {name} ON items; CREATE TRIGGER {name} AFTER DELETE ON items EXECUTE "
        "FUNCTION nothing()".encode()
    )
    items.execute(f"ALTER TABLE items ENABLE ALWAYS TRIGGER {name}".encode())
    found = about(examine(items, tmp_path), "triggers of public.items")
    assert found.level == "fail"
    assert name in found.detail


def test_check_reports_the_wrong_triggers_that_the_schema_names(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    items.execute(
        "CREATE OR REPLACE FUNCTION syncd.missing_triggers(source_id integer, OUT relation "
        "regclass, OUT trigger text, OUT problem text) "
        "RETURNS SETOF record LANGUAGE sql STABLE AS $$ SELECT 'public.items'::regclass, w.name, "
        "w.problem "
        "FROM (VALUES ('a', 'missing'), ('b', 'unwanted')) AS w (name, problem) WHERE source_id = "
        "2 $$"
    )
    findings = examine(items, tmp_path)
    assert_only(findings, "triggers of public.items")
    assert (
        about(findings, "triggers of public.items").detail
        == "a on public.items is missing: changes are missed"
    )


def test_a_role_without_rights_gets_the_statements_that_give_them(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    with role(items) as name:
        found = about(examine(items, tmp_path, user=name), "schema")
        assert found.level == "fail"
        items.execute(found.fix.partition("as that role: ")[2].encode())
        findings = examine(items, tmp_path, user=name)
        found = about(findings, "rights on public.items")
        assert found.level == "fail"
        assert name in found.detail
        assert_only(findings, "rights on public.items")
        items.execute(found.fix.encode())
        assert_only(examine(items, tmp_path, user=name))


def test_a_role_that_may_not_read_syncds_tables_gets_warnings_and_no_traceback(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    with role(items, "GRANT USAGE ON SCHEMA syncd TO {role}") as name:
        findings = examine(items, tmp_path, user=name)
        assert about(findings, "rights").level == "fail"
        assert "SELECT on syncd.attachments" in about(findings, "rights").detail
        sources = about(findings, "sources")
        assert sources.level == "warn"
        assert "could not be looked at" in sources.detail


def test_row_level_security_that_would_hide_rows_fails(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    items.execute("ALTER TABLE items ENABLE ROW LEVEL SECURITY")
    assert_only(examine(items, tmp_path))
    with role(items, *SERVICE_RIGHTS, "GRANT SELECT ON items TO {role}") as name:
        findings = examine(items, tmp_path, user=name)
        assert_only(findings, "rights on public.items")
        assert "row-level security" in about(findings, "rights on public.items").detail


def test_a_session_that_locks_a_source_is_named(items: psycopg.Connection, tmp_path: Path) -> None:
    with psycopg.connect(items.info.dsn, application_name="migration") as holder:
        holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        findings = examine(items, tmp_path)
        found = about(findings, "locks on public.items")
        assert found.level == "warn"
        for words in (
            f"pid {holder.info.backend_pid}",
            "migration",
            "LOCK TABLE items",
            "ACCESS EXCLUSIVE",
        ):
            assert words in found.detail
        assert f"pg_terminate_backend({holder.info.backend_pid})" in found.fix
        assert (
            "another transaction holds a lock" in about(findings, "columns of public.items").detail
        )


def test_a_session_idle_in_a_transaction_that_wrote_is_named(
    items: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "IDLE_SECONDS", 0.0)
    with psycopg.connect(items.info.dsn, application_name="forgetful") as writer:
        writer.execute("INSERT INTO items VALUES (99, '{1,1}', 'de')")
        found = about(examine(items, tmp_path), "idle in transaction")
        assert found.level == "warn"
        for words in (
            f"pid {writer.info.backend_pid}",
            "forgetful",
            "public.items",
            "idle in transaction",
        ):
            assert words in found.detail
        assert f"pg_terminate_backend({writer.info.backend_pid})" in found.fix
    assert_only(examine(items, tmp_path))


def test_an_old_transaction_is_named_with_its_holder(
    items: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "OLD_TRANSACTION_SECONDS", 0.0)
    with psycopg.connect(items.info.dsn, application_name="report") as reader:
        reader.execute("SELECT pg_current_xact_id()")
        found = [finding for finding in examine(items, tmp_path) if finding.what == "transactions"]
        assert any(
            f"pid {reader.info.backend_pid}" in each.detail and "report" in each.detail
            for each in found
        ), found


def test_the_start_of_other_roles_transactions_may_be_hidden(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    rights = (*SERVICE_RIGHTS, "GRANT SELECT ON items TO {role}")
    with role(items, *rights) as name, psycopg.connect(items.info.dsn) as writer:
        writer.execute("INSERT INTO items VALUES (99, '{1,1}', 'de')")
        findings = examine(items, tmp_path, user=name)
        assert_only(findings)
        assert "pg_read_all_stats" in about(findings, "transactions").detail
        writer.rollback()


def test_a_forgotten_prepared_transaction_is_named_and_turns_notify_off(
    two_phase: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "ORPHAN_SECONDS", 0.0)
    dsn = two_phase.create_database("check")
    assert run("init", SYNCD_DSN=dsn).returncode == 0
    with psycopg.connect(dsn, autocommit=True) as db:
        for statement in (TABLE, ROWS, ATTACH):
            db.execute(statement)
        db.execute(
            "BEGIN; INSERT INTO items VALUES (99, '{1,1}', 'de'); PREPARE TRANSACTION 'it''s lost'"
        )
        findings = examine(db, tmp_path)
        found = about(findings, "prepared transactions")
        assert found.level == "warn"
        assert "it's lost" in found.detail
        assert "public.items" in found.detail
        command = re.search(r"ROLLBACK PREPARED '[^;]*'", found.fix)
        assert command is not None
        db.execute(command[0].encode())
        notify = about(findings, "notify")
        assert "off, since max_prepared_transactions is 5" in notify.detail
        assert notify.level == "ok"
        db.execute("SELECT setval('syncd.notify_mode', 2)")
        findings = examine(db, tmp_path)
        assert_only(findings, "notify")
        assert "SYNCD_NOTIFY=off" in about(findings, "notify").fix


def test_quarantined_rows_and_a_stale_consumer_are_named(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    items.execute(
        "INSERT INTO syncd.consumers (name, run_id, reported_at) VALUES ('default', "
        "gen_random_uuid(), now()), "
        "('the old''s', gen_random_uuid(), now() - interval '3 days')"
    )
    items.execute(
        "INSERT INTO syncd.quarantine_reports VALUES ('default', 2, 'default/de', '7', 'nan', "
        "now())"
    )
    findings = examine(items, tmp_path)
    assert_only(findings, "quarantine of default/de", "consumer the old's")
    assert about(findings, "quarantine of default/de").detail == "1 row with nan, such as key 7"
    old = about(findings, "consumer the old's")
    assert "3 days" in old.detail
    items.execute(old.fix.partition("gone for good: ")[2].encode())
    assert items.execute("SELECT name FROM syncd.consumers").fetchall() == [("default",)]


def test_a_full_outbox_names_the_consumer_that_holds_it_back(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    items.execute("UPDATE syncd.outbox_limit SET max_rows = 100")
    items.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 1], 'de' FROM generate_series(1000, 3000) AS i"
    )
    items.execute("INSERT INTO syncd.consumers (name, run_id) VALUES ('holder', gen_random_uuid())")
    found = about(examine(items, tmp_path), "outbox")
    assert found.level == "warn"
    assert "'holder'" in found.detail


def test_a_rule_that_no_row_matches_is_a_warning(items: psycopg.Connection, tmp_path: Path) -> None:
    items.execute("UPDATE items SET v = NULL")
    findings = examine(items, tmp_path)
    assert_only(findings, "live rows of public.items")
    assert "lang <> 'it''s'" in about(findings, "live rows of public.items").detail
    items.execute("TRUNCATE items")
    assert_only(examine(items, tmp_path))


def test_a_dataset_of_several_lengths_is_a_warning(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    items.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 1, 1], 'de' FROM generate_series(11, 13) AS i"
    )
    findings = examine(items, tmp_path)
    assert_only(findings, "dimensions of public.items")
    assert "2 in 10 rows, 3 in 3 rows" in about(findings, "dimensions of public.items").detail


@pytest.mark.parametrize("kind", ["vector", "vector(2)", "halfvec", "double precision[]", "bytea"])
def test_every_type_of_vector_has_a_dimension(
    db: psycopg.Connection, tmp_path: Path, kind: str
) -> None:
    value = (
        r"'\x0000803f0000803f'"
        if kind == "bytea"
        else "'{1,1}'"
        if kind.endswith("[]")
        else "'[1,1]'"
    )
    db.execute(
        f"CREATE TABLE t (id int PRIMARY KEY, embedding {kind});"
        f"INSERT INTO t VALUES (1, {value})".encode()
    )
    db.execute("SELECT syncd.attach('t')")
    findings = examine(db, tmp_path)
    assert_only(findings)
    assert about(findings, "dimensions of public.t").detail.startswith("2, ")


def test_a_key_that_is_no_longer_unique_fails_and_the_fix_repairs_it(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    items.execute("ALTER TABLE items DROP CONSTRAINT items_pkey")
    found = about(examine(items, tmp_path), "key of public.items")
    assert found.level == "fail"
    items.execute(found.fix.encode())
    items.execute("ALTER TABLE items ALTER COLUMN id DROP NOT NULL")
    found = about(examine(items, tmp_path), "key of public.items")
    assert found.level == "fail"
    items.execute(found.fix.encode())
    assert_only(examine(items, tmp_path))


def test_a_vector_column_that_was_renamed_fails(items: psycopg.Connection, tmp_path: Path) -> None:
    items.execute("ALTER TABLE items RENAME COLUMN v TO w")
    findings = examine(items, tmp_path)
    assert_only(findings, "columns of public.items")
    assert about(findings, "columns of public.items").level == "fail"


def test_a_source_that_was_dropped_fails_and_the_fix_repairs_it(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    items.execute("DROP TABLE items")
    found = about(examine(items, tmp_path), "table")
    assert found.level == "fail"
    assert run(*found.fix.split()[1:], SYNCD_DSN=items.info.dsn).returncode == 0
    assert_only(examine(items, tmp_path))
