"""``syncd status --watch``: the service and its datasets, refreshed every second."""

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
from syncd.ops.amounts import since
from syncd.protocol.status_messages import DatasetStatus, ServiceStatus

WATCH_SECONDS = 1.0
COLUMNS = ("dataset", "state", "rows", "tombstones", "index", "recall", "MB", "lag s", "in sync")
WORK_SHOWN = 5
LEFT = 2
"""Number of left-aligned columns: the first ones, which have text."""

Found = tuple[ServiceStatus, list[DatasetStatus]]


def watch(client: Client, *, json: bool) -> None:
    """Draw until interrupted.

    Raises ``ServiceUnavailable`` if no service answers at the start. If it stops answering later,
    this waits for it.
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
        if not console.is_terminal:  # a pipe or a file gets every frame, unshortened, at once
            for frame in frames(client, found, sys.maxsize):
                Console(width=10_000).print(frame, soft_wrap=True)
                sys.stdout.flush()
        with Live(console=console, auto_refresh=False) as live:
            for frame in frames(client, found, console.height):
                live.update(frame, refresh=True)


def look(client: Client) -> Found:
    """The state of the service and of its datasets."""
    return client.status(), client.datasets()


def frames(client: Client, found: Found, height: int) -> Iterator[Group]:
    """One frame per second; if the service does not answer, the error above the last state."""
    lost, pace = "", Pace()
    while True:
        if lost:
            yield Group(Text(lost, style="red"), drawn(*found, pace, height - 1))
        else:
            yield drawn(*found, pace, height)
        time.sleep(WATCH_SECONDS)
        try:
            found, lost = look(client), ""
        except (ServiceUnavailable, TimedOut) as error:
            lost = f"{error.message}; this is the last known state:"


def drawn(status: ServiceStatus, datasets: list[DatasetStatus], pace: Pace, height: int) -> Group:
    """One frame: datasets that are not ready, or behind, come first."""
    tone = "green" if status.state == "ready" and not status.lag_seconds else "yellow"
    checkpoint, failing = status.checkpoint, status.failing_tasks
    lines = [
        Text.assemble(
            (status.state, f"bold {tone}"),
            f"   consumer {status.consumer}   up {status.uptime_seconds:,.0f} s",
        ),
        Text(
            f"{status.lag_rows or 0:,} changes wait, {status.lag_seconds:.1f} s   "
            f"quarantined {status.quarantined:,}"
        ),
        Text(f"checkpoint {since(checkpoint.at)}", style="red" if checkpoint.error else ""),
        Text("\n".join(filter(None, (status.database_error, checkpoint.error))), style="red"),
        *(Text(f"task {one.task} fails: {one.error}", style="red") for one in failing),
        *map(Text, pace.in_words(status.work[:WORK_SHOWN], status.uptime_seconds)),
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if number < LEFT else "right", overflow="fold")
    room = max(height - len(lines) - 3, 1)

    def urgency(one: DatasetStatus) -> tuple[bool, str]:
        return one.state == "ready" and not one.lag_seconds, one.dataset

    for one in sorted(datasets, key=urgency)[:room]:
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
