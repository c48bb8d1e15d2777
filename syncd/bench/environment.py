"""Where a benchmark runs: the user's server or the embedded one, and a syncd of its own.

The invariant: the database is left as it was found, also after Ctrl-C or SIGTERM. No table, source
or consumer stays, and no schema syncd and no extension that was not there before.
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
from dataclasses import dataclass
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
from syncd.protocol.messages import DatasetStatus
from syncd.settings import Settings
from syncd.statements import statement

CONSUMER = "bench"
LOOK_SECONDS = 0.02
SETTLED_SECONDS = 1.0
"""Several of the builder's looks: it measures recall again once two in a row have seen no new row.
"""
LOWEST = "19"
"""The niceness of the thread that builds."""
SAMPLES = 20_000
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = struct.pack(">h", -1)
FLOAT4_OID = 700

T = TypeVar("T", int, float)

Columns = Mapping[str, NDArray[np.int32]]
"""Integers of all rows by the name of their column."""
NO_COLUMNS: Columns = {}


@dataclass(frozen=True, slots=True)
class Environment:
    """A database with schema syncd and an empty schema ``syncd_bench``."""

    conninfo: str
    directory: Path
    connection: psycopg.Connection
    vector_type: str
    """``vector`` where the server has pgvector, else ``real[]``."""
    progress: Progress

    def run(
        self, name: str, parameters: list[object] | None = None, **names: str
    ) -> list[tuple[object, ...]]:
        """Run a statement of ``queries/bench.sql``; ``{type}`` and table names are filled in."""
        query = sql.SQL(statement("bench", name)).format(
            **{
                key: sql.Identifier(value) if key == "table" else sql.SQL(value)
                for key, value in names.items()
            }
        )
        cursor = self.connection.execute(query, parameters)
        return cursor.fetchall() if cursor.description else []

    def value(self, name: str, parameters: list[object] | None = None, **names: str) -> Any:
        """The one value that a statement gives."""
        return self.run(name, parameters, **names)[0][0]

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show what goes on, where somebody is looking."""
        task = self.progress.add_task(what, total=None)
        try:
            yield
        finally:
            self.progress.remove_task(task)

    def track(self, numbers: Sequence[T], what: str) -> Iterable[T]:
        """The same numbers, showing how many of them are done."""
        return self.progress.track(numbers, description=what)

    def create(self, table: str, dimension: int) -> None:
        """A table with a key, counted from 1, and a vector."""
        column = f"vector({dimension})" if self.vector_type == "vector" else self.vector_type
        self.run("create_table", table=table, type=column)

    def load(
        self, table: str, blocks: Iterable[NDArray[np.float32]], columns: Columns = NO_COLUMNS
    ) -> None:
        """Vectors by COPY in binary, and the numbers of other columns; the n-th gets the key n."""
        names = sql.SQL(", ").join(map(sql.Identifier, ("embedding", *columns)))
        query = sql.SQL(statement("bench", "copy_rows")).format(
            table=sql.Identifier(table), columns=names
        )
        copy_vectors(self.connection, query, blocks, self.vector_type, list(columns.values()))

    def copy(self, table: str) -> None:
        """The rows of the table ``followed``, with their keys."""
        self.run("copy_table", table=table)
        self.run("continue_keys", [f"syncd_bench.{table}"], table=table)

    def fill(self, table: str, rows: int, dimension: int, seed: int) -> None:
        """Vectors that are as hard to search as real ones."""
        blocks = made_blocks(rows, dimension, seed)
        self.load(
            table,
            self.progress.track(
                blocks, total=-(-rows // LOADED_ROWS), description=f"loading {rows} rows"
            ),
        )

    def create_tables(self, *tables: str, dimension: int) -> None:
        """Tables with a key and a vector, and vectors to insert."""
        for table in ("samples", *tables):
            self.create(table, dimension)
        self.fill("samples", SAMPLES, dimension, seed=1)

    def change(self, table: str, keys: Sequence[int], samples: Sequence[int]) -> str:
        """Give rows other vectors, those of some samples, in one transaction; the token of it."""
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
    """COPY one column of vectors in binary, from blocks of (n, dimension) float32, and after it
    columns of integers.
    """
    others = (
        zip(*(column.tolist() for column in numbers), strict=True)
        if numbers
        else itertools.repeat(())
    )
    with connection.cursor().copy(copy_statement) as copy:
        copy.write(COPY_HEADER)
        for block in blocks:
            copy.write(
                b"".join(copied_row(row, vector_type, next(others)) for row in block.astype(">f4"))
            )
        copy.write(COPY_TRAILER)


def copied_row(vector: NDArray[np.float32], vector_type: str, numbers: tuple[int, ...]) -> bytes:
    """One row in COPY's binary format, from big-endian floats and integers of four bytes."""
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
    """Prepare the database, and clean up after the benchmark, whatever happens in it."""
    with (
        interrupted_by_sigterm(),
        tempfile.TemporaryDirectory(prefix="syncd-bench-") as folder,
        open_session(
            settings.conninfo
        ) as keeper,  # idle meanwhile, so that it can clean up whatever is interrupted
    ):
        locked, has_extension, extension_available = first_row(keeper, "begin")
        if not locked:
            raise SyncdError(
                "another benchmark is running in this database", hint="wait for it to end"
            )
        revision = schema.installed_revision(keeper)
        if revision is not None:
            schema.check_installed(revision)  # to upgrade it is not a benchmark's business
        try:
            schema.install(settings.conninfo)
            clean(keeper)  # what a benchmark that was killed has left
            for (source,) in keeper.execute(statement("bench", "list_foreign_sources")):
                warn(
                    f"warning: {source} is attached too; it will be read, and is part of what is "
                    "measured"
                )
            for (name,) in keeper.execute(statement("bench", "list_running_consumers")):
                warn(
                    f"warning: a syncd runs here as consumer {name}; it follows the benchmark's "
                    "tables too"
                )
            keeper.execute(statement("bench", "create_schema"))
            if extension_available and not has_extension:
                keeper.execute(statement("bench", "create_vector_extension"))
            with open_session(settings.conninfo) as connection:
                vector_type = "vector" if extension_available else "real[]"
                yield Environment(
                    settings.conninfo, Path(folder), connection, vector_type, progress
                )
        finally:
            with uninterrupted():
                clean(keeper)
                if extension_available and not has_extension:
                    keeper.execute(statement("bench", "drop_vector_extension"))
                if revision is None:
                    schema.uninstall(settings.conninfo)


def first_row(connection: psycopg.Connection, name: str) -> tuple[Any, ...]:
    """The one row of a statement of ``queries/bench.sql``."""
    row = connection.execute(statement("bench", name)).fetchone()
    assert row is not None
    return row


def clean(connection: psycopg.Connection) -> None:
    """Drop what benchmarks make."""
    if schema.installed_revision(connection) is not None:
        for (source,) in connection.execute(statement("schema", "list_sources")).fetchall():
            if source.startswith("syncd_bench."):
                connection.execute(statement("bench", "detach"), [source])
        connection.execute(statement("bench", "forget_consumer"), [CONSUMER])
    connection.execute(statement("bench", "drop_schema"))


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """End the block on SIGTERM as on Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let no further Ctrl-C end the block."""
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
        """A new connection to it."""
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
        """Memory of the process now (``VmRSS``), at most (``VmHWM``), or without files
        (``RssAnon``).
        """
        for line in self.system_file("status").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise SyncdError(
            f"the system does not tell {field} of a process", hint="run the benchmark on Linux"
        )

    def cpu_seconds(self) -> float:
        """Time of processors that the process has used so far."""
        return used_seconds(self.stat("stat"))

    def building_cpu_seconds(self) -> float:
        """How much of that was for building."""
        return sum(map(used_seconds, self.builders()))

    def settle(self) -> None:
        """Return once it builds nothing any more."""
        with self.client() as client:
            while True:
                while is_building(client):
                    time.sleep(LOOK_SECONDS)
                client.checkpoint()  # a compaction ends with one, and is looked after only then
                end = time.monotonic() + SETTLED_SECONDS
                while not is_building(client):
                    if time.monotonic() > end:
                        return
                    time.sleep(LOOK_SECONDS)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take its processors away for a while."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def builders(self) -> list[list[str]]:
        """CPU seconds of the threads of the lowest priority, of which the builder is one."""
        try:
            threads = [thread.name for thread in Path(f"/proc/{self.process.pid}/task").iterdir()]
        except OSError as error:
            raise SyncdError(
                f"the system does not tell about threads: {error}", hint="run it on Linux"
            ) from error
        found = []
        for thread in threads:
            with suppress(SyncdError):  # it has ended meanwhile
                found.append(self.stat(f"task/{thread}/stat"))
        return [fields for fields in found if fields[16] == LOWEST]

    def stat(self, name: str) -> list[str]:
        """The fields of a ``stat`` from the third one on, the state (proc(5))."""
        return self.system_file(name).rpartition(")")[2].split()

    def system_file(self, name: str) -> str:
        """What the system says of the process."""
        try:
            return Path(f"/proc/{self.process.pid}/{name}").read_text(encoding="ascii")
        except OSError as error:
            raise SyncdError(
                f"the system does not tell about processes: {error}", hint="run it on Linux"
            ) from error


def is_building(client: Client) -> bool:
    """Whether the service says that it builds something."""
    return any(work.what == "building" for work in client.status().work)


def used_seconds(fields: list[str]) -> float:
    """Time of processors, in user and in system mode, of a process or a thread."""
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
        "SYNCD_VERIFY_SECONDS": "0",
        "SYNCD_HTTP": "off",
        "SYNCD_LISTEN": "off",
    }
    begun = time.perf_counter()
    with process.serve(os.environ | variables, where.directory / "serve.log") as started:
        service = Serving(started, socket)
        service.start_seconds = time.perf_counter() - begun
        try:
            yield service
        finally:
            begun = time.perf_counter()
    service.stop_seconds = time.perf_counter() - begun
