"""The checks at the end of each test of a tool, and the writers alongside the tool."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from syncd.postgres.embedded.account import as_account, server_account
from tests.faults.altered import Followed, eventually
from tests.servers import Version, available, bindir

WRITES = (
    "INSERT INTO items (id, v) VALUES (1000 + {n} % 200, ARRAY[{n}, 1, 1]) ON CONFLICT (id) DO "
    "UPDATE SET v = excluded.v;"
    "UPDATE items SET v = ARRAY[{n}, 2, 2], deleted_at = NULL WHERE id = 1 + {n} % 150;"
    "DELETE FROM items WHERE id = 1000 + ({n} + 100) % 200;"
    "UPDATE items SET id = 2000 + {n} WHERE id = 151 + {n} % 150"
)
"""Statements for ``altered.writers``: insert, update, change keys and delete."""


def assert_in_sync(followed: Followed, query: str = "", dataset: str = "items") -> None:
    """Wait until the index equals the table, and check the triggers and verify's verdict."""
    followed.in_step(query, dataset)
    eventually(lambda: assert_triggers(followed))
    for each in followed.client.verify().datasets:
        assert each.in_sync, each


def assert_triggers(followed: Followed) -> None:
    """Check that no trigger is missing or wrong.

    The service drops triggers of a detached partition when it next reads the catalogue.
    """
    wrong = followed.db.execute(
        "SELECT m.relation::text, m.trigger, m.problem FROM syncd.sources AS s, "
        "syncd.missing_triggers(s.id) AS m"
    ).fetchall()
    assert wrong == []


def skip_unless_runnable(version: Version, name: str) -> None:
    """Skip the test if PostgreSQL's program is missing, or if the servers' user cannot run it."""
    if not available(version):
        pytest.skip(f"PostgreSQL {version} is not installed")
    program = bindir(version) / name
    if not program.exists():
        pytest.skip(f"needs {name}: {program.parent} has none")
    try:
        account = as_account(server_account(Path("/")), Path("/"))
        subprocess.run([program, "--version"], check=True, capture_output=True, **account)
    except OSError as error:
        pytest.skip(f"the user of the servers cannot run {name}: {error}")
