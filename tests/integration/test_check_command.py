"""``syncd check`` as a command, and its findings in running services and on the machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest

from syncd.cli.diagnose import print_findings
from syncd.ops import check, check_machine, look
from syncd.ops.findings import Finding
from syncd.ops.look import Service, looking
from syncd.settings import load_settings
from tests.conftest import Servers
from tests.daemon import Daemon
from tests.integration.checking import ATTACH, ROWS, TABLE, about, examine
from tests.integration.commands import run


@pytest.fixture
def items_18(db: psycopg.Connection) -> psycopg.Connection:
    """A database with one attached table, on one version of PostgreSQL."""
    for statement in (TABLE, ROWS, ATTACH):
        db.execute(statement)
    return db


# Services, and the machine


def test_a_consumer_that_is_behind_or_has_failed_says_so(
    items_18: psycopg.Connection, tmp_path: Path
) -> None:
    items_18.execute(
        "INSERT INTO syncd.consumers (name, run_id, state, lag_rows, lag_seconds) VALUES "
        "('slow', gen_random_uuid(), 'catching_up', 500, 90), ('broken', gen_random_uuid(), "
        "'must_rebuild', 0, 0)"
    )
    findings = examine(items_18, tmp_path)
    assert about(findings, "consumer slow").level == "warn"
    assert "500 rows behind" in about(findings, "consumer slow").detail
    assert about(findings, "consumer broken").level == "fail"


def test_a_service_that_cannot_read_a_source_fails_the_check(
    items_18: psycopg.Connection, daemon: Daemon
) -> None:
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


def test_a_service_that_does_not_answer_fails_the_check(
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
        patch.setattr(
            os, "access", lambda path, mode, **_: path != tmp_path / "data" and access(path, mode)
        )
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
    monkeypatch.setattr(check_machine, "time", SimpleNamespace(time=lambda: now() + 9000))
    found = about(examine(items_18, tmp_path), "clock")
    assert found.level == "warn"
    assert "2 hours" in found.detail


# The command


def test_without_schema_syncd_check_fails_with_the_command_that_installs_it(
    servers: Servers, tmp_path: Path
) -> None:
    server = servers.of(16)
    dsn = server.create_database("check_bare")
    try:
        done = run("check", "--dsn", dsn, SYNCD_DATA_DIR=str(tmp_path / "data"))
        assert done.returncode == 1
        assert re.search(
            r"^fail  schema +the database has no schema syncd\n +fix: syncd init$",
            done.stdout,
            re.MULTILINE,
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
    as_json = run(
        "check", "--json", SYNCD_DSN="host=127.0.0.1 port=1", SYNCD_DATA_DIR=str(tmp_path / "data")
    )
    assert as_json.returncode == 1
    assert [row["what"] for row in json.loads(as_json.stdout) if row["level"] == "fail"] == [
        "database"
    ]


def test_with_a_running_service_check_exits_0_and_describes_it(
    items_18: psycopg.Connection, daemon: Daemon
) -> None:
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


def test_a_password_is_never_shown(tmp_path: Path) -> None:
    done = run(
        "check",
        SYNCD_DSN="host=127.0.0.1 port=1 password=sesame",
        SYNCD_DATA_DIR=str(tmp_path / "data"),
    )
    assert "sesame" not in done.stdout + done.stderr


def test_looking_leaves_nothing_behind_in_the_session(
    items_18: psycopg.Connection, tmp_path: Path
) -> None:
    settings = load_settings(dsn=items_18.info.dsn, data_dir=tmp_path / "data")
    with looking(settings, Service(None, ())) as here:
        before = here.connection.execute(
            "SELECT name, setting FROM pg_settings WHERE source <> 'override'"
        ).fetchall()
        for _ in range(10):
            assert here.row("read_notify") == (1, 0)
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), here.transaction():
            here.connection.execute("DELETE FROM public.items")
        after = here.connection.execute(
            "SELECT name, setting FROM pg_settings WHERE source <> 'override'"
        ).fetchall()
        assert dict(after) == dict(before)
        assert here.connection.execute(
            "SELECT count(*) FROM pg_prepared_statements"
        ).fetchone() == (0,)


@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_colours_unless_no_color_is_set(tmp_path: Path, no_color: bool) -> None:
    master, slave = os.openpty()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SYNCD_", "PG", "NO_COLOR"))
    }
    mine = {
        "SYNCD_DSN": "host=127.0.0.1 port=1",
        "SYNCD_DATA_DIR": str(tmp_path / "data"),
        "TERM": "xterm-256color",
    }
    environment = kept | mine | ({"NO_COLOR": "1"} if no_color else {})
    command = [sys.executable, "-m", "syncd.cli.main", "check"]
    with subprocess.Popen(
        command, stdout=slave, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        os.close(slave)
        seen = b""
        with contextlib.suppress(OSError):  # the terminal's other end is closed
            while read := os.read(master, 4096):
                seen += read
        assert process.wait(60) == 1
    os.close(master)
    assert b"Connection refused" in seen
    assert bool(re.search(rb"\x1b\[(?:[0-9;]*;)?3[0-9]m", seen)) is not no_color


def test_a_query_text_cannot_send_control_sequences_to_the_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_findings(
        [Finding("warn", "locks", "query: SELECT\n1; \x1b[2J\x1b]0;gone\x07", "let it end")]
    )
    assert (
        capsys.readouterr().out
        == "warn  locks  query: SELECT 1;  [2J ]0;gone \n      fix: let it end\n"
    )
