"""The command that runs the service."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import anyio
import typer

from syncd.cli.options import DataDir, Dsn, Embedded
from syncd.cli.output import exit_status, report
from syncd.cli.session import database
from syncd.cores import has_uvloop
from syncd.errors import SyncdError
from syncd.imports import import_numpy, without_collections
from syncd.log import configure_logging
from syncd.settings import load_settings


def serve(
    dsn: Dsn = None,
    data_dir: DataDir = None,
    socket: Annotated[
        Path | None, typer.Option(help="RPC socket.", show_default="<data dir>/syncd.sock")
    ] = None,
    consumer: Annotated[
        str | None, typer.Option(help="Name of this syncd in the database.", show_default="default")
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="host:port for clients over TCP.", show_default="SYNCD_LISTEN, off"),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="Serve only shard i of n, as i/n, from 0.", show_default="all rows"),
    ] = None,
    replica: Annotated[
        str | None, typer.Option(help="Name of another syncd of the same shard, such as b.")
    ] = None,
    advertise: Annotated[
        str | None,
        typer.Option(
            help="host:port at which syncd route reaches this shard.", show_default="--listen"
        ),
    ] = None,
    embedded: Embedded = False,
    once: Annotated[
        bool, typer.Option("--once", help="Catch up, save a checkpoint and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
) -> None:
    """Keep the indexes in step with the tables, and answer searches.

    Example: SYNCD_DSN=postgresql://localhost/app syncd serve

    With --shard, several of them share the rows, and syncd route asks them all.
    """
    configure_logging(verbose=verbose)
    settings = load_settings(
        dsn=dsn,
        data_dir=data_dir,
        socket=socket,
        consumer=consumer,
        listen=listen,
        shard=shard,
        replica=replica,
        advertise=advertise,
    )
    with without_collections():
        import_numpy()
        from syncd import service  # imported here: other commands do not need FAISS

    try:
        with database(settings, embedded=embedded) as found:
            if embedded:
                from syncd.postgres import schema

                schema.install(found.conninfo)
            anyio.run(
                service.run_with,
                found,
                once,
                say,
                backend_options={"use_uvloop": has_uvloop()},
            )
        status = 0
    except SyncdError as error:
        report(error)
        status = exit_status(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a thread may still wait for a database that does not answer


def route(
    dsn: Dsn = None,
    listen: Annotated[
        str | None,
        typer.Option(help="host:port for clients over TCP.", show_default="SYNCD_LISTEN"),
    ] = None,
    socket: Annotated[
        Path | None, typer.Option(help="RPC socket.", show_default="SYNCD_SOCKET, none")
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log more.")] = False,
) -> None:
    """Answer from all shards: ask each one, and merge the answers. Clients need no change.

    The shards are those that have registered in the database; see syncd serve --shard.

    Example: SYNCD_TOKEN=secret syncd route --listen 127.0.0.1:7432
    """
    configure_logging(verbose=verbose)
    settings = load_settings(dsn=dsn, listen=listen, socket=socket)
    with without_collections():
        from syncd.cluster import serving  # imported here, as in serve

    try:
        anyio.run(serving.run, settings, say, backend_options={"use_uvloop": has_uvloop()})
        status = 0
    except SyncdError as error:
        report(error)
        status = exit_status(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def say(line: str) -> None:
    """Print a line at once, for the program that started the service."""
    print(line, flush=True)
