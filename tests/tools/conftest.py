"""Tools of other projects on a followed table: the packages of Debian's PostgreSQL 15."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.conftest import Servers, clone
from tests.daemon import Daemon
from tests.faults.altered import Followed, make_items, serving
from tests.servers import PostgresServer


@pytest.fixture
def debian(servers: Servers) -> PostgresServer:
    """PostgreSQL 15, the version of Debian's packages; it has no pgvector."""
    return servers.of(15)


@pytest.fixture
def database(debian: PostgresServer) -> Iterator[str]:
    """A fresh database with schema syncd; the connection string."""
    yield from clone(debian)


@pytest.fixture
def daemon(database: str, tmp_path: Path) -> Iterator[Daemon]:
    """A syncd for the test's database, not yet started.

    It never verifies by itself: that would repair rows that it missed.
    """
    it = Daemon(database, tmp_path / "data", verify_seconds=0)
    yield it
    if it.process is not None:
        it.kill()


@pytest.fixture
def extension(db: psycopg.Connection) -> Callable[[str, str], None]:
    """Create an extension; skips the test if its Debian package is not installed."""

    def create(name: str, package: str) -> None:
        if (
            db.execute("SELECT FROM pg_available_extensions WHERE name = %s", [name]).fetchone()
            is None
        ):
            pytest.skip(f"needs {name}: apt-get install {package}")
        db.execute(f"CREATE EXTENSION {name}".encode())

    return create


@pytest.fixture
def followed(db: psycopg.Connection, daemon: Daemon) -> Iterator[Followed]:
    """Table ``items`` with a ``real[]`` vector, and a service that has caught up with it."""
    make_items(db, vector="real[]")
    with serving(db, daemon) as it:
        it.in_step()
        yield it
        daemon.stop()
