"""A temporary PostgreSQL and syncd, for the tests of a program that uses syncd.

Both are removed when the tests end. They do not use a developer's own database, ``SYNCD_*`` or
``PG*`` variables, or ``syncd.toml``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from syncd import process
from syncd.client.client import Client
from syncd.postgres import schema
from syncd.postgres.connection import connect_blocking
from syncd.postgres.embedded.embedded import EmbeddedPostgres
from syncd.statements import statement

SERVER_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "max_connections": "50",
    "shared_buffers": "32MB",
}


@dataclass(frozen=True, slots=True)
class Throwaway:
    """A running PostgreSQL with schema ``syncd``, and a running syncd that follows it."""

    dsn: str
    """libpq connection string of the database; its user is a superuser."""
    socket: Path
    """Unix socket of the service."""

    def client(self) -> Client:
        """A new client, for use with ``with``."""
        return Client(self.socket)

    def catch_up(self) -> None:
        """Return when searches find the rows of every transaction that has committed by now."""
        with connect_blocking(self.dsn) as connection, self.client() as client:
            row = connection.execute(statement("apps", "token")).fetchone()
            assert row is not None
            # the token's transaction is visible now, and so are all that committed before it
            connection.commit()
            client.wait(row[0])


@contextmanager
def throwaway(
    prepare: Callable[[str], None] | None = None,
    **settings: object,
) -> Iterator[Throwaway]:
    """Start PostgreSQL and syncd, and remove them at the end of the block.

    This takes a few seconds, and needs ``pip install 'syncd[embedded]'``. ``prepare`` gets the DSN
    before syncd starts: there a program runs its own migrations. ``settings`` are syncd's, such as
    ``poll_seconds=0.1``.
    """
    with tempfile.TemporaryDirectory(prefix="syncd-") as name:
        folder = Path(name)
        with EmbeddedPostgres(folder, SERVER_SETTINGS) as server:
            schema.install(server.conninfo)
            if prepare is not None:
                prepare(server.conninfo)
            mine = {
                "dsn": server.conninfo,
                "data_dir": folder / "data",
                "socket": folder / "s",
                "http": "off",
                "readers": 0,  # they would only make each start slower
            }
            given = mine | settings
            other = {k: v for k, v in os.environ.items() if not k.startswith(("SYNCD_", "PG"))}
            own = {f"SYNCD_{name.upper()}": str(value) for name, value in given.items()}
            environment = other | own
            with process.serve(environment, folder / "serve.log", folder):
                yield Throwaway(server.conninfo, folder / "s")
