"""``syncd quickstart``: shows syncd at work in a few seconds, with a PostgreSQL of its own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from syncd import process
from syncd.cli.options import DataDir
from syncd.cli.output import print_table, talk
from syncd.cli.session import database
from syncd.client.client import Client
from syncd.postgres import schema
from syncd.postgres.connection import open_session
from syncd.settings import Settings, load_settings
from syncd.statements import statement

QUERY = [220.0, 20.0, 60.0]


def quickstart(data_dir: DataDir = None) -> None:
    """Start a PostgreSQL, put vectors into a table, search them, change a row, and search again.

    Example: syncd quickstart
    """
    settings = load_settings(data_dir=data_dir)
    with database(settings, embedded=True) as found:
        talk(f"PostgreSQL is running in {settings.data_dir / 'postgres'}")
        schema.install(found.conninfo)
        with open_session(found.conninfo) as connection:
            for name in ("create_table", "empty_table", "insert_rows", "attach"):
                run(connection, name)
            with serving(found), Client(settings.socket_path) as client:
                search(client)
                for name in ("update_row", "delete_row"):
                    show_change(connection, client, name)
    talk("\nNow your own table. With SYNCD_DSN set to your database:")
    talk("  syncd init && syncd attach YOUR_TABLE && syncd serve")


def show_change(connection: psycopg.Connection, client: Client, name: str) -> None:
    """Change a row, search again, and print how long after the commit the answer had the change."""
    run(connection, name)
    committed = time.perf_counter()
    row = connection.execute(statement("quickstart", "token")).fetchone()
    assert row is not None
    client.search("colours", QUERY, k=1, after=row[0])
    milliseconds = (time.perf_counter() - committed) * 1000
    talk(f"-- committed; the index had it {milliseconds:.1f} ms later")
    search(client)


def run(connection: psycopg.Connection, name: str) -> None:
    """Print a statement and run it."""
    text = statement("quickstart", name)
    talk(f"\n{text.splitlines()[0]}{' ...' if chr(10) in text else ''}")
    connection.execute(text)


def search(client: Client) -> None:
    """Search and print the colours nearest to crimson."""
    hits = client.search("colours", QUERY, k=3)
    talk(f"\nsyncd search colours --vector '{[int(value) for value in QUERY]}' -k 3")
    print_table(["key", "distance"], [(hit.key, f"{hit.distance:.2f}") for hit in hits])
    sys.stdout.flush()


@contextmanager
def serving(settings: Settings) -> Iterator[None]:
    """Run ``syncd serve`` until the block ends."""
    environment = {
        **os.environ,
        "SYNCD_DSN": settings.conninfo,
        "SYNCD_DATA_DIR": str(settings.data_dir),
        "SYNCD_READERS": "0",
    }
    with process.serve(environment, settings.data_dir / "serve.log"):
        talk(f"\nsyncd serve\nready {settings.socket_path}")
        yield
