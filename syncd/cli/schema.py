"""Commands that change the database's schema: init, attach, detach, uninstall."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import psycopg
import typer

from syncd.cli.options import DataDir, Dsn, Embedded, Json
from syncd.cli.output import print_json, print_table, talk
from syncd.cli.session import database
from syncd.errors import DatabaseError
from syncd.postgres import schema
from syncd.postgres.catalogue import shell_line
from syncd.postgres.connection import connect_blocking
from syncd.postgres.publications import read_carriers
from syncd.settings import load_settings
from syncd.statements import statement

ATTACH = re.compile(r"SELECT \* FROM syncd\.attach\((.*?)\)(?:;$)?")
ARGUMENT = re.compile(r"(?:(\w+) => )?(?:ARRAY\[(.*?)\]|'((?:[^']|'')*)')")
LITERAL = re.compile(r"'((?:[^']|'')*)'")

Table = Annotated[
    str, typer.Argument(help="The table, with its schema if it is not on the search path.")
]


def init(
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    show_sql: Annotated[
        bool, typer.Option("--show-sql", help="Print the SQL instead of running it.")
    ] = False,
) -> None:
    """Install schema syncd, or upgrade it to this version. A second run changes nothing.

    Example: syncd init --dsn postgresql://localhost/app
    """
    if show_sql:
        print(schema.install_script())
        return
    settings = load_settings(dsn=dsn, data_dir=data_dir)
    with database(settings, embedded=embedded) as found:
        with connect_blocking(found.conninfo) as connection:
            carriers = read_carriers(connection)
        for each in carriers:  # before the installation: a subscriber may stop at once
            talk(f"warning: {each.problem}")
            talk(f"  next: {each.fix}")
        before, after = schema.install(found.conninfo)
        with connect_blocking(found.conninfo) as connection:
            schema.store_settings(connection, found)
    if before == after:
        talk(f"schema syncd is at {after}; nothing was changed")
    else:
        talk(f"schema syncd is at {after}" + (f"; it was at {before}" if before else ""))


def attach(
    table: Table,
    key: Annotated[
        list[str] | None,
        typer.Option(help="Key column; repeat for a composite key. Default: the primary key."),
    ] = None,
    vector: Annotated[
        str | None,
        typer.Option(help="Vector column. Default: embedding, or the only vector column."),
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="SQL expression over the row. Default: 'default'.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="SQL expression over the row. Default: the table's name.")
    ] = None,
    live: Annotated[
        str | None, typer.Option(help="SQL condition: which rows searches find. Default: true.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="cosine, l2 or ip. Default: cosine.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Column that searches may filter on; repeat for more.")
    ] = None,
    row_triggers: Annotated[
        bool,
        typer.Option(
            "--row-triggers",
            help="The table is written by an apply worker, which fires row triggers only.",
        ),
    ] = False,
    like_before: Annotated[
        bool,
        typer.Option(
            "--like-before",
            help="The table was dropped and created again: attach it with its previous arguments.",
        ),
    ] = False,
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    json: Json = False,
) -> None:
    """Follow a table. The same as SELECT * FROM syncd.attach(...), run as the table's owner.

    Example: syncd attach public.chunks --vector embedding --dataset "lang" --live "deleted_at IS
    NULL"
    """
    if like_before and any((key, vector, project, dataset, live, metric, column)):
        raise typer.BadParameter(
            "it takes the table's previous arguments, and no others",
            param_hint="--like-before",
        )
    settings = load_settings(dsn=dsn, data_dir=data_dir)
    with (
        database(settings, embedded=embedded) as found,
        hints_in_words_of_the_command_line(),
        connect_blocking(found.conninfo, own_forms=False) as connection,
    ):
        connection.add_notice_handler(show_notice)
        schema.check_usable(connection)
        row = connection.execute(
            statement("schema", "reattach" if like_before else "attach"),
            {
                "source": table,
                "key": key or None,
                "vector": vector,
                "project": project,
                "dataset": dataset,
                "live": live,
                "metric": metric,
                "columns": column or None,
                "row_triggers": row_triggers,
            },
        ).fetchone()
        assert row is not None
    rows, live_rows, datasets = row
    if json:
        print_json({"rows": rows, "live_rows": live_rows, "datasets": datasets})
    else:
        print_table(["rows", "live rows", "datasets"], [row])


def detach(
    table: Table, dsn: Dsn = None, data_dir: DataDir = None, embedded: Embedded = False
) -> None:
    """Stop following a table: removes its triggers and its datasets.

    Example: syncd detach public.chunks
    """
    settings = load_settings(dsn=dsn, data_dir=data_dir)
    with database(settings, embedded=embedded) as found:
        detached = schema.detach(found.conninfo, table)
    talk(f"{table} is detached" if detached else f"{table} was not attached")


def uninstall(
    dsn: Dsn = None,
    data_dir: DataDir = None,
    embedded: Embedded = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove every trigger and schema syncd, with the table syncd.embeddings and its rows.

    Example: syncd uninstall --yes
    """
    if not yes:
        talk("Remove schema syncd, all triggers, and the rows of syncd.embeddings? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            talk("nothing was changed")
            raise typer.Exit(1)
    settings = load_settings(dsn=dsn, data_dir=data_dir)
    with database(settings, embedded=embedded) as found:
        removed = schema.uninstall(found.conninfo)
    talk("schema syncd is removed" if removed else "there is no schema syncd")


def show_notice(notice: psycopg.errors.Diagnostic) -> None:
    """Print a notice of the server, with its hint."""
    talk(f"{(notice.severity or 'notice').lower()}: {notice.message_primary}")
    if notice.message_hint:
        talk(f"  next: {in_words_of_the_command_line(notice.message_hint)}")


@contextmanager
def hints_in_words_of_the_command_line() -> Iterator[None]:
    """Rewrite the SQL in the server's hints as ``syncd attach`` commands, which the user types."""
    try:
        yield
    except DatabaseError as error:
        error.hint = in_words_of_the_command_line(error.hint)
        raise


def in_words_of_the_command_line(hint: str) -> str:
    """Rewrite ``SELECT * FROM syncd.attach('t', key => ARRAY['a']);`` as ``syncd attach t …``."""
    return ATTACH.sub(lambda call: shell_line(["syncd", "attach", *arguments_of(call[1])]), hint)


def arguments_of(call: str) -> Iterator[str]:
    """Command line arguments for the arguments of ``syncd.attach``."""
    for name, array, literal in ARGUMENT.findall(call):
        option = {"": [], "columns": ["--column"]}.get(name, [f"--{name}"])
        for value in LITERAL.findall(array) if array else [literal]:
            yield from (*option, value.replace("''", "'"))
    if "row_triggers => true" in call:
        yield "--row-triggers"
