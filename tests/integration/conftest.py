"""Fixtures of several files: a service with rows to compare, a server for prepared transactions."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import prepare
from tests.daemon import Daemon
from tests.servers import PostgresServer


@pytest.fixture
def followed(db: psycopg.Connection, daemon: Daemon) -> Daemon:
    """A service that follows a thousand rows and never verifies by itself."""
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, v vector, gone boolean DEFAULT false, "
        "lang text DEFAULT 'en')"
    )
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, i % 7, 1, 2, 3, 4, 5, 6]::real[]::vector "
        "FROM generate_series(1, 1000) i"
    )
    db.execute(
        "SELECT syncd.attach('items', metric => 'cosine', live => 'NOT gone', "
        "columns => ARRAY['lang'])"
    )
    daemon.settings["verify_seconds"] = 0
    return daemon.start()


@pytest.fixture(scope="module")
def two_phase(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server that allows PREPARE TRANSACTION."""
    with PostgresServer(
        18, tmp_path_factory.mktemp("two_phase"), settings={"max_prepared_transactions": "5"}
    ) as server:
        prepare(server, pgvector=False)
        yield server
