"""A failure names the next command, and that command repairs it."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from syncd import errors
from syncd.errors import RequestError, SyncdError
from tests.daemon import Daemon
from tests.faults.following import despite_locks, until
from tests.integration.commands import assert_failed, run
from tests.servers import PostgresServer

COMMAND = re.compile(r"syncd attach [^;\n]+")


@pytest.fixture
def items(db: psycopg.Connection, daemon: Daemon) -> psycopg.Connection:
    """A table that a running syncd follows, with an argument of each kind."""
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[], lang text)")
    db.execute("INSERT INTO items SELECT i, ARRAY[i, 1], 'de' FROM generate_series(1, 3) AS i")
    db.execute(
        "SELECT syncd.attach('items', project => $$'it''s'$$, dataset => 'lang', metric => 'l2', "
        "columns => ARRAY['lang'])"
    )
    daemon.start()
    return db


@pytest.fixture
def stranger(server: PostgresServer) -> Iterator[str]:
    """A role without objects and rights."""
    server.execute("CREATE ROLE stranger LOGIN")
    yield "stranger"
    server.execute("DROP ROLE stranger")


def next_step(done: subprocess.CompletedProcess[str]) -> str:
    """The next step that a failed command names."""
    assert_failed(done, 1)
    return done.stderr.rpartition("\n  next: ")[2].strip()


@pytest.mark.parametrize("column", ["v", "lang"])
@pytest.mark.parametrize("command", [["why", "it's/de"], ["check"]], ids=lambda value: value[0])
def test_a_renamed_column_is_answered_with_the_command_that_attaches_it_by_its_new_name(
    items: psycopg.Connection, daemon: Daemon, column: str, command: list[str]
) -> None:
    items.execute(
        sql.SQL("ALTER TABLE items RENAME COLUMN {} TO renamed").format(sql.Identifier(column))
    )
    with daemon.client() as client:
        until(lambda: client.status().state == "failed", "syncd notices it")
        said = run(*command, SYNCD_DSN=items.info.dsn, SYNCD_SOCKET=str(daemon.socket)).stdout
        fixes = re.findall(r"(?:next|fix): (syncd attach .*)", said)
        assert len(fixes) == 1, said
        done = run(*shlex.split(fixes[0])[1:], SYNCD_DSN=items.info.dsn)
        assert done.returncode == 0, (fixes, done.stderr)
        until(lambda: client.status().state == "ready", "the source is ready again")
        assert {row.dataset: row.count for row in client.datasets()} == {"it's/de": 3}
        assert client.verify().datasets[0].in_sync


@pytest.mark.parametrize("column", ["v", "id", "lang"])
def test_the_command_for_a_renamed_column_is_the_same_after_each_restart(
    items: psycopg.Connection, daemon: Daemon, column: str
) -> None:
    daemon.stop()
    # As after an upgrade: the rules are text, in which no name is followed.
    items.execute("DELETE FROM syncd.rules")
    items.execute(
        sql.SQL("ALTER TABLE items RENAME COLUMN {} TO renamed").format(sql.Identifier(column))
    )
    said = []
    for _ in range(3):
        daemon.start()
        with daemon.client() as client:
            until(lambda: client.status().state == "failed", "syncd notices it")
            client.checkpoint()
            checked = run("check", SYNCD_DSN=items.info.dsn, SYNCD_SOCKET=str(daemon.socket)).stdout
        said += re.findall(r"fix: (syncd attach .*|.*(?:NOT NULL|UNIQUE).*)", checked)
        daemon.stop()
    assert len(said) == 3, said
    assert len(set(said)) == 1, said
    assert "renamed" in said[0]
    assert run(*shlex.split(said[0])[1:], SYNCD_DSN=items.info.dsn).returncode == 0
    daemon.start()
    with daemon.client() as client:
        until(lambda: client.status().state == "ready", "the source is ready again")
        assert client.verify().datasets[0].in_sync


@pytest.mark.parametrize(
    "wrong",
    [
        ["attach", "public.nosuch"],
        ["attach", "nosuch.chunks"],
        ["attach", "not a name"],
        ["attach", "chunks", "--vector", "nosuch"],
        ["attach", "chunks", "--metric", "hamming"],
    ],
)
def test_attach_names_the_command_in_words_of_the_command_line(
    db: psycopg.Connection, wrong: list[str]
) -> None:
    db.execute("CREATE TABLE chunks (id int PRIMARY KEY, a real[], b text)")
    said = next_step(run(*wrong, SYNCD_DSN=db.info.dsn))
    assert "=>" not in said
    found = COMMAND.search(said)
    assert found is not None, said
    assert run(*shlex.split(found[0])[1:], SYNCD_DSN=db.info.dsn).returncode == 0


@pytest.mark.parametrize(
    ("table", "arguments", "hint"),
    [
        ("id int PRIMARY KEY, a real[], b real[]", [], "--vector a; the candidates are: a, b"),
        ("id int, a real[]", [], "--key COLUMN"),
        ("id int PRIMARY KEY, a real[]", ["--key", "nosuch"], "--key COLUMN"),
        (
            "id int PRIMARY KEY, a real[]",
            ["--column", "c"],
            "--column COLUMN; the table has: id, a",
        ),
    ],
)
def test_attach_says_which_option_is_wanted(
    db: psycopg.Connection, table: str, arguments: list[str], hint: str
) -> None:
    db.execute(f"CREATE TABLE chunks ({table})".encode())
    said = next_step(run("attach", "public.chunks", *arguments, SYNCD_DSN=db.info.dsn))
    assert f"syncd attach public.chunks {hint}" in said


def test_a_role_without_rights_gets_the_grant_and_the_check(
    db: psycopg.Connection, stranger: str
) -> None:
    db.execute(
        sql.SQL(
            "CREATE TABLE chunks (id int PRIMARY KEY, v real[]); ALTER TABLE chunks OWNER TO {}"
        ).format(sql.Identifier(stranger))
    )
    dsn = make_conninfo(db.info.dsn, user=stranger)
    said = next_step(run("attach", "chunks", SYNCD_DSN=dsn))
    assert "syncd check" in said
    grant = re.search("GRANT .*?;", said)
    assert grant is not None, said
    db.execute(grant[0].encode())
    assert run("attach", "chunks", SYNCD_DSN=dsn).returncode == 0
    assert 'GRANT ALL ON ALL TABLES IN SCHEMA syncd TO "stranger";' in next_step(
        run("uninstall", "--yes", SYNCD_DSN=dsn)
    )
    db.execute("DROP TABLE chunks; REVOKE ALL ON SCHEMA syncd FROM stranger")


def test_if_the_schema_is_gone_each_command_says_so_and_the_service_goes_on_answering(
    items: psycopg.Connection, daemon: Daemon
) -> None:
    settings: dict[str, Any] = {"SYNCD_SOCKET": str(daemon.socket)}
    despite_locks(lambda: items.execute("DROP SCHEMA syncd CASCADE"))
    with daemon.client() as client:
        until(lambda: client.status().database_error is not None, "syncd notices it")
    for command in (["verify"], ["rebuild", "it's/de"], ["rebuild", "it's/de"], ["checkpoint"]):
        assert "syncd init" in next_step(run(*command, **settings)), command
    healthy = run("healthcheck", **settings)
    assert healthy.returncode == 0
    assert "no schema syncd" in healthy.stderr
    stale = run("healthcheck", SYNCD_MAX_STALENESS_SECONDS="0.001", **settings)
    assert stale.returncode == 1
    assert "SYNCD_MAX_STALENESS_SECONDS" in stale.stderr
    assert run("search", "it's/de", "--key", "1", **settings).returncode == 0
    shown = run("status", **settings)
    assert re.search("database +the database has no schema syncd", shown.stdout)
    assert "next: syncd check" in shown.stderr
    said = run("why", "it's/de", SYNCD_DSN=items.info.dsn, **settings).stdout
    assert "next: install it with: syncd init" in said


def test_a_service_that_ran_once_leaves_its_last_state_and_position_in_the_database(
    items: psycopg.Connection, daemon: Daemon
) -> None:
    shown = "SELECT DISTINCT state, position, checkpoint_at IS NOT NULL FROM syncd.status"
    with daemon.client() as client:
        until(
            lambda: (items.execute(shown).fetchone() or [""])[0] == "ready", "the state is reported"
        )
        position = client.status().position
        assert position is not None
        told = items.execute(shown).fetchone()
        assert told is not None
        assert told[1].keys() == {"snapshot", "outbox_id"}
        assert told[1]["outbox_id"] == position.outbox_id
    daemon.kill()
    items.execute("INSERT INTO items VALUES (4, '{4,1}', 'de')")
    items.execute("UPDATE syncd.consumers SET position = NULL, state = 'backfilling'")
    daemon.spawn("--once").wait(60)
    (outbox_id,) = items.execute("SELECT last_value FROM syncd.outbox_id").fetchone() or (None,)
    told = items.execute(shown).fetchone()
    assert told is not None
    assert (told[0], told[1]["outbox_id"], told[2]) == ("ready", outbox_id, True)


@pytest.mark.parametrize(
    "kind",
    [
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, SyncdError)
    ],
)
def test_no_error_is_without_a_next_step(kind: type[SyncdError]) -> None:
    error = kind.__new__(kind)
    SyncdError.__init__(error, "it failed")
    assert error.hint


@pytest.mark.usefixtures("items")
def test_a_search_for_nothing_names_the_arguments(daemon: Daemon) -> None:
    with daemon.client() as client, pytest.raises(RequestError, match="exactly one") as caught:
        client.search("it's/de")
    assert '"vector": [' in caught.value.hint
