"""Commands for all shards together: status, verify, reshard."""

from __future__ import annotations

from typing import Annotated

import typer

from syncd.cli.ask import print_verified
from syncd.cli.options import Dsn, Json
from syncd.cli.output import print_json, print_table, talk
from syncd.settings import load_settings
from syncd.shard import MOST_SHARDS

cluster = typer.Typer(
    name="cluster",
    help="Commands for all shards together.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


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
