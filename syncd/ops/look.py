"""What checks look at: the database, the machine, and the running service where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from syncd.client.client import Client
from syncd.errors import SyncdError
from syncd.postgres import session
from syncd.postgres.catalogue import shell_line
from syncd.postgres.connection import connect_blocking
from syncd.postgres.source import Source
from syncd.protocol.messages import DatasetStatus, ServiceStatus
from syncd.settings import Settings
from syncd.statements import statement

SERVICE_TIMEOUT_SECONDS = 10.0
FAILURES_ASKED = 20
"""Of so many failed sources the service is asked what it knows."""


@dataclass(frozen=True, slots=True)
class Service:
    """What the running service says of itself; ``error`` where none answers."""

    status: ServiceStatus | None
    datasets: Sequence[DatasetStatus]
    error: SyncdError | None = None
    commands: Mapping[str, str] = field(default_factory=dict)
    """By source: the command that attaches it as its columns are called now, where the service has named one."""


@dataclass(slots=True)
class Look:
    """One inspection. Each statement has a transaction of its own, so that a check that fails does not spoil the next."""

    settings: Settings
    service: Service
    connection: psycopg.Connection
    role: str = ""
    sources: Sequence[Source] = ()
    arguments: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    table_rows: Mapping[int, int] = field(default_factory=dict)
    """The server's estimate of each source's rows, 0 where it has none."""
    dimensions: dict[int, int] = field(default_factory=dict)
    """Of the sources that declare none, that of most of the rows seen."""

    def rows(
        self, name: str, parameters: Sequence[object] | Mapping[str, object] | None = None
    ) -> list[Any]:
        """The rows of a statement of ``queries/check.sql``."""
        with self.transaction():
            return self.connection.execute(statement("check", name), parameters).fetchall()

    def row(
        self, name: str, parameters: Sequence[object] | Mapping[str, object] | None = None
    ) -> Any:
        """Its only row, None where there is none."""
        found = self.rows(name, parameters)
        return found[0] if found else None

    def source_rows(self, query: sql.Composed) -> list[tuple[Any, ...]]:
        """The rows of a statement with a source's expressions in it, where a percent sign is a percent sign."""
        with self.transaction():
            return psycopg.RawCursor(self.connection).execute(query).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A short transaction that reads only and waits for nobody; nothing of it stays with the session."""
        with self.connection.transaction():
            limits = statement("check", "limits")
            self.connection.execute(";\n".join((session.service_settings(self.connection), limits)))
            yield

    def relations(self, sources: Sequence[Source]) -> list[int]:
        """The sources' tables, with every partition below them."""
        oids = [source.oid for source in sources if source.table is not None]
        return [*oids, *(leaf for _, leaf in self.rows("read_leaves", [oids]) if leaf not in oids)]

    def attach_with_present_columns(self, source: Source) -> str:
        """What attaches a source again that has lost a column: with its new name, where that is known or there is but one choice."""
        known = self.service.commands.get(source.name)
        if known:
            return known
        arguments = dict(self.arguments.get(source.id, {}))
        if self.row("read_vector_column", [source.oid, source.vector]) is None:
            candidates = [name for (name,) in self.rows("read_vector_candidates", [source.oid])]
            arguments["vector"] = (
                candidates[0]
                if len(candidates) == 1
                else f"COLUMN ({' or '.join(candidates) or 'of vectors'})"
            )
        else:
            return (
                f"{attach_command(source, arguments)}  # with the names that its columns have now"
            )
        return attach_command(source, arguments)

    def attach_command(self, source: Source, table: str | None = None, **others: object) -> str:
        """What attaches the source again as it is, which makes triggers that are missing and reads the table again; or another table like it."""
        return attach_command(source, {**self.arguments.get(source.id, {}), **others}, table)


@contextmanager
def looking(settings: Settings, service: Service) -> Iterator[Look]:
    """Open a connection to look through; raises ``DatabaseError``."""
    with connect_blocking(settings.conninfo) as connection:
        connection.rollback()
        connection.autocommit = True
        connection.read_only = True  # of the transactions
        connection.prepare_threshold = None  # a pooler may give each transaction another session
        yield Look(settings, service, connection)


def attach_command(source: Source, arguments: Mapping[str, Any], table: str | None = None) -> str:
    """The command with a source's own arguments, ready for a shell; what is a default is left out."""
    words = ["syncd", "attach", table or sql_name(source)]
    for name, default in (
        ("vector", ""),
        ("project", "'default'"),
        ("dataset", ""),
        ("live", "true"),
        ("metric", "cosine"),
    ):
        if arguments.get(name, default) not in (default, None):
            words += [f"--{name}", str(arguments[name])]
    for name, values in (
        ("key", arguments.get("key", ())),
        ("column", arguments.get("columns", ())),
    ):
        for value in values:
            words += [f"--{name}", str(value)]
    return shell_line([*words, *(["--row-triggers"] if arguments.get("row_triggers") else [])])


def sql_name(source: Source) -> str:
    """The table's name, in quotes where SQL wants them."""
    plain = all(
        part.isidentifier() and part == part.lower()
        for part in (source.schema or "", source.table or "")
    )
    return source.name if plain else source.identifier.as_string()


def attach_commands(fixes: Mapping[str, str]) -> dict[str, str]:
    """Of the commands that end the failures of sources, those that attach a source again."""
    return {source: fix for source, fix in fixes.items() if fix.startswith("syncd attach ")}


def ask_service(socket: Path | str) -> Service:
    """What the service on this socket answers, or why none does."""
    try:
        with Client(socket, timeout=SERVICE_TIMEOUT_SECONDS) as client:
            status, datasets = client.status(), client.datasets()
            failed = {row.source: row.dataset for row in datasets if row.state == "failed"}
            fixes = {
                source: client.why(dataset).fix
                for source, dataset in list(failed.items())[:FAILURES_ASKED]
            }
            return Service(status, datasets, commands=attach_commands(fixes))
    except SyncdError as error:
        return Service(None, (), error)
