"""Commands that ask the service: their help, usage, output and exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.conftest import clone
from tests.daemon import Daemon
from tests.integration.commands import SECONDS, assert_failed, printed_json, run, watching
from tests.servers import PostgresServer

BIG = 2**60 + 1
UUID = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
COMMANDS = {
    *("init", "attach", "detach", "uninstall", "serve", "search", "status", "datasets", "verify"),
    *("route", "cluster"),
    *(
        "recall",
        "rebuild",
        "checkpoint",
        "check",
        "why",
        "bench",
        "quickstart",
        "config",
        "healthcheck",
    ),
}
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def database_18(server: PostgresServer) -> Iterator[str]:
    """One database for the whole module."""
    yield from clone(server)


@pytest.fixture(scope="module")
def service(database_18: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A running syncd with one small table per kind of key."""
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
                f"INSERT INTO {name} SELECT k.*, ARRAY[row_number() OVER (), 0, 0] FROM (VALUES "
                f"{keys}) AS k".encode()
            )
            db.execute(
                f"SELECT syncd.attach('{name}', metric => 'l2', columns => "
                f"ARRAY['{columns.split(', ')[-1]}'])".encode()
            )
    daemon = Daemon(database_18, tmp_path_factory.mktemp("service") / "data").start()
    yield daemon
    daemon.stop()


@pytest.fixture
def ask(service: Daemon) -> Run:
    """A command with the socket of the service."""

    def command(*arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return run(*arguments, SYNCD_SOCKET=str(service.socket), **more)

    return command


# Help and usage


def test_every_command_is_listed() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert set(re.findall(r"^  ([a-z]+)  ", done.stdout, re.MULTILINE)) == COMMANDS


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
def test_wrong_usage_exits_2_and_says_why(ask: Run, arguments: Sequence[str]) -> None:
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
def test_search_by_key_reads_the_key_by_its_type(
    ask: Run, dataset: str, key: str, nearest: object
) -> None:
    found = printed_json(ask("search", dataset, "--key", key, "-k", "1", "--json"))
    assert (found["keys"], found["distances"]) == ([nearest], [1.0])


def test_a_search_as_json_names_its_snapshot(ask: Run) -> None:
    found = printed_json(ask("search", "ints", "--key", "1", "--json"))
    own = {"keys", "distances", "position", "lag_seconds"}
    assert found.keys() == own | {"positions", "coverage", "missing"}
    assert found["position"].keys() == {"snapshot", "outbox_id"}


def test_search_by_a_uuid_in_any_of_its_spellings(ask: Run) -> None:
    found = printed_json(ask("search", "uuids", "--key", UUID.upper(), "--json"))
    assert found["distances"] == [1.0, 2.0]


def test_search_by_vector_from_the_command_line_a_file_and_stdin(ask: Run, tmp_path: Path) -> None:
    (tmp_path / "vector.json").write_text("[3, 0, 0]")
    for given, stdin in (
        ("[3.0, 0, 0]", None),
        (f"@{tmp_path / 'vector.json'}", None),
        ("-", "[3, 0, 0]\n"),
    ):
        found = printed_json(
            ask("search", "ints", "--vector", given, "-k", "2", "--json", stdin=stdin)
        )
        assert (found["keys"], found["distances"]) == ([3, 2], [0.0, 1.0])


def test_search_with_a_filter_finds_rows_that_pass_and_names_the_columns(ask: Run) -> None:
    found = printed_json(
        ask("search", "pairs", "--vector", "[0, 0, 0]", "--filter", '{"b": "x"}', "--json")
    )
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


def test_status_and_datasets_print_the_answers_of_the_service(ask: Run) -> None:
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
            "recall_p5",
            "recall_of",
            "verified",
            "bytes",
            "lag_seconds",
        }
    assert "ready" in ask("status").stdout
    assert "default/ints" in ask("datasets").stdout


def test_recall_is_measured_on_rows_while_few_queries_were_asked(ask: Run) -> None:
    done = printed_json(ask("recall", "ints", "-k", "2", "--json"))
    assert (done["dataset"], done["k"], done["of"], done["queries"]) == (
        "default/ints",
        2,
        "rows",
        3,
    )
    assert [each["target"] for each in done["targets"]] == [0.9, 0.95, 0.98, 0.99]
    for each in done["targets"]:
        assert (each["mean"], each["p5"], each["least"], each["exact"]) == (1.0, 1.0, 1.0, 3)
        assert each["milliseconds"] > 0
    shown = ask("recall", "ints")
    assert "5th percentile" in shown.stdout
    assert "3 of 3" in shown.stdout
    assert "rows may overstate it" in shown.stderr
    assert ask("recall", "nothing").returncode == 1


def test_checkpoint_saves_one(ask: Run, service: Daemon) -> None:
    done = printed_json(ask("checkpoint", "--json"))
    assert set(done) == {"position", "seconds", "bytes_written"}
    assert (service.data_dir / "manifest.json").exists()


def test_healthcheck_is_0_for_a_service_that_is_well(ask: Run) -> None:
    assert ask("healthcheck").returncode == 0


def test_an_answer_that_is_an_error_exits_1_and_names_the_next_step(ask: Run) -> None:
    assert_failed(ask("search", "nosuch", "--vector", "[1]"), 1, "nosuch", "syncd datasets")
    assert_failed(ask("search", "ints", "--vector", "[1, 2]"), 1, "dimension 3", "has 2")
    assert_failed(ask("search", "ints", "--key", "99"), 1, "99")


def test_a_socket_may_be_given_as_a_flag(service: Daemon) -> None:
    assert run("status", "--socket", str(service.socket)).returncode == 0


def test_without_a_service_each_command_names_the_command_that_starts_it(tmp_path: Path) -> None:
    for command in (
        ["search", "ints", "--vector", "[1]"],
        ["status"],
        ["datasets"],
        ["checkpoint"],
        ["healthcheck"],
    ):
        assert_failed(
            run(*command, SYNCD_SOCKET=str(tmp_path / "none")),
            1,
            "syncd serve",
            str(tmp_path / "none"),
        )


def test_a_reader_that_goes_away_causes_no_traceback(service: Daemon) -> None:
    command = f"{sys.executable} -m syncd.cli.main datasets --socket {service.socket} | true"
    done = subprocess.run(
        ["/bin/sh", "-c", command], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert "Traceback" not in done.stderr


def test_a_table_that_is_read_by_a_program_is_never_folded_or_cut(ask: Run) -> None:
    done = ask("datasets", COLUMNS="40")  # stdout is not a terminal: one line per row
    assert done.returncode == 0
    assert "default/ints" in done.stdout


def test_no_color_is_obeyed_on_a_terminal(service: Daemon) -> None:
    master, slave = os.openpty()
    environment = os.environ | {"NO_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "200"}
    command = [sys.executable, "-m", "syncd.cli.main", "datasets", "--socket", str(service.socket)]
    with subprocess.Popen(
        command, stdout=slave, stderr=subprocess.DEVNULL, env=environment
    ) as process:
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


def test_a_watched_status_follows_the_service_for_programs(
    service: Daemon, database_18: str
) -> None:
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
