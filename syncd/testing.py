"""A PostgreSQL and a syncd for the tests of a program that uses syncd; both are gone when the tests end.

Nothing of the tester's own is used: no database, no ``SYNCD_*`` or ``PG*`` variable, no ``syncd.toml``.
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

SERVER_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "50", "shared_buffers": "32MB"}


@dataclass(frozen=True, slots=True)
class Throwaway:
    """A running PostgreSQL with schema ``syncd``, and a running syncd that follows it."""

    dsn: str
    """How libpq reaches the database; its user may do anything there."""
    socket: Path
    """Where the syncd listens."""

    def client(self) -> Client:
        """A new client, for use with ``with``."""
        return Client(self.socket)

    def catch_up(self) -> None:
        """Return once every transaction that has committed by now can be found by searches."""
        with connect_blocking(self.dsn) as connection, self.client() as client:
            row = connection.execute(statement("apps", "token")).fetchone()
            assert row is not None
            connection.commit()  # the token is visible, and with it all that committed before it was taken
            client.wait(row[0])


@contextmanager
def throwaway(prepare: Callable[[str], None] | None = None, **settings: object) -> Iterator[Throwaway]:
    """Start both, and remove them at the end of the block: a few seconds. Needs ``pip install 'syncd[embedded]'``.

    ``prepare`` gets the DSN before syncd starts: there a program runs its own migrations. ``settings`` are syncd's, such as
    ``poll_seconds=0.1``.
    """
    with tempfile.TemporaryDirectory(prefix="syncd-") as name:
        folder = Path(name)
        with EmbeddedPostgres(folder, SERVER_SETTINGS) as server:
            schema.install(server.conninfo)
            if prepare is not None:
                prepare(server.conninfo)
            mine = {"dsn": server.conninfo, "data_dir": folder / "data", "socket": folder / "s", "http": "off"}
            environment = {
                variable: value for variable, value in os.environ.items() if not variable.startswith(("SYNCD_", "PG"))
            } | {f"SYNCD_{setting.upper()}": str(value) for setting, value in (mine | settings).items()}
            with process.serve(environment, folder / "serve.log", folder):
                yield Throwaway(server.conninfo, folder / "s")
