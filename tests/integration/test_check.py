"""What ``syncd check`` finds: each fault that is put in is a line that names it, with a fix that mends it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from syncd.cli.diagnose import print_findings
from syncd.ops import check, look, sessions
from syncd.ops.findings import Finding
from syncd.ops.look import Service, looking
from syncd.settings import load_settings
from tests.conftest import Servers
from tests.daemon import Daemon
from tests.integration.commands import run
from tests.servers import PostgresServer

TABLE = "CREATE TABLE items (id int PRIMARY KEY, v real[], lang text)"
ROWS = "INSERT INTO items SELECT i, ARRAY[i, 1], 'de' FROM generate_series(1, 10) AS i"
ATTACH = "SELECT syncd.attach('items', dataset => 'lang', live => $$lang <> 'it''s'$$)"


@pytest.fixture
def items(any_db: psycopg.Connection) -> psycopg.Connection:
    """A database with one attached table, on every version."""
    for statement in (TABLE, ROWS, ATTACH):
        any_db.execute(statement)
    return any_db


@pytest.fixture
def items_18(db: psycopg.Connection) -> psycopg.Connection:
    """The same on one version, for what does not depend on it."""
    for statement in (TABLE, ROWS, ATTACH):
        db.execute(statement)
    return db


def examine(db: psycopg.Connection, tmp_path: Path, *, user: str | None = None) -> list[Finding]:
    """All findings, without a service."""
    conninfo = make_conninfo(db.info.dsn, **({"user": user} if user else {}))
    settings = load_settings(dsn=conninfo, data_dir=tmp_path / "data")
    return check.examine(settings, tmp_path / "none")


def about(findings: list[Finding], what: str) -> Finding:
    """The one finding about something."""
    found = [finding for finding in findings if finding.what == what]
    assert len(found) == 1, findings
    return found[0]


def assert_only(findings: list[Finding], *whats: str) -> None:
    """Nothing but these is wrong, beside that no service runs; and every check was made."""
    wrong = {finding.what for finding in findings if finding.level != "ok"} - {"service"}
    assert wrong == set(whats), findings
    assert all(finding.fix for finding in findings if finding.level != "ok")


@contextlib.contextmanager
def role(db: psycopg.Connection, *grants: str) -> Iterator[str]:
    """A login role with some rights, gone afterwards."""
    name = f"reader_{db.info.dbname}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    try:
        for grant in grants:
            db.execute(sql.SQL(grant).format(role=sql.Identifier(name)))  # a test's own text
        yield name
    finally:
        db.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
        db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))


SERVICE_RIGHTS = (
    "GRANT USAGE ON SCHEMA syncd TO {role}",
    "GRANT ALL ON ALL TABLES IN SCHEMA syncd TO {role}",
    "GRANT ALL ON ALL SEQUENCES IN SCHEMA syncd TO {role}",
)


def test_nothing_is_wrong_with_a_healthy_database(items: psycopg.Connection, tmp_path: Path) -> None:
    findings = examine(items, tmp_path)
    assert_only(findings)
    for what in ("program", "server", "clock", "schema", "rights", "rights on public.items", "triggers of public.items", "key of public.items",
                 "dimensions of public.items", "notify", "outbox", "quarantine", "locks", "idle in transaction", "transactions",
                 "prepared transactions", "data directory", "disk"):  # fmt: skip
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
def test_a_trigger_that_was_disabled_or_dropped_fails_and_the_fix_mends_it(
    items: psycopg.Connection, tmp_path: Path, how: str, words: str
) -> None:
    row = items.execute(
        "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'syncd%insert' AND tgrelid = 'items'::regclass"
    )
    (name,) = row.fetchone() or [""]
    items.execute(how.format(name).encode())
    found = about(examine(items, tmp_path), "triggers of public.items")
    assert found.level == "fail"
    assert name in found.detail
    assert words in found.detail
    mended = run(*shlex.split(found.fix)[1:], SYNCD_DSN=items.info.dsn)
    assert mended.returncode == 0, mended.stderr
    assert_only(examine(items, tmp_path))
    assert items.execute("SELECT live FROM syncd.sources WHERE source = 'items'::regclass").fetchone() == (
        "lang <> 'it''s'",
    )


def test_a_trigger_that_calls_another_function_fails(items: psycopg.Connection, tmp_path: Path) -> None:
    row = items.execute(
        "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'syncd%delete' AND tgrelid = 'items'::regclass"
    )
    (name,) = row.fetchone() or [""]
    items.execute("CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'")
    items.execute(
        f"DROP TRIGGER {name} ON items; CREATE TRIGGER {name} AFTER DELETE ON items EXECUTE FUNCTION nothing()".encode()
    )
    items.execute(f"ALTER TABLE items ENABLE ALWAYS TRIGGER {name}".encode())
    found = about(examine(items, tmp_path), "triggers of public.items")
    assert found.level == "fail"
    assert name in found.detail


def test_where_the_schema_knows_what_its_triggers_should_be_its_word_counts(
    items: psycopg.Connection, tmp_path: Path
) -> None:
    items.execute(
        "CREATE OR REPLACE FUNCTION syncd.missing_triggers(source_id integer, OUT relation regclass, OUT trigger text, OUT problem text) "
        "RETURNS SETOF record LANGUAGE sql STABLE AS $$ SELECT 'public.items'::regclass, w.name, w.problem "
        "FROM (VALUES ('a', 'missing'), ('b', 'unwanted')) AS w (name, problem) WHERE source_id = 2 $$"
    )
    findings = examine(items, tmp_path)
    assert_only(findings, "triggers of public.items")
    assert about(findings, "triggers of public.items").detail == "a on public.items is missing: changes are missed"


def test_a_role_without_rights_is_told_which_statements_give_them(items: psycopg.Connection, tmp_path: Path) -> None:
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


def test_row_level_security_that_would_hide_rows_fails(items: psycopg.Connection, tmp_path: Path) -> None:
    items.execute("ALTER TABLE items ENABLE ROW LEVEL SECURITY")
    assert_only(examine(items, tmp_path))
    with role(items, *SERVICE_RIGHTS, "GRANT SELECT ON items TO {role}") as name:
        findings = examine(items, tmp_path, user=name)
        assert_only(findings, "rights on public.items")
        assert "row-level security" in about(findings, "rights on public.items").detail


def test_whoever_locks_a_source_is_named(items: psycopg.Connection, tmp_path: Path) -> None:
    with psycopg.connect(items.info.dsn, application_name="migration") as holder:
        holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        findings = examine(items, tmp_path)
        found = about(findings, "locks on public.items")
        assert found.level == "warn"
        for words in (f"pid {holder.info.backend_pid}", "migration", "LOCK TABLE items", "ACCESS EXCLUSIVE"):
            assert words in found.detail
        assert f"pg_terminate_backend({holder.info.backend_pid})" in found.fix
        assert "another transaction holds a lock" in about(findings, "columns of public.items").detail


def test_a_session_idle_in_a_transaction_that_wrote_is_named(
    items: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "IDLE_SECONDS", 0.0)
    with psycopg.connect(items.info.dsn, application_name="forgetful") as writer:
        writer.execute("INSERT INTO items VALUES (99, '{1,1}', 'de')")
        found = about(examine(items, tmp_path), "idle in transaction")
        assert found.level == "warn"
        for words in (f"pid {writer.info.backend_pid}", "forgetful", "public.items", "idle in transaction"):
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
        assert any(f"pid {reader.info.backend_pid}" in each.detail and "report" in each.detail for each in found), found


def test_the_start_of_other_roles_transactions_may_be_hidden(items: psycopg.Connection, tmp_path: Path) -> None:
    rights = (*SERVICE_RIGHTS, "GRANT SELECT ON items TO {role}")
    with role(items, *rights) as name, psycopg.connect(items.info.dsn) as writer:
        writer.execute("INSERT INTO items VALUES (99, '{1,1}', 'de')")
        findings = examine(items, tmp_path, user=name)
        assert_only(findings)
        assert "pg_read_all_stats" in about(findings, "transactions").detail
        writer.rollback()


@pytest.fixture(scope="module")
def two_phase(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server that allows prepared transactions."""
    folder = tmp_path_factory.mktemp("two_phase")
    with PostgresServer(18, folder, settings={"max_prepared_transactions": "5"}) as server:
        yield server


