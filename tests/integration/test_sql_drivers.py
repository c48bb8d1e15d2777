"""Drivers of other languages at the listener for PostgreSQL clients: Node's pg, and JDBC."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.daemon import Daemon
from tests.servers import PLACES, free_port

PROGRAMS = Path(__file__).parents[1] / "clients"
WORD = "a-long-word"
JDBC = Path("/usr/share/java/postgresql.jar")
NODE_MODULES = Path(PLACES[0]) / "node" / "node_modules"
SECONDS = 60


@dataclass
class Listener:
    """A running service with a table."""

    daemon: Daemon
    port: int

    def found(self, k: int, **params: Any) -> list[str]:
        """Keys that the RPC finds near row 5."""
        with self.daemon.client() as client:
            return [str(hit.key) for hit in client.search("chunks", key=5, k=k, **params)]


@pytest.fixture
def listener(db: psycopg.Connection, database: str, tmp_path: Path) -> Iterator[Listener]:
    db.execute("CREATE TABLE chunks (id bigint PRIMARY KEY, lang text, embedding real[])")
    db.execute(
        "INSERT INTO chunks SELECT i, (ARRAY['en', 'de'])[i % 2 + 1], "
        "ARRAY[sin(i), cos(i), sin(i * i)] FROM generate_series(1, 400) AS i"
    )
    db.execute("SELECT syncd.attach('chunks', columns => ARRAY['lang'])")
    port = free_port()
    daemon = Daemon(database, tmp_path / "data", sql_listen=f"127.0.0.1:{port}", token=WORD).start()
    yield Listener(daemon, port)
    daemon.stop()


def printed(*command: str, **environment: str) -> str:
    """What a program prints."""
    done = subprocess.run(
        command,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.skipif(
    not (NODE_MODULES / "pg").exists(),
    reason='Node\'s pg is not installed: eval "$(.ci/run servers)"',
)
def test_nodes_pg_searches_and_gets_errors_with_their_codes(listener: Listener) -> None:
    found = json.loads(
        printed(
            "node",
            str(PROGRAMS / "searches.cjs"),
            str(listener.port),
            "5",
            NODE_PATH=str(NODE_MODULES),
            PGPASSWORD=WORD,
        )
    )
    assert found == {
        "keys": listener.found(4),
        "isNumber": True,
        "filtered": listener.found(10, filter={"lang": "de"}),
        "simple": ["0A000", True],
        "unknown": ["42P01", "unknown_dataset"],
        "aborted": ["25P02", None],
        "datasets": "0A000",
        "counted": [{"dataset": "default/chunks", "count": "400"}],
        "stranger": ["28P01", "unauthorized"],
    }


@pytest.mark.skipif(shutil.which("javac") is None, reason="no Java compiler is installed")
@pytest.mark.skipif(not JDBC.exists(), reason="apt install libpostgresql-jdbc-java")
def test_jdbc_prepares_pages_and_cancels(listener: Listener, database: str) -> None:
    with psycopg.connect(database) as writer:
        (token,) = writer.execute("SELECT syncd.token()").fetchone() or ("",)  # it does not end
        program = str(PROGRAMS / "Searches.java")
        lines = printed(
            *("java", "-XX:TieredStopAtLevel=1", "-cp", str(JDBC), program),
            *(str(listener.port), "5", WORD, token),
        )
    assert dict(line.split(" ", 1) for line in lines.splitlines()) == {
        "keys": ",".join(listener.found(4)),
        "paged": "25",
        "unknown": "42P01",
        "aborted": "25P02",
        "other": "0A000",
        "cancelled": "57014",
        "valid": "true",
    }
