"""The command line: one module for each command, imported when the command runs."""

from __future__ import annotations

from collections import UserDict
from importlib import import_module
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from syncd.cli.output import errors_reported
from syncd.imports import without_collections
from syncd.log import configure_logging

MODULES = {
    "init": "schema",
    "attach": "schema",
    "detach": "schema",
    "serve": "serve",
    "route": "serve",
    "search": "ask",
    "status": "ask",
    "datasets": "ask",
    "recall": "ask",
    "verify": "ask",
    "rebuild": "ask",
    "checkpoint": "ask",
    "check": "diagnose",
    "why": "diagnose",
    "quickstart": "quickstart",
    "config": "config",
    "healthcheck": "ask",
    "uninstall": "schema",
    "bench": "bench",
    "cluster": "cluster",
}
"""Each command, in the order of the help, with the module of ``syncd.cli`` that has it.

A command's function has the command's name; of a command with subcommands, its ``Typer`` has it.
"""


class Commands(UserDict[str, Any]):
    """The commands by name, as typer makes them. A command's module is imported when it is read."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(MODULES))

    def __getitem__(self, name: str) -> Any:
        if self.data[name] is None:
            with without_collections():
                found = getattr(import_module(f"syncd.cli.{MODULES[name]}"), name)
            alone = typer.Typer(rich_markup_mode=None)
            if isinstance(found, typer.Typer):
                alone.add_typer(found, name=name)
            else:
                alone.command(name)(found)
            self.data[name] = typer.main.get_group(alone).commands[name]
        return self.data[name]


class Program(TyperGroup):
    """The program ``syncd``: a start imports what its own command needs, and no other module."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = Commands()


app = typer.Typer(
    cls=Program,
    name="syncd",
    help="Vector search that is provably in step with PostgreSQL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Vector search that is provably in step with PostgreSQL."""
    configure_logging()
    if show_version:
        print(version("syncd"))
        raise typer.Exit


def main() -> None:
    """Run the program ``syncd``."""
    with errors_reported():
        app()


if __name__ == "__main__":
    main()