def test_a_forgotten_prepared_transaction_is_named_and_turns_notify_off(
    two_phase: PostgresServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "ORPHAN_SECONDS", 0.0)
    dsn = two_phase.create_database("check")
    assert run("init", SYNCD_DSN=dsn).returncode == 0
    with psycopg.connect(dsn, autocommit=True) as db:
        for statement in (TABLE, ROWS, ATTACH):
            db.execute(statement)
        db.execute("BEGIN; INSERT INTO items VALUES (99, '{1,1}', 'de'); PREPARE TRANSACTION 'it''s lost'")
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


def test_quarantined_rows_and_a_stale_consumer_are_named(items: psycopg.Connection, tmp_path: Path) -> None:
    items.execute(
        "INSERT INTO syncd.consumers (name, run_id, reported_at) VALUES ('default', gen_random_uuid(), now()), "
        "('the old''s', gen_random_uuid(), now() - interval '3 days')"
    )
    items.execute("INSERT INTO syncd.quarantine_reports VALUES ('default', 2, 'default/de', '7', 'nan', now())")
    findings = examine(items, tmp_path)
    assert_only(findings, "quarantine of default/de", "consumer the old's")
    assert about(findings, "quarantine of default/de").detail == "1 row with nan, such as key 7"
    old = about(findings, "consumer the old's")
    assert "3 days" in old.detail
    items.execute(old.fix.partition("gone for good: ")[2].encode())
    assert items.execute("SELECT name FROM syncd.consumers").fetchall() == [("default",)]


