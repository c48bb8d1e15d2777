"""The command line: what it prints, where, and how it exits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from syncd.postgres import schema
from syncd.statements import script
from tests.conftest import Servers, clone
from tests.daemon import Daemon
from tests.integration.commands import SECONDS, assert_failed, printed_json, run, watching
from tests.servers import PostgresServer

BIG = 2**60 + 1
UUID = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
COMMANDS = ["init", "attach", "detach", "serve", "search", "status", "datasets", "verify", "rebuild", "checkpoint", "check", "why", "bench",
            "quickstart", "config", "healthcheck", "uninstall"]  # fmt: skip

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def database_18(server: PostgresServer) -> Iterator[str]:
    """One database for the whole module."""
    yield from clone(server)


@pytest.fixture(scope="module")
def service(database_18: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running syncd with one small table for each kind of key."""
    with psycopg.connect(database_18, autocommit=True) as db:
        for name, types, keys in (
            ("ints", "id int", "(1), (2), (3)"),
            ("bigs", "id bigint", f"({BIG}), ({BIG + 1}), (3)"),
            ("texts", "id text", "('a b'), ('42'), ('[1]')"),
            ("uuids", "id uuid", f"('{UUID}'), (gen_random_uuid()), (gen_random_uuid())"),
            ("pairs", "id int, b text", "(1, 'x'), (1, 'y'), (2, 'x')"),
        ):
            columns = ", ".join(column.split()[0] for column in types.split(", "))
            db.execute(f"CREATE TABLE {name} ({types}, v real[], PRIMARY KEY ({columns}))".encode())
            db.execute(
                f"INSERT INTO {name} SELECT k.*, ARRAY[row_number() OVER (), 0, 0] FROM (VALUES {keys}) AS k".encode()
            )
            db.execute(
                f"SELECT syncd.attach('{name}', metric => 'l2', columns => ARRAY['{columns.split(', ')[-1]}'])".encode()
            )
    daemon = Daemon(database_18, tmp_path_factory.mktemp("service") / "data").start()
    yield daemon
    daemon.stop()


