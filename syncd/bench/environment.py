"""The environment of a benchmark: the user's server or the embedded one, and a syncd of its own.

Invariant: after a benchmark the database is unchanged, even after Ctrl-C or SIGTERM. Every table,
source and consumer of the benchmark is removed, and so are schema syncd and the extension if the
benchmark created them.
"""

from __future__ import annotations

import itertools
import os
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql
from rich.progress import Progress

from syncd import process
from syncd.bench.vector_set import LOADED_ROWS, made_blocks
from syncd.client.client import Client
from syncd.errors import SyncdError
from syncd.postgres import schema
from syncd.postgres.connection import open_session
from syncd.protocol.status_messages import DatasetStatus
from syncd.settings import Settings
from syncd.statements import filled, statement

CONSUMER = "bench"
LOOK_SECONDS = 0.02
SETTLED_SECONDS = 1.0
"""How long syncd must build nothing to count as settled.

The builder looks several times in this time. It measures recall again after two looks in a row
without a new row.
"""
LOWEST = "19"
"""Niceness of the thread that builds."""
SAMPLES = 20_000
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = struct.pack(">h", -1)
FLOAT4_OID = 700

T = TypeVar("T", int, float)

Columns = Mapping[str, NDArray[np.int32]]
"""Integers of all rows, by the name of their column."""
NO_COLUMNS: Columns = {}


@dataclass(frozen=True, slots=True)
class Environment:
    """A database with schema syncd and an empty schema ``syncd_bench``."""

    conninfo: str
    directory: Path
    connection: psycopg.Connection
    vector_type: str
    """``vector`` if the server has pgvector, else ``real[]``."""
    progress: Progress
    recall: float = 0.95
    """The recall that syncd aims for in searches that name none."""
    readers: int | None = None
    """Number of reader processes; None: as many as the settings say."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """More settings of the service."""

    def run(
        self, name: str, parameters: list[object] | None = None, **names: str
    ) -> list[tuple[object, ...]]:
        """Run a statement of ``queries/bench.sql``; ``{type}`` and table names are filled in."""
        parts = {
            key: sql.Identifier(value) if key == "table" else sql.SQL(value)
            for key, value in names.items()
        }
        query = filled("bench", name, **parts)
        cursor = self.connection.execute(query, parameters)
        return cursor.fetchall() if cursor.description else []

    def value(self, name: str, parameters: list[object] | None = None, **names: str) -> Any:
        """The single value of a statement's result."""
        return self.run(name, parameters, **names)[0][0]

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show the current step if stderr is a terminal."""
        task = self.progress.add_task(what, total=None)
        try:
            yield
        finally:
            self.progress.remove_task(task)

    def track(self, numbers: Sequence[T], what: str) -> Iterable[T]:
        """The same numbers; shows how many of them are done."""
        return self.progress.track(numbers, description=what)

    def create(self, table: str, dimension: int) -> None:
        """Create a table with a key, counted from 1, and a vector."""
        column = f"vector({dimension})" if self.vector_type == "vector" else self.vector_type
        self.run("create_table", table=table, type=column)

    def load(
        self, table: str, blocks: Iterable[NDArray[np.float32]], columns: Columns = NO_COLUMNS
    ) -> None:
        """COPY vectors in binary, with integers of other columns; the n-th row gets the key n."""
        names = sql.SQL(", ").join(map(sql.Identifier, ("embedding", *columns)))
        query = filled("bench", "copy_rows", table=sql.Identifier(table), columns=names)
        copy_vectors(self.connection, query, blocks, self.vector_type, list(columns.values()))

    def copy(self, table: str) -> None:
        """Copy the rows of the table ``followed``, with their keys."""
        self.run("copy_table", table=table)
        self.run("continue_keys", [f"syncd_bench.{table}"], table=table)

    def fill(self, table: str, rows: int, dimension: int, seed: int = 0) -> None:
        """Load generated vectors, which are as hard to search as real ones."""
        blocks = made_blocks(rows, dimension, seed)
        total = -(-rows // LOADED_ROWS)
        shown = self.progress.track(blocks, total=total, description=f"loading {rows} rows")
        self.load(table, shown)

    def create_tables(self, *tables: str, dimension: int) -> None:
        """Create tables with a key and a vector, and table ``samples`` with vectors to insert."""
        for table in ("samples", *tables):
            self.create(table, dimension)
        self.fill("samples", SAMPLES, dimension, seed=1)

    def change(self, table: str, keys: Sequence[int], samples: Sequence[int]) -> str:
        """Give rows the vectors of some samples, in one transaction; returns its token."""
        with self.connection.transaction():
            self.run("change_rows", [list(keys), list(samples)], table=table)
            return str(self.value("token"))


def copy_vectors(
    connection: psycopg.Connection,
    copy_statement: sql.SQL | sql.Composed,
    blocks: Iterable[NDArray[np.float32]],
    vector_type: str,
    numbers: Sequence[NDArray[np.int32]] = (),
) -> None:
    """COPY one column of vectors in binary, then columns of integers.

    ``blocks`` are (n, dimension) float32.
    """
    lists = [column.tolist() for column in numbers]
    others = zip(*lists, strict=True) if lists else itertools.repeat(())
    with connection.cursor().copy(copy_statement) as copy:
        copy.write(COPY_HEADER)
        for block in blocks:
            rows = block.astype(">f4")
            copy.write(b"".join(copied_row(row, vector_type, next(others)) for row in rows))
        copy.write(COPY_TRAILER)


def copied_row(vector: NDArray[np.float32], vector_type: str, numbers: tuple[int, ...]) -> bytes:
    """One row in COPY's binary format, from big-endian floats and integers of 4 bytes."""
    if vector_type == "vector":
        value = struct.pack(">hh", len(vector), 0) + vector.tobytes()
    else:
        elements = np.empty(len(vector), dtype=[("bytes", ">i4"), ("value", ">f4")])
        elements["bytes"], elements["value"] = 4, vector
        value = struct.pack(">iiiii", 1, 0, FLOAT4_OID, len(vector), 1) + elements.tobytes()
    others = b"".join(struct.pack(">ii", 4, number) for number in numbers)
    return struct.pack(">hi", 1 + len(numbers), len(value)) + value + others


