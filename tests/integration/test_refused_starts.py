"""Starts in bad surroundings: each ends within 30 seconds, with the reason and the next step.

Files of other programs stay.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from syncd import service
from tests.daemon import Daemon
from tests.servers import PostgresServer

LIMIT_SECONDS = 50.0
"""Longest time of a refused start: 30 s are promised on an idle machine."""


def refused_start(daemon: Daemon, *words: str, status: int = 1) -> None:
    """``serve`` ends in time with the reason and the next step, and prints nothing on stdout."""
    begun = time.monotonic()
    process = daemon.spawn()
    assert process.stdout is not None
    try:
        out, _ = process.communicate(timeout=90)
    finally:
        daemon.kill()
    took = time.monotonic() - begun
    log = daemon.log.read_text()
    assert (process.returncode, out) == (status, b""), log
    assert "Traceback" not in log
    assert re.search(r"^error: .*\n  next: ", log, re.MULTILINE), log
    for word in words:
        assert word in log, log
    assert took < LIMIT_SECONDS
    assert not daemon.socket.exists()


# The server


def test_a_server_that_refuses_connections_ends_the_start(tmp_path: Path) -> None:
    refused_start(
        Daemon("host=127.0.0.1 port=1", tmp_path / "data"), "Connection refused", "SYNCD_DSN"
    )
    refused_start(Daemon("host=/nosuch/folder", tmp_path / "data"), "No such file", "SYNCD_DSN")


def test_a_server_that_never_answers_ends_the_start_within_30_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=10) as silent:
        port = silent.getsockname()[1]
        refused_start(
            Daemon(
                f"host=127.0.0.1,127.0.0.1,127.0.0.1,127.0.0.1 port={port},{port},{port},{port}",
                tmp_path / "data",
            ),
            "SYNCD_DSN",
        )


def test_a_server_that_answers_and_then_hangs_ends_the_start_within_30_seconds(
    db: psycopg.Connection, database: str, tmp_path: Path
) -> None:
    with psycopg.connect(database) as other:
        other.execute("LOCK TABLE syncd.consumers IN ACCESS EXCLUSIVE MODE")
        daemon = Daemon(database, tmp_path / "data")
        assert service.START_SECONDS < 30  # the test above waits for as long
        daemon.with_constant("syncd.service.START_SECONDS", 2.0)
        refused_start(daemon, "has not answered for 2 s")
    assert db.execute("SELECT count(*) FROM syncd.consumers").fetchone() == (0,)


def test_a_database_that_is_missing_or_without_init_ends_the_start(
    server: PostgresServer, tmp_path: Path
) -> None:
    refused_start(
        Daemon(server.conninfo("nosuch"), tmp_path / "data"), "nosuch", "create the database"
    )
    refused_start(
        Daemon(server.conninfo("postgres"), tmp_path / "data"), "no schema syncd", "syncd init"
    )


def test_a_database_of_another_schema_version_ends_the_start(
    db: psycopg.Connection, database: str, tmp_path: Path
) -> None:
    db.execute("UPDATE syncd.alembic_version SET version_num = '9999'")
    refused_start(Daemon(database, tmp_path / "data"), "9999", "pip install --upgrade syncd")
    db.execute("UPDATE syncd.alembic_version SET version_num = '0000'")
    refused_start(Daemon(database, tmp_path / "data"), "0000", "syncd init")


def test_a_schema_that_lacks_a_function_is_not_called_missing(
    db: psycopg.Connection, database: str, tmp_path: Path
) -> None:
    db.execute("DROP FUNCTION syncd.rotate_outbox")
    refused_start(
        Daemon(database, tmp_path / "data"),
        "is damaged",
        "rotate_outbox",
        "syncd uninstall && syncd init",
    )


@pytest.fixture(scope="module")
def scram(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server that asks for passwords over TCP."""
    server = PostgresServer(
        16,
        tmp_path_factory.mktemp("scram"),
        tcp=True,
        settings={"password_encryption": "scram-sha-256"},
    )
    with server:
        rules = server.folder / "cluster" / "pg_hba.conf"
        rules.write_text("local all all trust\nhost all all 127.0.0.1/32 scram-sha-256\n")
        server.execute("CREATE ROLE app LOGIN PASSWORD 'right-secret'")
        server.execute("SELECT pg_reload_conf()")
        yield server


def test_a_wrong_password_ends_the_start_and_is_not_shown(
    scram: PostgresServer, tmp_path: Path
) -> None:
    def conninfo(**password: str) -> str:
        return make_conninfo(
            host="127.0.0.1", port=scram.port, user="app", dbname="postgres", **password
        )

    for name, password in (("wrong", {"password": "wrong-secret"}), ("none", {})):
        daemon = Daemon(conninfo(**password), tmp_path / name)
        refused_start(daemon, "password", "SYNCD_DSN, PGPASSWORD or ~/.pgpass")
        assert "secret" not in daemon.log.read_text()
    right = {"password": "right-secret"}
    daemon = Daemon(conninfo(**right), tmp_path / "right")
    refused_start(daemon, "no schema syncd")
    assert "secret" not in daemon.log.read_text()


# The data directory and the socket


def test_a_socket_path_that_is_too_long_is_refused(database: str, tmp_path: Path) -> None:
    refused_start(
        Daemon(database, tmp_path / "data", socket=tmp_path / ("s" * 120)),
        "SYNCD_SOCKET",
        "107",
        status=2,
    )


def test_a_data_directory_that_another_syncd_holds_is_refused(
    database: str, daemon: Daemon
) -> None:
    daemon.start()
    assert daemon.process is not None
    refused_start(
        Daemon(database, daemon.data_dir, consumer="second"),
        f"in use by another syncd (process {daemon.process.pid})",
        "SYNCD_DATA_DIR",
    )
    with daemon.client() as client:
        assert client.ping()


def test_a_socket_that_another_syncd_answers_on_is_refused(
    database: str, daemon: Daemon, tmp_path: Path
) -> None:
    daemon.start()
    second = Daemon(database, tmp_path / "second", consumer="second")
    second.settings["socket"] = daemon.socket
    refused_start(second, "another syncd answers", "SYNCD_SOCKET", status=2)
    with daemon.client() as client:
        assert client.ping()


def test_a_data_directory_that_is_a_file_is_refused(database: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused_start(Daemon(database, tmp_path / "file"), "data directory", "SYNCD_DATA_DIR")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="needs root and unshare: a read-only mount binds root too",
)
def test_a_read_only_data_directory_is_refused(database: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    daemon = Daemon(database, data)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    probe = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount, str(data), "true"],
        capture_output=True,
        check=False,
    )
    if probe.returncode != 0:
        pytest.skip("this container may not mount")
    command = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        mount,
        str(data),
        sys.executable,
        "-m",
        "syncd.cli.main",
        "serve",
    ]
    done = subprocess.run(
        command, env=daemon.environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert "Read-only file system" in done.stderr
    assert "SYNCD_DATA_DIR" in done.stderr


def test_files_of_others_in_the_data_directory_are_left_alone(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1}')"
    )
    db.execute("SELECT syncd.attach('items')")
    mine = [
        daemon.data_dir / "notes.txt",
        daemon.data_dir / "lost+found" / "a" / "b" / "c.txt",
        daemon.data_dir / "postgres" / "base" / "1" / "2",
    ]
    for path in mine:
        path.parent.mkdir(parents=True)
        path.write_text("mine")
    daemon.start()
    daemon.stop()
    daemon.start()
    daemon.stop()
    assert [path.exists() for path in mine] == [True] * len(mine)
