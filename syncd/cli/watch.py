"""``syncd status --watch``: the service and its datasets, drawn again every second."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import suppress

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from syncd.cli.output import print_json
from syncd.cli.progress import Pace
from syncd.client.client import Client
from syncd.errors import ServiceUnavailable, TimedOut
from syncd.ops.findings import since
from syncd.protocol.messages import DatasetStatus, ServiceStatus

WATCH_SECONDS = 1.0
COLUMNS = ("dataset", "state", "rows", "tombstones", "index", "recall", "MB", "lag s", "in sync")
WORK_SHOWN = 5
LEFT = 2
"""Columns that hold words."""


Found = tuple[ServiceStatus, list[DatasetStatus]]


def watch(client: Client, *, json: bool) -> None:
    """Until it is interrupted. A service that is not there at the start is an error; one that goes
    away is waited for.
    """
    found = look(client)
    with suppress(KeyboardInterrupt):
        if json:
            while True:
                print_json({"status": found[0], "datasets": found[1]})
                sys.stdout.flush()
                time.sleep(WATCH_SECONDS)
                found = look(client)
        console = Console()
        if (
            not console.is_terminal
        ):  # a pipe or a file gets every frame whole, at once, one after the other
            for frame in frames(client, found, sys.maxsize):
                Console(width=10_000).print(frame, soft_wrap=True)
                sys.stdout.flush()
        with Live(console=console, auto_refresh=False) as live:
            for frame in frames(client, found, console.height):
                live.update(frame, refresh=True)


def look(client: Client) -> Found:
    """The service and its datasets."""
    return client.status(), client.datasets()


def frames(client: Client, found: Found, height: int) -> Iterator[Group]:
    """One a second; while the service does not answer, why, above what there was before."""
    lost, pace = "", Pace()
    while True:
        yield (
            Group(Text(lost, style="red"), drawn(*found, pace, height - 1))
            if lost
            else drawn(*found, pace, height)
        )
        time.sleep(WATCH_SECONDS)
        try:
            found, lost = look(client), ""
        except (ServiceUnavailable, TimedOut) as error:
            lost = f"{error.message}; what follows is as it was"


def drawn(status: ServiceStatus, datasets: list[DatasetStatus], pace: Pace, height: int) -> Group:
    """One screen: those datasets first that need a look."""
    tone = "green" if status.state == "ready" and not status.lag_seconds else "yellow"
    lines = [
        Text.assemble(
            (status.state, f"bold {tone}"),
            f"   consumer {status.consumer}   up {status.uptime_seconds:,.0f} s",
        ),
        Text(
            f"{status.lag_rows or 0:,} changes wait, {status.lag_seconds:.1f} s   quarantined "
            f"{status.quarantined:,}"
        ),
        Text(
            f"checkpoint {since(status.checkpoint.at)}",
            style="red" if status.checkpoint.error else "",
        ),
        Text(
            "\n".join(filter(None, (status.database_error, status.checkpoint.error))), style="red"
        ),
        *(
            Text(f"task {each.task} fails: {each.error}", style="red")
            for each in status.failing_tasks
        ),
        *map(Text, pace.in_words(status.work[:WORK_SHOWN], status.uptime_seconds)),
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < LEFT else "right", overflow="fold")
    room = max(height - len(lines) - 3, 1)
    for one in sorted(
        datasets, key=lambda one: (one.state == "ready" and not one.lag_seconds, one.dataset)
    )[:room]:
        table.add_row(
            Text(one.dataset),
            Text(one.state, style="green" if one.state == "ready" else "yellow"),
            f"{one.count:,}",
            f"{one.tombstones:,}",
            one.index or "",
            "" if one.recall is None else f"{one.recall:.3f}",
            f"{one.bytes / 1e6:,.1f}",
            f"{one.lag_seconds:.1f}",
            {None: "", True: "yes", False: "NO"}[one.in_sync],
        )
    left = len(datasets) - room
    return Group(*lines, table, Text(f"and {left:,} more: syncd datasets" if left > 0 else ""))
