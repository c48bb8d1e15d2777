"""Fixtures of several files: a table, a service that follows it, a server behind a TCP port."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from tests.conftest import TEMPLATE, prepare
from tests.daemon import Daemon
from tests.faults import altered, rotation
from tests.faults.altered import Followed
from tests.faults.following import attach_tables
from tests.servers import PostgresServer

SHORT_PAGES = ("syncd.sync.source.scan.PAGE_ROWS", (10, 10, 10))
"""Pages so short that a comparison of the small table takes many passes, and readers meet it."""
ONE_WHOLE_LOOK = ("syncd.sync.source.looking.LOOK_SECONDS", 3600.0)
"""After the first pass, the catalogue's facts are read only if a table's mark is another one."""


@pytest.fixture
def items(db: psycopg.Connection) -> psycopg.Connection:
    """Table ``items`` of ``tests.faults.rotation``, attached."""
    rotation.make_items(db)
    return db


@pytest.fixture
def followed(db: psycopg.Connection, daemon: Daemon) -> Iterator[Followed]:
    """Table ``items`` of ``tests.faults.altered``, and a service that has caught up with it."""
    altered.make_items(db)
    daemon.constants.update([SHORT_PAGES, ONE_WHOLE_LOOK])
    with altered.serving(db, daemon) as it:
        it.in_step()
        yield it
        daemon.stop()


@pytest.fixture(scope="module")
def tcp_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server behind a TCP port that tests may restart."""
    with PostgresServer(18, tmp_path_factory.mktemp("links"), tcp=True) as server:
        prepare(server, pgvector=True)
        yield server


@pytest.fixture
def direct(tcp_server: PostgresServer, request: pytest.FixtureRequest) -> Iterator[str]:
    """A database for one test, connected without the proxy."""
    name = f"links_{abs(hash(request.node.name)) % 10**9}"
    conninfo = tcp_server.create_database(name, TEMPLATE)
    attach_tables(conninfo)
    yield conninfo
    tcp_server.drop_database(name)
