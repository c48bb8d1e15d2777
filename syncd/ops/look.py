"""Subjects of the checks: the database, the machine, and the running service if there is one."""

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
from syncd.protocol.status_messages import DatasetStatus, ServiceStatus
from syncd.settings import Settings
from syncd.statements import statement

SERVICE_TIMEOUT_SECONDS = 10.0
FAILURES_ASKED = 20
"""Number of failed sources, at most, that the service is asked to explain."""


@dataclass(frozen=True, slots=True)
class Service:
    """Status that the running service reports; ``error`` if no service answers."""

    status: ServiceStatus | None
    datasets: Sequence[DatasetStatus]
    error: SyncdError | None = None
    commands: Mapping[str, str] = field(default_factory=dict)
    """Command by source: it attaches the source with the present names of its columns.

    Only the sources for which the service names such a command are here.
    """


@dataclass(slots=True)
class Look:
    """One inspection. Each statement has its own transaction: a failed check affects no other."""

    settings: Settings
    service: Service
    connection: psycopg.Connection
    role: str = ""
    sources: Sequence[Source] = ()
    arguments: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    table_rows: Mapping[int, int] = field(default_factory=dict)
    """The server's estimate of each source's rows; 0 if it has no estimate."""
    dimensions: dict[int, int] = field(default_factory=dict)
    """Dimension of most of the sampled rows, for each source that declares no dimension."""

    def rows(
        self, name: str, parameters: Sequence[object] | Mapping[str, object] | None = None
    ) -> list[Any]:
        """The rows of a statement of ``queries/check.sql``."""
        with self.transaction():
            return self.connection.execute(statement("check", name), parameters).fetchall()

    def row(
        self, name: str, parameters: Sequence[object] | Mapping[str, object] | None = None
    ) -> Any:
        """The only row of a statement of ``queries/check.sql``; None if there is no row."""
        found = self.rows(name, parameters)
        return found[0] if found else None

    def source_rows(self, query: sql.Composed) -> list[tuple[Any, ...]]:
        """The rows of a statement that holds a source's expressions, with literal percent signs."""
        with self.transaction():
            return psycopg.RawCursor(self.connection).execute(query).fetchall()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A short read-only transaction that waits for no lock. Its settings end with it."""
        with self.connection.transaction():
            limits = statement("check", "limits")
            self.connection.execute(";\n".join((session.service_settings(self.connection), limits)))
            yield

    def relations(self, sources: Sequence[Source]) -> list[int]:
        """Oids of the sources' tables and of all their partitions."""
        oids = [source.oid for source in sources if source.table is not None]
        return [*oids, *(leaf for _, leaf in self.rows("read_leaves", [oids]) if leaf not in oids)]

    def attach_with_present_columns(self, source: Source) -> str:
        """Command that attaches a source again after a column of it was renamed or dropped.

        It holds the new name if the name is known or if there is only one candidate.
        """
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
        """Command that attaches the source again as it is, or another table with its arguments.

        Attaching again creates missing triggers and reads the whole table again.
        """
        return attach_command(source, {**self.arguments.get(source.id, {}), **others}, table)


@contextmanager
def looking(settings: Settings, service: Service) -> Iterator[Look]:
    """Open the connection of an inspection; raises ``DatabaseError``."""
    with connect_blocking(settings.conninfo) as connection:
        connection.rollback()
        connection.autocommit = True
        connection.read_only = True  # of the transactions
        connection.prepare_threshold = None  # a pooler may give each transaction another session
        yield Look(settings, service, connection)


def attach_command(source: Source, arguments: Mapping[str, Any], table: str | None = None) -> str:
    """``syncd attach`` with a source's arguments, quoted for a shell; defaults are left out."""
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
    """The table's name, with quotes if SQL needs them."""
    plain = all(
        part.isidentifier() and part == part.lower()
        for part in (source.schema or "", source.table or "")
    )
    return source.name if plain else source.identifier.as_string()


def attach_commands(fixes: Mapping[str, str]) -> dict[str, str]:
    """The commands that attach a source again, out of the fixes of failed sources."""
    return {source: fix for source, fix in fixes.items() if fix.startswith("syncd attach ")}


def ask_service(socket: Path | str) -> Service:
    """Answers of the service on this socket, or the error if none answers."""
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