@contextmanager
def environment(
    settings: Settings, progress: Progress, warn: Callable[[str], None]
) -> Iterator[Environment]:
    """Prepare the database, and clean up at the end, even after an error."""
    with (
        interrupted_by_sigterm(),
        tempfile.TemporaryDirectory(prefix="syncd-bench-") as folder,
        # idle during the benchmark, so that it can clean up after an interrupt
        open_session(settings.conninfo) as keeper,
    ):
        locked, has_extension, extension_available = first_row(keeper, "begin")
        if not locked:
            raise SyncdError(
                "another benchmark is running in this database", hint="wait for it to end"
            )
        revision = schema.installed_revision(keeper)
        if revision is not None:
            schema.check_installed(revision)  # a benchmark must not upgrade it
        try:
            schema.install(settings.conninfo)
            clean(keeper)  # after a benchmark that was killed
            for (source,) in keeper.execute(statement("bench", "list_foreign_sources")):
                warn(
                    f"warning: {source} is attached too; syncd reads it, and the results include "
                    "that"
                )
            for (name,) in keeper.execute(statement("bench", "list_running_consumers")):
                warn(
                    f"warning: a syncd runs here as consumer {name}; it also follows the "
                    "benchmark's tables"
                )
            keeper.execute(statement("bench", "create_schema"))
            if extension_available and not has_extension:
                keeper.execute(statement("bench", "create_vector_extension"))
            with open_session(settings.conninfo) as connection:
                vector_type = "vector" if extension_available else "real[]"
                yield Environment(
                    settings.conninfo,
                    Path(folder),
                    connection,
                    vector_type,
                    progress,
                    settings.recall,
                )
        finally:
            with uninterrupted():
                clean(keeper)
                if extension_available and not has_extension:
                    keeper.execute(statement("bench", "drop_vector_extension"))
                if revision is None:
                    schema.uninstall(settings.conninfo)


def first_row(connection: psycopg.Connection, name: str) -> tuple[Any, ...]:
    """The single row of a statement of ``queries/bench.sql``."""
    row = connection.execute(statement("bench", name)).fetchone()
    assert row is not None
    return row


