"""Commands for all shards together: up, down, status, verify, reshard."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from syncd.cli.ask import print_verified
from syncd.cli.options import DataDir, Dsn, Json
from syncd.cli.output import print_json, print_table, talk
from syncd.errors import RayUnavailable
from syncd.settings import load_settings
from syncd.shard import MOST_SHARDS

LOCAL = "local"
DEFAULT_MEMORY_GB = 0.5

Address = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of Ray's head, or local: a Ray of syncd's own on this machine.",
        show_default="RAY_ADDRESS, local",
    ),
]

cluster = typer.Typer(
    name="cluster",
    help="Commands for all shards together.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@cluster.command()
def up(
    shards: Annotated[int, typer.Option(min=1, max=MOST_SHARDS, help="Number of shards.")],
    replicas: Annotated[int, typer.Option(min=1, max=26, help="Replicas of each shard.")] = 1,
    address: Address = None,
    memory_gb: Annotated[
        float, typer.Option(min=0.01, help="Memory that Ray reserves for each process, in GB.")
    ] = DEFAULT_MEMORY_GB,
    data_dir: DataDir = None,
    dsn: Dsn = None,
) -> None:
    """Have Ray start the shards that do not run yet, and return when all are ready.

    Doing it again changes nothing. It needs the extra ray: pip install 'syncd[ray]'

    Example: syncd cluster up --shards 3 --address local
    """
    from syncd.cluster import ray, starting  # imported here, as in status
    from syncd.cluster.local_head import LocalHead

    settings = load_settings(dsn=dsn, data_dir=data_dir)
    where = address or os.environ.get("RAY_ADDRESS") or LOCAL
    local = where == LOCAL
    if not local:
        ray.check_address(where)
    base = settings.data_dir if local else data_dir  # SYNCD_DATA_DIR is of this machine
    places = starting.places_of(settings, shards, replicas, base, local=local)
    starting.check_database(settings)
    if local:
        where = LocalHead(settings.data_dir).start(talk)
    with ray.connected(where, settings.data_dir if local else None) as engine:
        memory_bytes = int(memory_gb * 1e9)
        answers = starting.up(engine, settings, places, memory_bytes, talk, apart=not local)
    if answers:
        talk(f"the {shards} shards are ready\n  next: syncd route --listen 127.0.0.1:7432")


@cluster.command()
def down(
    shards: Annotated[
        int | None, typer.Option(min=1, help="Only the layout of this many shards.")
    ] = None,
    address: Address = None,
    data_dir: DataDir = None,
    dsn: Dsn = None,
) -> None:
    """Stop every shard of the database, also if Ray or some of its machines are lost.

    Indexes and positions stay: syncd cluster up goes on from them.

    Example: syncd cluster down --address local
    """
    from syncd.cluster import ray, starting
    from syncd.cluster.local_head import LocalHead

    settings = load_settings(dsn=dsn, data_dir=data_dir)
    where = address or os.environ.get("RAY_ADDRESS") or LOCAL
    head = LocalHead(settings.data_dir) if where == LOCAL else None
    stopped: set[str] = set()
    left: set[str] = set()
    if head is None:
        ray.check_address(where)
    found = where if head is None else head.address()
    if found is not None:
        try:
            with ray.connected(found, None if head is None else settings.data_dir) as engine:
                stopped = starting.stop_kept(engine, shards)
                left = engine.names()
        except RayUnavailable as error:
            talk(f"{error.message}: its processes are stopped without it")
    if head is not None:
        if not left:
            head.stop()
        stopped |= starting.end_here(settings.data_dir, shards)
    still = starting.take_names(settings, shards, stopped, talk)
    if still:
        talk(f"error: these have not ended yet: {'; '.join(still)}")
        talk("  next: end them on their machines; their names are taken, so they end when they run")
        raise typer.Exit(1)


@cluster.command()
def status(dsn: Dsn = None, json: Json = False) -> None:
    """Print each shard with its address, state and position. Exit 1 if one does not answer.

    Example: syncd cluster status
    """
    from syncd.cluster.operating import look  # imported here: it loads the driver

    found = look(load_settings(dsn=dsn))
    if json:
        print_json(found)
    else:
        print_table(
            ["shard", "consumer", "address", "state", "lag seconds", "position", ""],
            [
                (
                    each.shard,
                    each.consumer,
                    each.address,
                    each.state or "does not answer",
                    None if each.lag_seconds is None else round(each.lag_seconds, 3),
                    None if each.position is None else each.position.snapshot,
                    each.error or note,
                )
                for some, note in ((found.shards, ""), (found.others, "of another layout"))
                for each in some
            ],
        )
        if not found.layout:
            talk("no shard has registered\n  next: syncd serve --shard 0/3")
    if not found.is_whole:
        raise typer.Exit(1)


@cluster.command()
def verify(
    deep: Annotated[
        bool, typer.Option("--deep", help="Compare the vectors too, not only fingerprints.")
    ] = False,
    dsn: Dsn = None,
    json: Json = False,
) -> None:
    """Compare every replica of every shard with its part of the tables. Exit 0 if all are equal.

    It also checks that the shards have every key, and none of them twice.

    Example: syncd cluster verify
    """
    from syncd.cluster.operating import verify as verify_all

    print_verified([verify_all(load_settings(dsn=dsn), deep=deep)], json=json)


@cluster.command()
def reshard(
    shards: Annotated[int, typer.Argument(min=1, max=MOST_SHARDS, help="Number of shards.")],
    dsn: Dsn = None,
) -> None:
    """Let another number of shards answer: wait until all are ready, verify them, and swap.

    Start the new shards alongside the present ones: syncd serve --shard 0/6, and so on. The present
    shards answer until the swap. The command may be stopped and run again.

    Example: syncd cluster reshard 6
    """
    from syncd.cluster.operating import reshard as swap

    if not swap(load_settings(dsn=dsn), shards, talk):
        raise typer.Exit(1)
