"""Output of commands: results on stdout, remarks and errors on stderr.

An error says what happened, and names the next command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncd.errors import SettingsError, SyncdError


def print_json(value: object) -> None:
    """Print a result as JSON, on one line."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a result as a table.

    Text that is wider than the terminal is wrapped, never cut. Without a terminal it is not
    wrapped.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        # Text: no markup in values
        table.add_row(*(Text("" if value is None else str(value)) for value in row))
    width = None if sys.stdout.isatty() else 10_000
    Console(file=sys.stdout, width=width, soft_wrap=width is None).print(table)


def talk(text: str) -> None:
    """Print a remark on stderr."""
    sys.stderr.write(text + "\n")


@contextmanager
def errors_reported() -> Iterator[None]:
    """Report a command's error and end the process: status 2 for a wrong setting, 1 for others."""
    try:
        yield
    except BrokenPipeError:  # the reader of our output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except SyncdError as error:
        report(error)
        sys.exit(exit_status(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        driver = sys.modules.get("psycopg")  # only a command that has loaded it gets its errors
        if driver is None or not isinstance(error, driver.Error):
            raise
        from syncd.postgres.connection import as_database_error

        report(as_database_error(error))
        sys.exit(1)


def exit_status(error: SyncdError) -> int:
    """Exit status: 2 for a wrong setting or wrong usage, 1 for all other errors."""
    return 2 if isinstance(error, SettingsError) else 1


def report(error: SyncdError) -> None:
    """Print an error, then the next step."""
    talk(f"error: {error.message}")
    if error.hint:
        talk(f"  next: {error.hint}")