def clean(connection: psycopg.Connection) -> None:
    """Remove everything that benchmarks create in the database."""
    if schema.installed_revision(connection) is not None:
        for (source,) in connection.execute(statement("schema", "list_sources")).fetchall():
            if source.startswith("syncd_bench."):
                connection.execute(statement("bench", "detach"), [source])
        connection.execute(statement("bench", "forget_consumer"), [CONSUMER])
    connection.execute(statement("bench", "drop_schema"))


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C and SIGTERM in the block."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Serving:
    """A ``syncd serve`` for the benchmark, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], socket: Path) -> None:
        self.process = process
        self.socket = socket
        self.start_seconds = 0.0
        self.stop_seconds = 0.0

    def client(self) -> Client:
        """A new client of it."""
        return Client(self.socket, timeout=120.0)

    def wait_searchable(self, dataset: str, rows: int) -> DatasetStatus:
        """Return when a dataset answers over this many rows, by the index that it should have."""
        with self.client() as client:
            while True:
                found = {row.dataset: row for row in client.datasets()}.get(f"default/{dataset}")
                if found is not None:
                    if found.state == "failed":
                        raise SyncdError(
                            f"syncd cannot read {dataset}", hint=f"syncd why {dataset}"
                        )
                    if found.state == "ready" and found.count == rows and found.index != "building":
                        return found
                time.sleep(LOOK_SECONDS)

    def memory_bytes(self, field: str = "VmRSS") -> int:
        """Memory of the process: now (``VmRSS``), its maximum (``VmHWM``), or without files
        (``RssAnon``).
        """
        for line in self.system_file("status").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise SyncdError(
            f"the system does not report {field} of a process", hint="run the benchmark on Linux"
        )

    def cpu_seconds(self) -> float:
        """CPU seconds that the process has used so far."""
        return used_seconds(self.stat("stat"))

    def building_cpu_seconds(self) -> float:
        """CPU seconds that the process has used for building."""
        return sum(map(used_seconds, self.builders()))

    def settle(self) -> None:
        """Return when syncd has nothing left to build."""
        with self.client() as client:
            while True:
                while is_building(client):
                    time.sleep(LOOK_SECONDS)
                client.checkpoint()  # a compaction ends with a checkpoint
                end = time.monotonic() + SETTLED_SECONDS
                while not is_building(client):
                    if time.monotonic() > end:
                        return
                    time.sleep(LOOK_SECONDS)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the process (SIGSTOP) during the block."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def builders(self) -> list[list[str]]:
        """``stat`` fields of each thread with the lowest priority, of which the builder is one."""
        try:
            threads = [thread.name for thread in Path(f"/proc/{self.process.pid}/task").iterdir()]
        except OSError as error:
            raise SyncdError(
                f"the system does not report on threads: {error}", hint="run it on Linux"
            ) from error
        found = []
        for thread in threads:
            with suppress(SyncdError):  # the thread has ended meanwhile
                found.append(self.stat(f"task/{thread}/stat"))
        return [fields for fields in found if fields[16] == LOWEST]

    def stat(self, name: str) -> list[str]:
        """Fields of a ``stat`` file, from the third one on, the state (proc(5))."""
        return self.system_file(name).rpartition(")")[2].split()

    def system_file(self, name: str) -> str:
        """Text of a file of the process in ``/proc``; raises ``SyncdError``."""
        try:
            return Path(f"/proc/{self.process.pid}/{name}").read_text(encoding="ascii")
        except OSError as error:
            raise SyncdError(
                f"the system does not report on processes: {error}", hint="run it on Linux"
            ) from error


def is_building(client: Client) -> bool:
    """Whether the service reports that it builds an index."""
    return any(work.what == "building" for work in client.status().work)


def used_seconds(fields: list[str]) -> float:
    """CPU seconds of a process or a thread, in user and in system mode."""
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(where: Environment) -> Iterator[Serving]:
    """Start a consumer named ``bench`` and wait until it is ready; stop it at the end."""
    socket = where.directory / "s"
    variables = {
        "SYNCD_DSN": where.conninfo,
        "SYNCD_DATA_DIR": str(where.directory / "data"),
        "SYNCD_SOCKET": str(socket),
        "SYNCD_CONSUMER": CONSUMER,
        "SYNCD_RECALL": str(where.recall),
        "SYNCD_VERIFY_SECONDS": "0",
        "SYNCD_HTTP": "off",
        "SYNCD_LISTEN": "off",
    }
    if where.readers is not None:
        variables["SYNCD_READERS"] = str(where.readers)
    begun = time.perf_counter()
    variables |= where.variables
    with process.serve(os.environ | variables, where.directory / "serve.log") as started:
        service = Serving(started, socket)
        service.start_seconds = time.perf_counter() - begun
        try:
            yield service
        finally:
            begun = time.perf_counter()
    service.stop_seconds = time.perf_counter() - begun
