"""syncd's support for the tests of programs that use it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from syncd.errors import SyncdError
from syncd.testing import Throwaway, throwaway

TESTS = {
    "conftest.py": """
        import psycopg, pytest
        pytest_plugins = ["syncd.pytest_plugin"]

        @pytest.fixture(scope="session")
        def syncd_prepare():
            def migrate(dsn):
                with psycopg.connect(dsn) as connection:
                    connection.execute("CREATE TABLE notes (id int PRIMARY KEY, embedding real[])")
                    connection.execute("SELECT syncd.attach('notes')")
            return migrate
    """,
    "test_notes.py": """
        import psycopg

        def test_a_note_is_found(syncd_throwaway, syncd_client):
            with psycopg.connect(syncd_throwaway.dsn) as connection:
                connection.execute("INSERT INTO notes VALUES (1, '{1,0}')")
            syncd_throwaway.catch_up()
            assert [hit.key for hit in syncd_client.search("notes", [1, 0])] == [1]
    """,
}


def test_rows_committed_before_catch_up_are_found_after_it(running: Throwaway) -> None:
    with psycopg.connect(running.dsn, autocommit=True) as connection, running.client() as client:
        connection.execute("CREATE TABLE caught (id int PRIMARY KEY, embedding real[])")
        connection.execute("SELECT syncd.attach('caught')")
        for number in range(100):
            connection.execute("INSERT INTO caught VALUES (%s, '{1,0}')", [number])
            running.catch_up()
            assert len(client.search("caught", [1, 0], k=1000)) == number + 1


def test_the_testers_own_settings_are_not_used_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SYNCD_POLL_SECONDS", "not a number")
    monkeypatch.setenv("PGHOST", "db.example")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with throwaway() as both, both.client() as client:
        assert client.ping() == "pong"
        socket, dsn = both.socket, both.dsn
    assert not socket.exists()
    assert list(tmp_path.glob("syncd-*/*")) == []
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(dsn)


def test_a_syncd_that_cannot_start_says_why() -> None:
    with (
        pytest.raises(SyncdError, match="wrong setting: checkpoint_seconds"),
        throwaway(checkpoint_seconds=-1),
    ):
        pass


def test_the_fixtures_work_in_the_tests_of_another_program(tmp_path: Path) -> None:
    for name, text in TESTS.items():
        (tmp_path / name).write_text(
            "\n".join(line.removeprefix(" " * 8) for line in text.splitlines())
        )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


OTHERS = {"langchain_core", "llama_index", "django", "pytest", "psycopg_pool", "alembic"}


@pytest.mark.parametrize(
    ("modules", "spared"),
    [
        ("syncd", {"faiss", "numpy", "asyncio", "psycopg", "pydantic", "rich", "structlog"}),
        ("syncd.client.client", {"faiss", "psycopg", "pydantic", "rich", "structlog", "typer"}),
        ("syncd.cli.main", OTHERS | {"faiss", "numpy", "psycopg", "pydantic"}),
        ("syncd.cli.main, syncd.cli.ask", OTHERS | {"faiss", "psycopg"}),
        ("syncd.cli.main, syncd.cli.schema", OTHERS | {"faiss", "numpy"}),
        ("syncd.cli.main, syncd.cli.serve, syncd.service", OTHERS | {"syncd.client.client"}),
        ("syncd.readers.process", OTHERS | {"psycopg", "pydantic", "typer"}),
    ],
)
def test_a_command_and_a_client_start_without_the_packages_that_others_need(
    modules: str, spared: set[str]
) -> None:
    code = f"import sys, {modules}; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not spared & set(loaded)
