"""What each test of a tool ends with, and the writers that work beside the tool."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from syncd.postgres.embedded.account import as_account, server_account
from tests.faults.altered import Followed, eventually
from tests.servers import Version, available, bindir

WRITES = (
    "INSERT INTO items (id, v) VALUES (1000 + {n} % 200, ARRAY[{n}, 1, 1]) ON CONFLICT (id) DO UPDATE SET v = excluded.v;"
    "UPDATE items SET v = ARRAY[{n}, 2, 2], deleted_at = NULL WHERE id = 1 + {n} % 150;"
    "DELETE FROM items WHERE id = 1000 + ({n} + 100) % 200;"
    "UPDATE items SET id = 2000 + {n} WHERE id = 151 + {n} % 150"
)
"""For ``tests.faults.altered.writers``: rows come, change, get other keys and go."""


def assert_in_sync(followed: Followed, query: str = "", dataset: str = "items") -> None:
    """The index comes to equal the table, the triggers are as they should be, and verify finds every dataset in sync."""
    followed.in_step(query, dataset)
    eventually(lambda: assert_triggers(followed))
    for each in followed.client.verify().datasets:
        assert each.in_sync, each


def assert_triggers(followed: Followed) -> None:
    """Every trigger is as it should be; the service takes those of a detached partition away when it next looks at the catalogue."""
    wrong = followed.db.execute(
        "SELECT m.relation::text, m.trigger, m.problem FROM syncd.sources AS s, syncd.missing_triggers(s.id) AS m"
    ).fetchall()
    assert wrong == []


def skip_unless_runnable(version: Version, name: str) -> None:
    """Skip the test if PostgreSQL's program is missing, or out of reach of the user who runs the servers."""
    if not available(version):
        pytest.skip(f"PostgreSQL {version} is not installed")
    program = bindir(version) / name
    if not program.exists():
        pytest.skip(f"needs {name}: {program.parent} has none")
    try:
        account = as_account(server_account(Path("/")), Path("/"))
        subprocess.run([program, "--version"], check=True, capture_output=True, **account)
    except OSError as error:
        pytest.skip(f"the user who runs the servers cannot run {name}: {error}")
