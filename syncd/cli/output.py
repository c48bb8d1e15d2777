"""How commands speak: results on stdout, talk on stderr, and errors as what, why, next command."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import msgspec
import psycopg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from syncd.errors import SettingsError, SyncdError
from syncd.postgres.connection import as_database_error


def print_json(value: object) -> None:
    """A result for programs, on one line."""
    sys.stdout.write(msgspec.json.encode(value).decode() + "\n")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A result for people; text wider than the terminal is wrapped, never cut, and not at all where
    there is no terminal.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(
            *(Text("" if value is None else str(value)) for value in row)
        )  # as it is: no markup
    width = None if sys.stdout.isatty() else 10_000
    Console(file=sys.stdout, width=width, soft_wrap=width is None).print(table)


def talk(text: str) -> None:
    """A remark beside the result."""
    sys.stderr.write(text + "\n")


@contextmanager
def errors_reported() -> Iterator[None]:
    """End the process with the contract's exit status when a command fails: 2 for a wrong setting,
    1 for everything else.
    """
    try:
        yield
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except psycopg.Error as error:
        report(as_database_error(error))
        sys.exit(1)
    except SyncdError as error:
        report(error)
        sys.exit(exit_status(error))
    except KeyboardInterrupt:
        sys.exit(130)


def exit_status(error: SyncdError) -> int:
    """2 for a wrong setting or wrong usage, 1 for everything else."""
    return 2 if isinstance(error, SettingsError) else 1


def report(error: SyncdError) -> None:
    """What and why, then the next step."""
    talk(f"error: {error.message}")
    if error.hint:
        talk(f"  next: {error.hint}")
