"""The programs in tests/examples/ work."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from syncd.testing import Throwaway, throwaway
from tests.apps.urls import sqlalchemy_url
from tests.servers import free_port

EXAMPLES = Path(__file__).parents[1] / "examples"
TOKEN = "of this test"  # noqa: S105


def run(running: Throwaway, *command: str, dsn: str = "") -> str:
    environment = os.environ | {
        "SYNCD_DSN": dsn or running.dsn,
        "SYNCD_SOCKET": str(running.socket),
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def colours(running: Throwaway) -> str:
    """Name of the dataset of a table with three vectors."""
    with psycopg.connect(running.dsn, autocommit=True) as connection:
        connection.execute(
            "CREATE TABLE IF NOT EXISTS colours (name text PRIMARY KEY, embedding real[])"
        )
        connection.execute("SELECT syncd.attach('colours')")
        connection.execute("TRUNCATE colours")
        connection.execute(
            "INSERT INTO colours VALUES ('red', '{1,0,0}'), ('blue', '{0,0,1}'), ('pink', "
            "'{1,0.5,0.5}')"
        )
    return "colours"


def test_sqlalchemy(running: Throwaway) -> None:
    program = str(EXAMPLES / "with_sqlalchemy.py")
    url = sqlalchemy_url(running.dsn)
    assert run(running, sys.executable, program, dsn=url) == "red\norange\n"


@pytest.mark.skipif(importlib.util.find_spec("django") is None, reason="pip install -e '.[dev]'")
def test_django(running: Throwaway) -> None:
    assert run(running, sys.executable, str(EXAMPLES / "with_django.py")) == "red\norange\n"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_node(running: Throwaway, colours: str) -> None:
    lines = run(running, "node", str(EXAMPLES / "search.mjs"), colours, "[1, 0, 0]").splitlines()
    assert [line.split()[0] for line in lines] == ["red", "pink"]


def test_a_shell_over_tcp() -> None:
    port = str(free_port())
    with throwaway(listen=f"127.0.0.1:{port}", token=TOKEN) as running:
        with psycopg.connect(running.dsn, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO syncd.embeddings (id, embedding) VALUES ('red', '{1,0}'), ('blue', "
                "'{0,1}')"
            )
        script = str(EXAMPLES / "search.sh")
        answer = json.loads(
            run(running, "bash", script, "127.0.0.1", port, TOKEN, "embeddings", "[1, 0]")
        )
    assert answer["result"]["keys"] == ["red", "blue"]
