"""A bar for long work of the service: how much is done, how fast, and how long it will take. Only
where stderr is a terminal.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from syncd.client.client import Client
from syncd.errors import SyncdError
from syncd.protocol.messages import Work

LOOK_SECONDS = 0.2


class Rate(ProgressColumn):
    """Rows a second."""

    def render(self, task: Task) -> Text:
        """Nothing before the first rows."""
        return Text(f"{task.speed:,.0f} rows/s" if task.speed else "")


@contextmanager
def progress(client: Client, what: str) -> Iterator[None]:
    """While the block waits for the service, ask it on another connection how far it is."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    done = threading.Event()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        Rate(),
        TimeRemainingColumn(),
    )
    with client, Progress(*columns, console=console, transient=True) as bar:
        looking = threading.Thread(target=follow, args=[client, what, bar, done])
        looking.start()
        try:
            yield
        finally:
            done.set()
            looking.join()


def follow(client: Client, what: str, bar: Progress, done: threading.Event) -> None:
    """Draw what the service says of its work, until ``done``."""
    task = bar.add_task(what, total=None, count="")
    while not done.is_set():
        with suppress(SyncdError):  # the command itself says what is wrong
            for work in client.status().work:
                if work.what == what:
                    total = max(work.expected, work.rows) if work.expected else None
                    bar.update(
                        task,
                        description=f"{what} {work.name}".strip(),
                        completed=work.rows,
                        total=total,
                        count=count(work),
                    )
        done.wait(LOOK_SECONDS)


def count(work: Work) -> str:
    """How many rows of how many."""
    return (
        f"{work.rows:,}"
        + (f"/{max(work.expected, work.rows):,}" if work.expected else "")
        + " rows"
    )


def in_words(work: Work) -> str:
    """The same without a bar."""
    return f"{work.what} {work.name}".strip() + f": {count(work)}"


class Pace:
    """How fast each piece of work has gone since it was first seen, and how long the rest will take
    at that.
    """

    def __init__(self) -> None:
        self.first: dict[tuple[str, str], tuple[float, int]] = {}

    def in_words(self, works: Sequence[Work], now: float) -> list[str]:
        """A line for each; ``now`` is in seconds, since whenever."""
        before, self.first = self.first, {}
        lines = []
        for work in works:
            key = (work.what, work.name)
            since, rows = before.get(key, (now, work.rows))
            if work.rows < rows:  # begun anew
                since, rows = now, work.rows
            self.first[key] = (since, rows)
            line = in_words(work)
            if work.rows > rows and now > since:
                speed = (work.rows - rows) / (now - since)
                line += f", {speed:,.0f} rows/s"
                if work.expected > work.rows:
                    line += (
                        f", {timedelta(seconds=round((work.expected - work.rows) / speed))} left"
                    )
            lines.append(line)
        return lines
