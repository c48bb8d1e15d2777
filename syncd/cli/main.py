"""The command line: registers every command."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from syncd.cli import ask, bench, cluster, config, diagnose, quickstart, schema, serve
from syncd.cli.output import errors_reported
from syncd.log import configure_logging

app = typer.Typer(
    name="syncd",
    help="Vector search that is provably in step with PostgreSQL.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for command in (
    schema.init,
    schema.attach,
    schema.detach,
    serve.serve,
    serve.route,
    ask.search,
    ask.status,
    ask.datasets,
    ask.recall,
    ask.verify,
    ask.rebuild,
    ask.checkpoint,
    diagnose.check,
    diagnose.why,
    quickstart.quickstart,
    config.config,
    ask.healthcheck,
    schema.uninstall,
):
    app.command()(command)
app.add_typer(bench.bench, name="bench")
app.add_typer(cluster.cluster, name="cluster")


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
