"""Commands that connect to the database: init, attach, detach, uninstall and ``serve --once``.

quickstart and ``--embedded`` start a server of their own.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from syncd.postgres import schema
from syncd.statements import script
from tests.conftest import Servers
from tests.daemon import Daemon
from tests.integration.commands import SECONDS, assert_failed, printed_json, run
from tests.servers import PostgresServer

pytestmark = pytest.mark.server

# The schema


def test_init_attach_detach_and_uninstall(servers: Servers) -> None:
    server = servers.of(16)
    dsn = server.create_database("cli")
    try:
        assert_failed(run("attach", "items", "--dsn", dsn), 1, "syncd init")
        assert_failed(run("detach", "items", "--dsn", dsn), 1, "syncd init")
        first, again = run("init", "--dsn", dsn), run("init", SYNCD_DSN=dsn)
        assert (first.returncode, first.stdout, again.returncode, again.stdout) == (0, "", 0, "")
        assert first.stderr == f"schema syncd is at {schema.newest_revision()}\n"
        assert f"at {schema.newest_revision()}; nothing was changed" in again.stderr
        server.execute(
            "CREATE TABLE items (a int, b text, lang text, v real[], PRIMARY KEY (a, b)); INSERT "
            "INTO items VALUES (1, 'x', 'de', '{1}')",
            "cli",
        )
        arguments = [
            *("attach", "items", "--key", "a", "--key", "b", "--vector", "v", "--project", "'p'"),
            *("--dataset", "lang || '%s{}'", "--live", "a % 2 = 1", "--metric", "ip"),
            *("--column", "lang", "--column", "b", "--dsn", dsn),
        ]
        assert printed_json(run(*arguments, "--json")) == {"rows": 1, "live_rows": 1, "datasets": 1}
        attached = server.execute(
            "SELECT key, vector, project, dataset, live, metric, columns "
            "FROM syncd.sources WHERE key[1] = 'a'",
            "cli",
        )
        assert attached == [
            (["a", "b"], "v", "'p'", "lang || '%s{}'", "a % 2 = 1", "ip", ["lang", "b"])
        ]
        table = run("attach", "items", "--live", "false", "--dsn", dsn)
        assert [line.split() for line in table.stdout.splitlines()] == [
            ["rows", "live", "rows", "datasets"],
            ["1", "0", "0"],
        ]
        assert "warning: none of the 1 rows" in table.stderr
        assert_failed(run("attach", "nosuch", "--dsn", dsn), 1, "nosuch")
        assert_failed(
            run("attach", "items", "--metric", "hamming", "--dsn", dsn), 1, "cosine, l2 or ip"
        )
        assert_failed(
            run("attach", "items", "--dataset", "now()::text", "--dsn", dsn), 1, "immutable"
        )
        assert "detached" in run("detach", "items", "--dsn", dsn).stderr
        assert "was not attached" in run("detach", "items", "--dsn", dsn).stderr
        run("attach", "items", "--dsn", dsn)
        refused = run("uninstall", "--dsn", dsn, stdin="n\n")
        assert (refused.returncode, refused.stdout) == (1, "")
        gone, none = (
            run("uninstall", "--dsn", dsn, stdin="y\n"),
            run("uninstall", "--yes", "--dsn", dsn),
        )
        assert (gone.returncode, none.returncode) == (0, 0)
        assert "is removed" in gone.stderr
        assert "no schema syncd" in none.stderr
        assert server.execute("SELECT count(*) FROM pg_trigger WHERE NOT tgisinternal", "cli") == [
            (0,)
        ]
        assert server.execute("SELECT to_regnamespace('syncd')", "cli") == [(None,)]
    finally:
        server.drop_database("cli")


def test_uninstall_drops_nothing_that_users_made_with_the_schema(
    database: str, db: psycopg.Connection
) -> None:
    db.execute("CREATE TABLE kept (id int PRIMARY KEY, embedding real[])")
    db.execute("SELECT syncd.attach('kept')")
    db.execute("CREATE VIEW near AS SELECT key FROM syncd.search('kept', '[1]')")
    db.execute("CREATE MATERIALIZED VIEW lag AS SELECT lag_rows FROM syncd.status")
    db.execute("CREATE TABLE written (token text DEFAULT syncd.token())")
    refused = run("uninstall", "--yes", "--dsn", database)
    assert_failed(refused, 1, "materialized view lag, view near")
    assert "default value for column token of table written" in refused.stderr
    assert db.execute("SELECT source FROM syncd.sources WHERE source = 'kept'::regclass").fetchall()
    db.execute("DROP VIEW near; DROP MATERIALIZED VIEW lag; DROP TABLE written")
    assert run("uninstall", "--yes", "--dsn", database).returncode == 0


def test_uninstall_works_with_sources_that_are_gone_or_have_strange_names(
    database: str, db: psycopg.Connection
) -> None:
    table = '"S %s"."T {x}"'
    db.execute(
        f'CREATE SCHEMA "S %s";CREATE TABLE {table} (id int PRIMARY KEY, embedding real[])'.encode()
    )
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


# With an embedded PostgreSQL


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A data directory with a short path, for its socket."""
    with tempfile.TemporaryDirectory(prefix="syncd-") as folder:
        yield Path(folder) / "data"


def test_quickstart_shows_a_changed_answer_and_milliseconds_and_can_be_run_again_with_shards(
    short_dir: Path,
) -> None:
    for shards in (0, 2):
        options = ["--shards", str(shards)] if shards else []
        done = run("quickstart", "--data-dir", str(short_dir), *options)
        assert done.returncode == 0, done.stderr
        assert len(re.findall(r"^syncd serve --shard ", done.stderr, re.MULTILINE)) == shards
        answers = [
            [line.split() for line in table.splitlines()]
            for table in re.split(r"(?m)^key +distance$", done.stdout)[1:]
        ]
        assert len(answers) == 3
        assert [row[0] for row in answers[0] if row] == ["crimson", "firebrick", "brown"]
        assert [row[0] for row in answers[1] if row][:2] == ["crimson", "navy"]
        assert "firebrick" not in [row[0] for row in answers[2] if row]
        assert len(re.findall(r"the index had it [0-9.]+ ms later", done.stderr)) == 2
    assert not list(short_dir.glob("postgres/postmaster.pid")), (
        "the server stopped with the command that started it"
    )


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


# With a server, and without one


def test_serve_once_catches_up_saves_a_checkpoint_and_exits(
    database: str, db: psycopg.Connection, tmp_path: Path
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, embedding real[]); INSERT INTO items SELECT i, "
        "ARRAY[i, 1] FROM generate_series(1, 3000) i"
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
        "default/items"
        not in [
            line for line in daemon.log.read_text().splitlines() if "source_to_be_read" in line
        ][1:]
    )


def test_a_refused_connection_is_named_with_the_next_step(server: PostgresServer) -> None:
    assert_failed(
        run("init", "--dsn", make_conninfo(server.conninfo("nosuch"))),
        1,
        "nosuch",
        "create the database",
    )
    assert_failed(
        run("attach", "x", "--dsn", "host=127.0.0.1 port=1"),
        1,
        "Connection refused",
        "SYNCD_DSN",
        "--embedded",
    )
