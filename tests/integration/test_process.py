"""The process of ``syncd serve`` among others: its end, its name, its rights."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import psycopg
from psycopg.conninfo import make_conninfo

from tests.conftest import Servers, clone
from tests.daemon import Daemon
from tests.faults.following import keys_of, until

WAIT_SECONDS = 45.0


def test_sigterm_and_sigint_exit_0_and_leave_a_checkpoint_and_no_socket(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    for how in (signal.SIGTERM, signal.SIGINT):
        daemon.start()
        assert oct(daemon.socket.stat().st_mode & 0o777) == "0o660"
        process = daemon.end(how)
        assert process.returncode == 0, daemon.log.read_text()
        assert not daemon.socket.exists()
        assert (daemon.data_dir / "manifest.json").exists()
    until(lambda: not open_connections(db), "its connections are closed", WAIT_SECONDS)


def test_a_second_signal_stops_at_once(daemon: Daemon) -> None:
    process = daemon.start().process
    assert process is not None
    with socket.socket(socket.AF_UNIX) as raw:
        raw.connect(str(daemon.socket))
        raw.sendall(
            b'{"jsonrpc":"2.0","id":1,"method":"wait",'
            b'"params":{"after":"99999999999","timeout_ms":60000}}\n'
        )
        raw.sendall(b'{"jsonrpc":"2.0","id":2,"method":"ping"}\n')
        assert b"pong" in raw.recv(1000)
        process.send_signal(signal.SIGTERM)
        until(lambda: "stopping" in daemon.log.read_text(), "syncd is stopping", WAIT_SECONDS)
        process.send_signal(signal.SIGTERM)
        process.wait(WAIT_SECONDS)
    assert "stopped_at_once" in daemon.log.read_text()
    daemon.kill()


def test_a_process_whose_consumer_name_was_taken_exits_1_and_says_so(
    db: psycopg.Connection, database: str, daemon: Daemon, tmp_path: Path
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1}')"
    )
    db.execute("SELECT syncd.attach('items')")
    first = daemon.start().process
    assert first is not None
    second = Daemon(database, tmp_path / "second").start()
    try:
        assert first.wait(WAIT_SECONDS) == 1
        daemon.kill()
        log = daemon.log.read_text()
        assert "error: another process has taken the consumer name 'default'" in log
        assert "  next: stop one of them, or give each its own SYNCD_CONSUMER" in log
        assert "Traceback" not in log
        with second.client() as client:
            assert list(client.keys("items")) == [1]
        third = Daemon(database, tmp_path / "third", consumer="third").start()
        with third.client() as client:
            assert list(client.keys("items")) == [1]
        third.stop()
        assert sorted(db.execute("SELECT DISTINCT consumer FROM syncd.status").fetchall()) == [
            ("default",),
            ("third",),
        ]
    finally:
        second.stop()


def test_at_most_four_connections_are_open_and_each_is_named(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        client.checkpoint()
        names = open_connections(db)
    assert 1 <= len(names) <= 4
    assert set(names) == {"syncd/default"}


def open_connections(db: psycopg.Connection) -> list[str]:
    rows = db.execute(
        "SELECT application_name FROM pg_stat_activity "
        "WHERE pid <> pg_backend_pid() AND datname = current_database() "
        "AND backend_type = 'client backend'"
    )
    return [name for (name,) in rows.fetchall()]


def test_a_role_that_may_not_read_a_source_fails_that_source_alone_and_says_which_grant(
    servers: Servers, tmp_path: Path
) -> None:
    server = servers.of(18)
    for conninfo in clone(server):
        server.execute("CREATE ROLE reader LOGIN")
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute(
                "GRANT USAGE ON SCHEMA syncd TO reader;"
                "GRANT ALL ON ALL TABLES IN SCHEMA syncd TO reader;"
                "GRANT ALL ON ALL SEQUENCES IN SCHEMA syncd TO reader"
            )
            db.execute(
                "CREATE TABLE open (id int PRIMARY KEY, v real[]);"
                "CREATE TABLE closed (LIKE open INCLUDING ALL);"
                "GRANT SELECT ON open TO reader"
            )
            db.execute("INSERT INTO open VALUES (1, '{1}'); INSERT INTO closed VALUES (1, '{1}')")
            db.execute("SELECT syncd.attach('open'), syncd.attach('closed')")
            daemon = Daemon(make_conninfo(conninfo, user="reader"), tmp_path / "data").start()
            try:
                assert r"GRANT SELECT ON \"public\".\"closed\"" in daemon.log.read_text()
                with daemon.client() as client:
                    assert list(client.keys("open")) == [1]
                    db.execute("GRANT SELECT ON closed TO reader")
                    until(
                        lambda: keys_of(client, "closed") == [1],
                        "the rows that the role may read now are found",
                    )
                daemon.stop()
            finally:
                if daemon.process is not None:
                    daemon.kill()
            db.execute("DROP OWNED BY reader")
        server.execute("DROP ROLE reader")
