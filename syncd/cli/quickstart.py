"""``syncd quickstart``: shows syncd at work in a few seconds, with a PostgreSQL of its own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Annotated

import psycopg
import typer

from syncd import process
from syncd.cli.options import DataDir
from syncd.cli.output import print_table, talk
from syncd.cli.session import database
from syncd.client.client import Client
from syncd.postgres import schema
from syncd.postgres.connection import connect_blocking, open_session
from syncd.settings import SOCKET_NAME, Settings, load_settings, name_of_shard
from syncd.shard import Shard
from syncd.statements import statement

QUERY = [220.0, 20.0, 60.0]
MOST_SHARDS_HERE = 16
"""Largest number of shards: each one is a process on this machine."""


def quickstart(
    data_dir: DataDir = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_SHARDS_HERE, help="Share the rows among this many syncds."),
    ] = None,
) -> None:
    """Start a PostgreSQL, put vectors into a table, search them, change a row, and search again.

    With --shards, several syncds share the rows, and syncd route asks them all.

    Example: syncd quickstart
    """
    settings = load_settings(data_dir=data_dir)
    with database(settings, embedded=True) as found:
        talk(f"PostgreSQL is running in {settings.data_dir / 'postgres'}")
        schema.install(found.conninfo)
        with open_session(found.conninfo) as connection:
            for name in ("create_table", "empty_table", "insert_rows", "attach"):
                run(connection, name)
            with serving(found, shards), Client(settings.socket_path) as client:
                search(client)
                for name in ("update_row", "delete_row"):
                    show_change(connection, client, name)
    talk("\nNow your own table. With SYNCD_DSN set to your database:")
    serve = "serve" if shards is None else f"cluster up --shards {shards}"
    talk(f"  syncd init && syncd attach YOUR_TABLE && syncd {serve}")


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
def serving(settings: Settings, shards: int | None) -> Iterator[None]:
    """Run ``syncd serve``, or shards and their router, until the block ends."""
    environment = {
        **os.environ,
        "SYNCD_DSN": settings.conninfo,
        "SYNCD_DATA_DIR": str(settings.data_dir),
        "SYNCD_READERS": "0",
    }
    if shards is None:
        with process.serve(environment, settings.data_dir / "serve.log"):
            talk(f"\nsyncd serve\nready {settings.socket_path}")
            yield
        return
    with ExitStack() as running:
        talk("")
        serve_shards(running, environment, settings, shards)
        with connect_blocking(settings.conninfo) as connection:
            connection.execute(statement("cluster", "swap_layout"), [shards])
        environment["SYNCD_SOCKET"] = str(settings.socket_path)
        running.enter_context(
            process.serve(environment, settings.data_dir / "route.log", arguments=["route"])
        )
        talk(f"syncd route\nready {settings.socket_path}")
        yield


def serve_shards(
    running: ExitStack, environment: Mapping[str, str], settings: Settings, shards: int
) -> None:
    """Start all shards, each in a directory of its own."""
    for number in range(shards):
        shard = Shard(shards, number)
        folder = settings.data_dir / name_of_shard(shard, "")
        mine = {**environment, "SYNCD_DATA_DIR": str(folder), "SYNCD_HTTP": "off"}
        mine.pop("SYNCD_SOCKET", None)
        folder.mkdir(parents=True, exist_ok=True)
        arguments = ["serve", "--shard", shard.name]
        running.enter_context(process.serve(mine, folder / "serve.log", arguments=arguments))
        talk(f"syncd {' '.join(arguments)} --data-dir {folder}\nready {folder / SOCKET_NAME}")
