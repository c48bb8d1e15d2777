"""A PostgreSQL with dblink, a service that its statements can search, and rows for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import psycopg
from psycopg import sql

from syncd.postgres import schema
from syncd.postgres.embedded.programs import binaries
from tests.daemon import Daemon
from tests.servers import PLACES, PostgresServer, Version, free_port

WORD = "a-long-word ' with\\marks"
QUOTED_WORD = WORD.replace("\\", "\\\\").replace("'", "\\'")
ROWS = 400
PGVECTOR: Version = 18
"""The version that is given the wheel's pgvector, by PostgreSQL 18's search path of extensions."""


def programs_with_dblink() -> dict[Version, Path]:
    """The folders of programs, by version, of servers that have the extension dblink."""
    found: dict[Version, Path] = {}
    for version in get_args(Version):
        for place in PLACES:
            folder = Path(place) / str(version) / "bin"
            shares = (
                folder.parent / "share" / "postgresql",
                Path("/usr/share/postgresql") / str(version),
            )
            if (folder / "postgres").exists() and any(
                (share / "extension" / "dblink.control").exists() for share in shares
            ):
                found[version] = folder
                break
    return found


def settings_with_pgvector() -> dict[str, str]:
    """Settings by which version ``PGVECTOR`` finds the wheel's pgvector."""
    wheel = binaries(PGVECTOR).parent
    return {
        "extension_control_path": f"$system:{wheel}/share/postgresql",
        "dynamic_library_path": f"$libdir:{wheel}/lib/postgresql",
    }


@dataclass
class Way:
    """A database and a running service. ``conninfo`` is the superuser's."""

    server: PostgresServer
    conninfo: str
    daemon: Daemon
    port: int

    def connect(self, role: str = "app") -> psycopg.Connection:
        """A connection of a role, in autocommit mode."""
        return psycopg.connect(self.conninfo, user=role, autocommit=True)

    def rows(self, query: str, role: str = "app", *parameters: object) -> list[tuple[Any, ...]]:
        """The rows of a statement of a role."""
        with self.connect(role) as connection:
            return connection.execute(query.encode(), parameters or None).fetchall()

    def found(self, key: str, k: int, **params: Any) -> list[str]:
        """Keys that the RPC finds near a row."""
        with self.daemon.client() as client:
            return [str(hit.key) for hit in client.search("chunks", key=int(key), k=k, **params)]


@contextmanager
def searchable(
    version: Version, programs: Path, directory: Path, *, encoding: str = "UTF8"
) -> Iterator[Way]:
    """A server, a database of role ``app`` with chunks, and a service.

    Roles ``app`` and ``web`` may search, role ``other`` may not.
    """
    settings = settings_with_pgvector() if version == PGVECTOR else {}
    with PostgresServer(version, directory, programs=programs, settings=settings) as server:
        server.execute("CREATE ROLE app LOGIN; CREATE ROLE web LOGIN; CREATE ROLE other LOGIN")
        server.execute(
            sql.SQL(
                "CREATE DATABASE searched OWNER app TEMPLATE template0 ENCODING {} "
                "LC_COLLATE 'C' LC_CTYPE 'C'"
            ).format(encoding)
        )
        server.execute(
            'CREATE SCHEMA "my extensions"; CREATE EXTENSION dblink SCHEMA "my extensions"; '
            "GRANT USAGE ON FOREIGN DATA WRAPPER dblink_fdw TO app; "
            'GRANT USAGE ON SCHEMA "my extensions" TO app',
            "searched",
        )
        if version == PGVECTOR:
            server.execute("CREATE EXTENSION vector", "searched")
        conninfo = server.conninfo("searched")
        app = server.conninfo("searched", user="app")
        schema.install(app)
        with psycopg.connect(app, autocommit=True) as connection:
            fill(connection)
            port = free_port()
            connection.execute(
                "SELECT syncd.connect_search(%s, %s)",
                [f"host=127.0.0.1 port={port} password='{QUOTED_WORD}'", ["app", "web"]],
            )
        daemon = Daemon(app, directory / "data", sql_listen=f"127.0.0.1:{port}", token=WORD).start()
        try:
            yield Way(server, conninfo, daemon, port)
        finally:
            if daemon.process is not None:
                daemon.kill()


def fill(connection: psycopg.Connection) -> None:
    """Make the tables of the documentation's examples, with rows."""
    connection.execute(
        """
        CREATE TABLE authors (id bigint PRIMARY KEY, active boolean NOT NULL);
        INSERT INTO authors SELECT i, i % 2 = 0 FROM generate_series(0, 9) AS i;
        CREATE TABLE chunks (
            id bigint PRIMARY KEY, author bigint, lang text, owner text, body text,
            body_words tsvector GENERATED ALWAYS AS (to_tsvector('english', body)) STORED,
            embedding real[]);
        CREATE TABLE questions (id bigint PRIMARY KEY, embedding real[]);
        INSERT INTO questions VALUES (1, '{1,0,0}'), (2, '{0,1,0}'), (3, NULL);
        GRANT SELECT ON chunks, authors, questions TO web;
        """
    )
    connection.execute(
        sql.SQL(
            "INSERT INTO chunks (id, author, lang, owner, body, embedding) "
            "SELECT i, i % 10, (ARRAY['en', 'de'])[i % 2 + 1], "
            "(ARRAY['web', 'app', 'other'])[i % 3 + 1], "
            "CASE WHEN i % 5 = 0 THEN 'red apples ' ELSE 'green pears ' END || i, "
            "ARRAY[sin(i), cos(i), sin(i * i)] FROM generate_series(1, {}) AS i"
        ).format(ROWS)
    )
    connection.execute(
        "SELECT syncd.attach('chunks', metric => 'l2', columns => ARRAY['lang', 'owner'])"
    )
    connection.execute("ANALYZE")