def test_a_consumer_that_is_behind_or_has_failed_says_so(items_18: psycopg.Connection, tmp_path: Path) -> None:
    items_18.execute(
        "INSERT INTO syncd.consumers (name, run_id, state, lag_rows, lag_seconds) VALUES "
        "('slow', gen_random_uuid(), 'catching_up', 500, 90), ('broken', gen_random_uuid(), 'must_rebuild', 0, 0)"
    )
    findings = examine(items_18, tmp_path)
    assert about(findings, "consumer slow").level == "warn"
    assert "500 rows behind" in about(findings, "consumer slow").detail
    assert about(findings, "consumer broken").level == "fail"


def test_a_full_outbox_names_who_holds_it_back(items: psycopg.Connection, tmp_path: Path) -> None:
    items.execute("UPDATE syncd.outbox_limit SET max_rows = 100")
    items.execute("INSERT INTO items SELECT i, ARRAY[i, 1], 'de' FROM generate_series(1000, 3000) AS i")
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


def test_a_dataset_of_several_lengths_is_a_warning(items: psycopg.Connection, tmp_path: Path) -> None:
    items.execute("INSERT INTO items SELECT i, ARRAY[i, 1, 1], 'de' FROM generate_series(11, 13) AS i")
    findings = examine(items, tmp_path)
    assert_only(findings, "dimensions of public.items")
    assert "2 in 10 rows, 3 in 3 rows" in about(findings, "dimensions of public.items").detail


@pytest.mark.parametrize("kind", ["vector", "vector(2)", "halfvec", "double precision[]", "bytea"])
def test_every_type_of_vector_has_a_dimension(db: psycopg.Connection, tmp_path: Path, kind: str) -> None:
    value = r"'\x0000803f0000803f'" if kind == "bytea" else "'{1,1}'" if kind.endswith("[]") else "'[1,1]'"
    db.execute(f"CREATE TABLE t (id int PRIMARY KEY, embedding {kind}); INSERT INTO t VALUES (1, {value})".encode())
    db.execute("SELECT syncd.attach('t')")
    findings = examine(db, tmp_path)
    assert_only(findings)
    assert about(findings, "dimensions of public.t").detail.startswith("2, ")