@pytest.fixture
def ask(service: Daemon) -> Run:
    """A command that knows where the service is."""

    def command(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return run(*arguments, SYNCD_SOCKET=str(service.socket), **more)

    return command


# Help and usage


def test_every_command_is_listed() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert set(re.findall(r"^  ([a-z]+)  ", done.stdout, re.MULTILINE)) == set(COMMANDS)


@pytest.mark.parametrize("command", ["attach", "search"])
def test_help_ends_with_an_example(command: str) -> None:
    done = run(command, "--help")
    assert done.returncode == 0
    assert f"syncd {command}" in done.stdout.partition("Example:")[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ["nosuch"],
        ["search"],
        ["search", "ints", "--key", "1", "-k", "many"],
        ["search", "ints", "--key", "1", "-k", "0"],
        ["search", "ints", "--key", "1", "--recall", "2"],
        ["search", "ints"],
        ["search", "ints", "--key", "1", "--vector", "[1]"],
        ["search", "ints", "--vector", "[1, "],
        ["search", "ints", "--vector", '["a"]'],
        ["search", "ints", "--vector", "[true, false, true]"],
        ["search", "ints", "--vector", "@/nosuch/file"],
        ["search", "ints", "--key", "one"],
        ["search", "pairs", "--key", "1"],
        ["search", "ints", "--key", "1", "--filter", "{"],
        ["search", "ints", "--key", "1", "--filter", "[]"],
        ["search", "ints", "--key", "1", "--filter", "1"],
        ["attach"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_says_what_is_wrong(ask: Run, arguments: Sequence[str]) -> None:
    done = ask(*arguments)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr
    assert "Traceback" not in done.stderr


# Asking the service


@pytest.mark.parametrize(
    ("dataset", "key", "nearest"),
    [
        ("ints", "1", 2),
        ("default/ints", "3", 2),
        ("bigs", str(BIG), str(BIG + 1)),
        ("texts", "a b", "42"),
        ("texts", "42", "a b"),
        ("texts", "[1]", "42"),
        ("pairs", '[1, "x"]', [1, "y"]),
    ],
)
def test_search_by_key_reads_the_key_by_its_type(ask: Run, dataset: str, key: str, nearest: object) -> None:
    found = printed_json(ask("search", dataset, "--key", key, "-k", "1", "--json"))
    assert (found["keys"], found["distances"]) == ([nearest], [1.0])


def test_a_search_as_json_says_for_which_snapshot_it_stands(ask: Run) -> None:
    found = printed_json(ask("search", "ints", "--key", "1", "--json"))
    assert found.keys() == {"keys", "distances", "position", "lag_seconds"}
    assert found["position"].keys() == {"snapshot", "outbox_id"}


def test_search_by_a_uuid_in_any_of_its_spellings(ask: Run) -> None:
    found = printed_json(ask("search", "uuids", "--key", UUID.upper(), "--json"))
    assert found["distances"] == [1.0, 2.0]


def test_search_by_vector_from_the_command_line_a_file_and_stdin(ask: Run, tmp_path: Path) -> None:
    (tmp_path / "vector.json").write_text("[3, 0, 0]")
    for given, stdin in (("[3.0, 0, 0]", None), (f"@{tmp_path / 'vector.json'}", None), ("-", "[3, 0, 0]\n")):
        found = printed_json(ask("search", "ints", "--vector", given, "-k", "2", "--json", stdin=stdin))
        assert (found["keys"], found["distances"]) == ([3, 2], [0.0, 1.0])


def test_search_with_a_filter_finds_what_passes_and_says_what_can_be_asked(ask: Run) -> None:
    found = printed_json(ask("search", "pairs", "--vector", "[0, 0, 0]", "--filter", '{"b": "x"}', "--json"))
    assert (found["keys"], found["distances"]) == ([[1, "x"], [2, "x"]], [1.0, 3.0])
    assert_failed(
        ask("search", "pairs", "--vector", "[0, 0, 0]", "--filter", '{"c": 1}'),
        1,
        "no filterable column 'c'",
        "columns: b",
    )


def test_search_prints_a_table_of_key_and_distance(ask: Run) -> None:
    done = ask("search", "pairs", "--vector", "[1, 0, 0]", "--exact")
    assert done.returncode == 0
    assert done.stderr == ""
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["key", "distance"],
        ['[1,"x"]', "0.000000"],
        ['[1,"y"]', "1.000000"],
        ['[2,"x"]', "2.000000"],
    ]


def test_status_and_datasets_print_what_the_service_answers(ask: Run) -> None:
    status = printed_json(ask("status", "--json"))
    assert status["state"] == "ready"
    assert status["consumer"] == "default"
    assert status["quarantined"] == 0
    assert set(status) >= {
        "version",
        "position",
        "lag_rows",
        "lag_seconds",
        "listener_connected",
        "checkpoint",
        "uptime_seconds",
    }
    assert set(status["position"]) == {"snapshot", "outbox_id"}
    datasets = printed_json(ask("datasets", "--json"))
    assert {row["dataset"]: row["count"] for row in datasets} == {
        f"default/{name}": 3 for name in ("ints", "bigs", "texts", "uuids", "pairs")
    }
    for row in datasets:
        assert set(row) == {
            "bytes_memory",
            "in_sync",
            "verified_at",
            "dataset",
            "source",
            "state",
            "count",
            "tombstones",
            "dim",
            "metric",
            "index",
            "recall",
            "verified",
            "bytes",
            "lag_seconds",
        }
    assert "ready" in ask("status").stdout
    assert "default/ints" in ask("datasets").stdout


def test_checkpoint_saves_one(ask: Run, service: Daemon) -> None:
    done = printed_json(ask("checkpoint", "--json"))
    assert set(done) == {"position", "seconds", "bytes_written"}
    assert (service.data_dir / "manifest.json").exists()


def test_healthcheck_is_0_for_a_service_that_is_well(ask: Run) -> None:
    assert ask("healthcheck").returncode == 0


def test_an_answer_that_is_an_error_exits_1_and_says_what_to_do(ask: Run) -> None:
    assert_failed(ask("search", "nosuch", "--vector", "[1]"), 1, "nosuch", "syncd datasets")
    assert_failed(ask("search", "ints", "--vector", "[1, 2]"), 1, "dimension 3", "has 2")
    assert_failed(ask("search", "ints", "--key", "99"), 1, "99")


def test_a_socket_may_be_given_as_a_flag(service: Daemon) -> None:
    assert run("status", "--socket", str(service.socket)).returncode == 0


def test_without_a_service_each_command_names_the_one_that_starts_it(tmp_path: Path) -> None:
    for command in (["search", "ints", "--vector", "[1]"], ["status"], ["datasets"], ["checkpoint"], ["healthcheck"]):
        assert_failed(run(*command, SYNCD_SOCKET=str(tmp_path / "none")), 1, "syncd serve", str(tmp_path / "none"))


def test_a_reader_that_goes_away_is_no_traceback(service: Daemon) -> None:
    command = f"{sys.executable} -m syncd.cli.main datasets --socket {service.socket} | true"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert "Traceback" not in done.stderr


def test_a_table_that_is_read_by_a_program_is_never_folded_or_cut(ask: Run) -> None:
    done = ask("datasets", COLUMNS="40")  # stdout is no terminal: one line a row
    assert done.returncode == 0
    assert "default/ints" in done.stdout


def test_no_color_is_obeyed_on_a_terminal(service: Daemon) -> None:
    master, slave = os.openpty()
    environment = os.environ | {"NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}
    command = [sys.executable, "-m", "syncd.cli.main", "datasets", "--socket", str(service.socket)]
    with subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL, env=environment) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                read = os.read(master, 4096)
            except OSError:  # the terminal's other end is closed
                break
            if not read:
                break
            seen += read
        assert process.wait(SECONDS) == 0
    os.close(master)
    assert b"default/ints" in seen
    assert re.search(rb"\x1b\[(?:[0-9;]*;)?[349][0-9]", seen) is None


def test_a_watched_status_follows_the_service_for_programs(service: Daemon, database_18: str) -> None:
    with (
        watching(service, "--json", stdout=subprocess.PIPE) as process,
        psycopg.connect(database_18, autocommit=True) as db,
    ):
        assert process.stdout is not None

        def texts() -> int:
            assert process.stdout is not None
            found = json.loads(process.stdout.readline())
            assert found["status"]["state"] == "ready"
            return int({one["dataset"]: one["count"] for one in found["datasets"]}["default/texts"])

        assert texts() == 3
        db.execute("INSERT INTO texts VALUES ('watched', '{9,9,9}')")
        while texts() != 4:
            pass
        db.execute("DELETE FROM texts WHERE id = 'watched'")
        while texts() != 3:
            pass


def test_a_watched_status_in_a_pipe_is_there_as_soon_as_it_is_drawn_also_through_a_restart(
    daemon: Daemon, db: psycopg.Connection
) -> None:
    db.execute("CREATE TABLE piped (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO piped VALUES (1, '{1}')")
    db.execute("SELECT syncd.attach('piped')")
    with watching(daemon.start(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None

        def wait_for(text: bytes) -> None:
            while text not in (line := process.stdout.readline()):  # type: ignore[union-attr]
                assert line, "the end"

        wait_for(b"default/piped  ready")
        daemon.stop()
        wait_for(b"as it was")
        daemon.start()
        wait_for(b"checkpoint")
        wait_for(b"default/piped  ready")


def test_a_status_after_a_restart_says_how_old_the_checkpoint_is_that_was_loaded(daemon: Daemon) -> None:
    with daemon.start().client() as client:
        client.checkpoint()
        saved = client.status().checkpoint.at
    daemon.kill()
    with daemon.start().client() as client:
        found = client.status().checkpoint
        assert saved is not None
        assert found.at is not None
        assert found.at <= saved  # a manifest is stamped a moment before it is durable
        assert found.seconds is None
    shown = run("status", SYNCD_SOCKET=str(daemon.socket)).stdout
    assert re.search(r"checkpoint +\d+ (s|ms) old", shown), shown


def test_a_watched_status_is_drawn_again_also_through_a_restart(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("CREATE TABLE drawn (id int PRIMARY KEY, kind text, v real[])")
        db.execute("SELECT syncd.attach('drawn', dataset => 'kind')")
        db.execute("INSERT INTO drawn VALUES (1, '[bold]a', '{1,2}')")
        daemon = Daemon(database, tmp_path / "data").start()
        master, slave = os.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"}
        with watching(daemon, stdout=slave, env=environment):
            os.close(slave)
            seen = b""

            def wait_for(text: bytes) -> None:
                nonlocal seen
                while text not in seen:
                    seen += os.read(master, 4096)
                seen = b""

            wait_for(b"[bold]a")
            db.execute("INSERT INTO drawn SELECT i, '[bold]a', '{1,2}' FROM generate_series(10, 1243) AS i")
            wait_for(b"1,235")
            daemon.stop()
            wait_for(b"as it was")
            daemon.start()
            db.execute("DELETE FROM drawn WHERE id = 1")
            wait_for(b"1,234")
        os.close(master)
        daemon.stop()


@pytest.fixture(scope="module")
def slow(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A service that reads tables a few rows at a time."""
    for conninfo in clone(server):
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute("CREATE TABLE slow (id int PRIMARY KEY, v real[])")
            db.execute("INSERT INTO slow SELECT i, ARRAY[i, 1] FROM generate_series(1, 20000) AS i")
            db.execute("SELECT syncd.attach('slow')")
        daemon = Daemon(conninfo, tmp_path_factory.mktemp("slow") / "data", verify_seconds=0).start()
        daemon.stop()
        daemon.with_constant("syncd.sync.scan.PAGE_ROWS", (10, 10, 10))
        daemon.with_constant("syncd.sync.comparison.ROWS_PER_FETCH", 5)
        yield daemon.start()
        daemon.stop()


@pytest.mark.parametrize("arguments", [["rebuild", "slow"], ["verify"]], ids=lambda value: value[0])
def test_long_work_shows_rows_rate_and_time_left_on_a_terminal(slow: Daemon, arguments: list[str]) -> None:
    master, slave = os.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "150"}
    command = [sys.executable, "-m", "syncd.cli.main", *arguments, "--json", "--socket", str(slow.socket)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, env=environment) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                seen += os.read(master, 4096)
            except OSError:  # the terminal's other end is closed
                break
        assert process.wait(SECONDS) == 0
        assert process.stdout is not None
        json.loads(process.stdout.read())  # and nothing of it is in the result
    os.close(master)
    shown = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen).decode()
    for rows in re.findall(r"([0-9,]+)/20,000 rows", shown):
        assert int(rows.replace(",", "")) <= 20_000
    assert re.search(r"[1-9][0-9,]*/20,000 rows [0-9,]+ rows/s 0:\d\d:\d\d", shown), shown


def test_a_first_reading_shows_rows_rate_and_time_left_on_a_terminal(slow: Daemon) -> None:
    with psycopg.connect(slow.conninfo, autocommit=True) as db:
        db.execute("CREATE TABLE long (id int PRIMARY KEY, v real[])")
        db.execute("INSERT INTO long SELECT i, ARRAY[i, 1] FROM generate_series(1, 100000) AS i")
        db.execute("ANALYZE long")  # what is expected is the planner's estimate
        db.execute("SELECT syncd.attach('long')")
        master, slave = os.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"}
        with watching(slow, stdout=slave, env=environment):
            os.close(slave)
            seen = b""
            while not re.search(
                rb"reading public\.long: [0-9,]+/100,000 rows, [1-9][0-9,]* rows/s, \d+:\d\d:\d\d left", seen
            ):
                seen += os.read(master, 4096)
        os.close(master)
        db.execute("SELECT syncd.detach('long')")


# The schema


def test_init_attach_detach_and_uninstall(servers: Servers) -> None:
    server = servers.of(16)
    dsn = server.create_database("cli")
    try:
        assert_failed(run("attach", "items", "--dsn", dsn), 1, "syncd init")
        assert_failed(run("detach", "items", "--dsn", dsn), 1, "syncd init")
        first, again = run("init", "--dsn", dsn), run("init", SYNCD_DSN=dsn)
        assert (first.returncode, first.stdout, again.returncode, again.stdout) == (0, "", 0, "")
        assert f"at {schema.newest_revision()} now" in first.stderr
        assert f"at {schema.newest_revision()} already" in again.stderr
        server.execute(
            "CREATE TABLE items (a int, b text, lang text, v real[], PRIMARY KEY (a, b)); INSERT INTO items VALUES (1, 'x', 'de', '{1}')",
            "cli",
        )
        arguments = ["attach", "items", "--key", "a", "--key", "b", "--vector", "v", "--project", "'p'", "--dataset", "lang || '%s{}'", "--live",
                     "a % 2 = 1", "--metric", "ip", "--column", "lang", "--column", "b", "--dsn", dsn]  # fmt: skip
        assert printed_json(run(*arguments, "--json")) == {"rows": 1, "live_rows": 1, "datasets": 1}
        assert server.execute("SELECT key, vector, project, dataset, live, metric, columns FROM syncd.sources WHERE key[1] = 'a'", "cli") == [
            (["a", "b"], "v", "'p'", "lang || '%s{}'", "a % 2 = 1", "ip", ["lang", "b"])
        ]  # fmt: skip
        table = run("attach", "items", "--live", "false", "--dsn", dsn)
        assert [line.split() for line in table.stdout.splitlines()] == [
            ["rows", "live", "rows", "datasets"],
            ["1", "0", "0"],
        ]
        assert "warning: none of the 1 rows" in table.stderr
        assert_failed(run("attach", "nosuch", "--dsn", dsn), 1, "nosuch")
        assert_failed(run("attach", "items", "--metric", "hamming", "--dsn", dsn), 1, "cosine, l2 or ip")
        assert_failed(run("attach", "items", "--dataset", "now()::text", "--dsn", dsn), 1, "immutable")
        assert "detached" in run("detach", "items", "--dsn", dsn).stderr
        assert "was not attached" in run("detach", "items", "--dsn", dsn).stderr
        run("attach", "items", "--dsn", dsn)
        refused = run("uninstall", "--dsn", dsn, stdin="n\n")
        assert (refused.returncode, refused.stdout) == (1, "")
        gone, none = run("uninstall", "--dsn", dsn, stdin="y\n"), run("uninstall", "--yes", "--dsn", dsn)
        assert (gone.returncode, none.returncode) == (0, 0)
        assert "is removed" in gone.stderr
        assert "no schema syncd" in none.stderr
        assert server.execute("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal", "cli") == [(0,)]
        assert server.execute("SELECT to_regnamespace('syncd')", "cli") == [(None,)]
    finally:
        server.drop_database("cli")


def test_uninstall_takes_sources_along_that_are_gone_or_strangely_named(database: str, db: psycopg.Connection) -> None:
    table = '"S %s"."T {x}"'
    db.execute(f'CREATE SCHEMA "S %s"; CREATE TABLE {table} (id int PRIMARY KEY, embedding real[])'.encode())
    db.execute("CREATE TABLE gone (id int PRIMARY KEY, embedding real[])")
    db.execute(f"SELECT syncd.attach('{table}'), syncd.attach('gone')".encode())
    db.execute("DROP TABLE gone")
    done = run("uninstall", "--yes", "--dsn", database)
    assert done.returncode == 0, done.stderr
    assert db.execute("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal").fetchone() == (0,)


def test_init_show_sql_needs_no_database_and_prints_sql_alone() -> None:
    done = run("init", "--show-sql", SYNCD_DSN="host=/nosuch")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "CREATE TABLE syncd.outbox" in done.stdout
    assert done.stdout.rstrip().endswith("COMMIT;")
    assert (
        script("triggers/0001_capture.sql").rstrip().removesuffix(";") in done.stdout
    )  # to the letter, percent signs and colons too


# Without a database of one's own


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A data directory whose socket's path is not too long."""
    with tempfile.TemporaryDirectory(prefix="syncd-") as folder:
        yield Path(folder) / "data"


def test_quickstart_shows_a_changed_answer_and_milliseconds_and_can_be_run_again(short_dir: Path) -> None:
    for _ in range(2):
        done = run("quickstart", "--data-dir", str(short_dir))
        assert done.returncode == 0, done.stderr
        answers = [
            [line.split() for line in table.splitlines()] for table in re.split(r"(?m)^key +distance$", done.stdout)[1:]
        ]
        assert len(answers) == 3
        assert [row[0] for row in answers[0] if row] == ["crimson", "firebrick", "brown"]
        assert [row[0] for row in answers[1] if row][:2] == ["crimson", "navy"]
        assert "firebrick" not in [row[0] for row in answers[2] if row]
        assert len(re.findall(r"the index had it [0-9.]+ ms later", done.stderr)) == 2
    assert not list(short_dir.glob("postgres/postmaster.pid")), "the server stopped with the command that started it"


def test_embedded_works_on_every_command_that_takes_a_database(short_dir: Path) -> None:
    there = ("--embedded", "--data-dir", str(short_dir))
    assert run("init", *there).returncode == 0
    assert printed_json(run("attach", "syncd.embeddings", *there, "--json")) == {
        "rows": 0,
        "live_rows": 0,
        "datasets": 0,
    }
    once = run("serve", "--once", *there)
    assert (once.returncode, once.stdout) == (0, f"ready {short_dir / 'syncd.sock'}\n"), once.stderr
    assert run("detach", "syncd.embeddings", *there).returncode == 0
    assert run("uninstall", "--yes", *there).returncode == 0


def test_serve_once_catches_up_saves_a_checkpoint_and_exits(
    database: str, db: psycopg.Connection, tmp_path: Path
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, embedding real[]); INSERT INTO items SELECT i, ARRAY[i, 1] FROM generate_series(1, 3000) i"
    )
    db.execute("SELECT syncd.attach('items')")
    daemon = Daemon(database, tmp_path / "data")
    process = daemon.spawn("--once")
    assert daemon.wait_for_line(process).startswith(b"ready ")
    assert process.wait(SECONDS) == 0
    daemon.kill()
    assert (tmp_path / "data" / "manifest.json").exists()
    daemon.start()
    with daemon.client() as client:
        assert len(list(client.keys("items"))) == 3000
    daemon.stop()
    assert (
        "default/items" not in [line for line in daemon.log.read_text().splitlines() if "source_to_be_read" in line][1:]
    )


def test_a_connection_that_is_refused_says_which_and_what_to_do(server: PostgresServer) -> None:
    assert_failed(run("init", "--dsn", make_conninfo(server.conninfo("nosuch"))), 1, "nosuch", "create the database")
    assert_failed(
        run("attach", "x", "--dsn", "host=127.0.0.1 port=1"), 1, "Connection refused", "SYNCD_DSN", "--embedded"
    )
