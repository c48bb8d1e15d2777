"""A progress bar for the service's long work, if stderr is a terminal.

It shows the rows that are done, the speed, and the time that remains.
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
from syncd.protocol.status_messages import Work

LOOK_SECONDS = 0.2


class Rate(ProgressColumn):
    """A column with the rows per second."""

    def render(self, task: Task) -> Text:
        """The text of the column; empty before the first rows."""
        return Text(f"{task.speed:,.0f} rows/s" if task.speed else "")


@contextmanager
def progress(client: Client, what: str) -> Iterator[None]:
    """Show the service's progress, read over another connection, while the block waits for it."""
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
    """Draw the service's work of this kind, until ``done``."""
    task = bar.add_task(what, total=None, count="")
    while not done.is_set():
        with suppress(SyncdError):  # the command itself reports the error
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
    """Text of the rows that are done, and of the expected total."""
    total = f"/{max(work.expected, work.rows):,}" if work.expected else ""
    return f"{work.rows:,}{total} rows"


def in_words(work: Work) -> str:
    """One line for a piece of work."""
    return f"{work.what} {work.name}".strip() + f": {count(work)}"


class Pace:
    """Speed of each piece of work since it was first seen, and the time that remains."""

    def __init__(self) -> None:
        self.first: dict[tuple[str, str], tuple[float, int]] = {}

    def in_words(self, works: Sequence[Work], now: float) -> list[str]:
        """One line per piece of work; ``now`` is in seconds of any clock."""
        before, self.first = self.first, {}
        lines = []
        for work in works:
            key = (work.what, work.name)
            since, rows = before.get(key, (now, work.rows))
            if work.rows < rows:  # it has begun again
                since, rows = now, work.rows
            self.first[key] = (since, rows)
            line = in_words(work)
            if work.rows > rows and now > since:
                speed = (work.rows - rows) / (now - since)
                line += f", {speed:,.0f} rows/s"
                if work.expected > work.rows:
                    seconds = round((work.expected - work.rows) / speed)
                    line += f", {timedelta(seconds=seconds)} left"
            lines.append(line)
        return lines