def test_a_key_that_is_no_longer_unique_fails_and_the_fix_mends_it(items: psycopg.Connection, tmp_path: Path) -> None:
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


def test_a_source_that_was_dropped_fails_and_the_fix_mends_it(items: psycopg.Connection, tmp_path: Path) -> None:
    items.execute("DROP TABLE items")
    found = about(examine(items, tmp_path), "table")
    assert found.level == "fail"
    assert run(*found.fix.split()[1:], SYNCD_DSN=items.info.dsn).returncode == 0
    assert_only(examine(items, tmp_path))


def test_a_disk_without_place_fails(
    items_18: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage_with(free: int) -> Any:
        return lambda _: SimpleNamespace(total=10**12, used=10**12 - free, free=free)

    monkeypatch.setattr(shutil, "disk_usage", usage_with(1_000_000))
    assert about(examine(items_18, tmp_path), "disk").level == "fail"
    monkeypatch.setattr(shutil, "disk_usage", usage_with(200_000_000))
    assert about(examine(items_18, tmp_path), "disk").level == "ok"
    items_18.execute("UPDATE pg_class SET reltuples = 10000000 WHERE oid = 'items'::regclass")
    assert about(examine(items_18, tmp_path), "disk").level == "warn"


def test_a_data_directory_that_cannot_be_written_fails(
    items_18: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    with monkeypatch.context() as patch:
        access = os.access
        patch.setattr(os, "access", lambda path, mode, **_: path != tmp_path / "data" and access(path, mode))
        found = about(examine(items_18, tmp_path), "data directory")
    assert found.level == "fail"
    assert str(tmp_path / "data") in found.detail
    (tmp_path / "data").rmdir()
    (tmp_path / "data").touch()
    assert about(examine(items_18, tmp_path), "data directory").level == "fail"


def test_clocks_that_differ_are_a_warning(
    items_18: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time
    monkeypatch.setattr(check, "time", SimpleNamespace(time=lambda: now() + 9000))
    found = about(examine(items_18, tmp_path), "clock")
    assert found.level == "warn"
    assert "2 hours" in found.detail


# The command


def test_without_schema_syncd_check_fails_with_the_command_that_installs_it(servers: Servers, tmp_path: Path) -> None:
    server = servers.of(16)
    dsn = server.create_database("check_bare")
    try:
        done = run("check", "--dsn", dsn, SYNCD_DATA_DIR=str(tmp_path / "data"))
        assert done.returncode == 1
        assert re.search(
            r"^fail  schema +the database has no schema syncd\n +fix: syncd init$", done.stdout, re.MULTILINE
        )
        assert done.stderr == ""
    finally:
        server.drop_database("check_bare")


def test_a_database_that_is_down_is_one_line_and_no_traceback(tmp_path: Path) -> None:
    done = run("check", SYNCD_DSN="host=127.0.0.1 port=1", SYNCD_DATA_DIR=str(tmp_path / "data"))
    assert done.returncode == 1
    assert done.stderr == ""
    assert len(re.findall(r"^fail ", done.stdout, re.MULTILINE)) == 1
    assert re.search(r"^fail  database .*Connection refused", done.stdout, re.MULTILINE)
    assert "fix: start the server, or set SYNCD_DSN" in done.stdout
    as_json = run("check", "--json", SYNCD_DSN="host=127.0.0.1 port=1", SYNCD_DATA_DIR=str(tmp_path / "data"))
    assert as_json.returncode == 1
    assert [row["what"] for row in json.loads(as_json.stdout) if row["level"] == "fail"] == ["database"]


def test_with_a_running_service_check_exits_0_and_says_how_it_is(items_18: psycopg.Connection, daemon: Daemon) -> None:
    daemon.start()
    with daemon.client() as client:
        client.checkpoint()
    settings: dict[str, Any] = {
        "SYNCD_DSN": items_18.info.dsn,
        "SYNCD_SOCKET": str(daemon.socket),
        "SYNCD_DATA_DIR": str(daemon.data_dir),
    }
    done = run("check", "--json", **settings)
    assert done.returncode == 0, done.stdout
    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert set(rows["service"]) == {"level", "what", "detail", "fix"}
    assert {row["level"] for row in rows.values()} == {"ok"}, rows
    assert rows["service"]["detail"].startswith("ready, consumer default")
    assert "listens" in rows["notify"]["detail"]
    assert "consumer default" in rows
    assert "checkpoint" in rows
    text = run("check", **settings)
    assert text.returncode == 0
    assert "\x1b" not in text.stdout
    columns = {line.index(line[6:].split("  ")[0]) for line in text.stdout.splitlines()}
    assert columns == {6}
    daemon.stop()


def test_a_service_that_cannot_read_a_source_fails_the_check(items_18: psycopg.Connection, daemon: Daemon) -> None:
    daemon.start()
    items_18.execute("DROP TABLE items")
    token = str((items_18.execute("SELECT syncd.token()").fetchone() or [None])[0])
    with daemon.client() as client:
        client.wait(token)
        settings = load_settings(dsn=items_18.info.dsn, data_dir=daemon.data_dir)
        findings = check.examine(settings, daemon.socket)
    assert about(findings, "dataset default/de").level == "fail"
    assert about(findings, "dataset default/de").fix == "syncd why default/de"
    assert about(findings, "service").level == "fail"


def test_a_service_that_is_there_and_does_not_answer_fails_the_check(
    items_18: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "SERVICE_TIMEOUT_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as silent, tempfile.TemporaryDirectory() as folder:
        silent.bind(f"{folder}/s")
        silent.listen()
        settings = load_settings(dsn=items_18.info.dsn, data_dir=tmp_path / "data")
        found = about(check.examine(settings, f"{folder}/s"), "service")
    assert found.level == "fail"
    assert "has not answered" in found.detail


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    done = run("check", SYNCD_DSN="host=127.0.0.1 port=1 password=sesame", SYNCD_DATA_DIR=str(tmp_path / "data"))
    assert "sesame" not in done.stdout + done.stderr


def test_looking_leaves_nothing_behind_in_the_session(items_18: psycopg.Connection, tmp_path: Path) -> None:
    settings = load_settings(dsn=items_18.info.dsn, data_dir=tmp_path / "data")
    with looking(settings, Service(None, ())) as here:
        before = here.connection.execute("SELECT name, setting FROM pg_settings WHERE source <> 'override'").fetchall()
        for _ in range(10):
            assert here.row("read_notify") == (1, 0)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), here.transaction():
            here.connection.execute("DELETE FROM public.items")
        after = here.connection.execute("SELECT name, setting FROM pg_settings WHERE source <> 'override'").fetchall()
        assert dict(after) == dict(before)
        assert here.connection.execute("SELECT count(*) FROM pg_prepared_statements").fetchone() == (0,)


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_colours_unless_no_color_is_set(tmp_path: Path, no_color: bool) -> None:
    master, slave = os.openpty()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SYNCD_", "PG", "NO_COLOR"))}
    mine = {"SYNCD_DSN": "host=127.0.0.1 port=1", "SYNCD_DATA_DIR": str(tmp_path / "data"), "TERM": "xterm-256color"}
    environment = kept | mine | ({"NO_COLOR": "1"} if no_color else {})
    command = [sys.executable, "-m", "syncd.cli.main", "check"]
    with subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(slave)
        seen = b""
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while read := os.read(master, 4096):
                seen += read
        assert process.wait(60) == 1
    os.close(master)
    assert b"Connection refused" in seen
    assert bool(re.search(rb"\x1b\[(?:[0-9;]*;)?3[0-9]m", seen)) is not no_color


def test_what_others_wrote_cannot_speak_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    print_findings([Finding("warn", "locks", "query: SELECT\n1; \x1b[2J\x1b]0;gone\x07", "let it end")])
    assert capsys.readouterr().out == "warn  locks  query: SELECT 1;  [2J ]0;gone \n      fix: let it end\n"
