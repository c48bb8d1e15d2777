"""``syncd status --watch``: a status drawn again and again, also through a restart.

Long work shows its progress.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import clone
from tests.daemon import Daemon
from tests.integration.commands import SECONDS, run, watching
from tests.servers import PostgresServer


def test_a_watched_status_reaches_a_pipe_as_soon_as_it_is_drawn_also_through_a_restart(
    daemon: Daemon, db: psycopg.Connection
) -> None:
    db.execute("CREATE TABLE piped (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO piped VALUES (1, '{1}')")
    db.execute("SELECT syncd.attach('piped')")
    with watching(daemon.start(), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None

        def wait_for(text: bytes) -> None:
            while text not in (line := process.stdout.readline()):  # type: ignore[union-attr]
                assert line, f"the output ended before {text!r}"

        wait_for(b"default/piped  ready")
        daemon.stop()
        wait_for(b"last known state")
        daemon.start()
        wait_for(b"checkpoint")
        wait_for(b"default/piped  ready")


def test_a_status_after_a_restart_says_how_old_the_checkpoint_is_that_was_loaded(
    daemon: Daemon,
) -> None:
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


def test_a_watched_status_is_drawn_again_also_through_a_restart(daemon: Daemon) -> None:
    with psycopg.connect(daemon.conninfo, autocommit=True) as db:
        db.execute("CREATE TABLE drawn (id int PRIMARY KEY, kind text, v real[])")
        db.execute("SELECT syncd.attach('drawn', dataset => 'kind')")
        db.execute("INSERT INTO drawn VALUES (1, '[bold]a', '{1,2}')")
        daemon.start()
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
            db.execute(
                "INSERT INTO drawn SELECT i, '[bold]a', '{1,2}' FROM generate_series(10, 1243) AS i"
            )
            wait_for(b"1,235")
            daemon.stop()
            wait_for(b"last known state")
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
        daemon = Daemon(
            conninfo, tmp_path_factory.mktemp("slow") / "data", verify_seconds=0
        ).start()
        daemon.stop()
        daemon.with_constant("syncd.sync.source.scan.PAGE_ROWS", (10, 10, 10))
        daemon.with_constant("syncd.sync.background.comparison.ROWS_PER_FETCH", 5)
        yield daemon.start()
        daemon.stop()


@pytest.mark.parametrize("arguments", [["rebuild", "slow"], ["verify"]], ids=lambda value: value[0])
def test_long_work_shows_rows_rate_and_time_left_on_a_terminal(
    slow: Daemon, arguments: list[str]
) -> None:
    master, slave = os.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "150"}
    command = [
        sys.executable,
        "-m",
        "syncd.cli.main",
        *arguments,
        "--json",
        "--socket",
        str(slow.socket),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=slave, env=environment
    ) as process:
        os.close(slave)
        seen = b""
        while True:
            try:
                seen += os.read(master, 4096)
            except OSError:  # the terminal's other end is closed
                break
        assert process.wait(SECONDS) == 0
        assert process.stdout is not None
        json.loads(process.stdout.read())  # the result holds only JSON
    os.close(master)
    shown = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen).decode()
    for rows in re.findall(r"([0-9,]+)/20,000 rows", shown):
        assert int(rows.replace(",", "")) <= 20_000
    assert re.search(r"[1-9][0-9,]*/20,000 rows [0-9,]+ rows/s 0:\d\d:\d\d", shown), shown


def test_a_first_reading_shows_rows_rate_and_time_left_on_a_terminal(slow: Daemon) -> None:
    with psycopg.connect(slow.conninfo, autocommit=True) as db:
        db.execute("CREATE TABLE long (id int PRIMARY KEY, v real[])")
        db.execute("INSERT INTO long SELECT i, ARRAY[i, 1] FROM generate_series(1, 100000) AS i")
        db.execute("ANALYZE long")  # the total is the planner's estimate
        db.execute("SELECT syncd.attach('long')")
        master, slave = os.openpty()
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "150", "LINES": "40"}
        with watching(slow, stdout=slave, env=environment):
            os.close(slave)
            seen = b""
            while not re.search(
                rb"reading public\.long: [0-9,]+/100,000 rows, "
                rb"[1-9][0-9,]* rows/s, \d+:\d\d:\d\d left",
                seen,
            ):
                seen += os.read(master, 4096)
        os.close(master)
        db.execute("SELECT syncd.detach('long')")
