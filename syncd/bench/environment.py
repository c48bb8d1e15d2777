"""Where a benchmark runs: the user's server or the embedded one, a schema that is dropped at the end, and a syncd of its own."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from syncd.errors import SyncdError
from syncd.postgres import schema
from syncd.postgres.connection import connect_blocking
from syncd.rpc.client import Client
from syncd.settings import Settings
from syncd.statements import statement

STOP_SECONDS = 60.0
SAMPLES = 20_000
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = struct.pack(">h", -1)
COPY_ROWS = 1000
FLOAT4_OID = 700


@dataclass(frozen=True, slots=True)
class Environment:
    """A database with schema syncd and an empty schema ``syncd_bench``."""

    conninfo: str
    directory: Path
    connection: psycopg.Connection
    vector_type: str
    """``vector`` where the server has pgvector, else ``real[]``."""

    def run(self, name: str, parameters: list[object] | None = None, **names: str) -> list[tuple[object, ...]]:
        """Run a statement of ``queries/bench.sql``; ``{type}`` and the tables' names are filled in."""
        query = sql.SQL(statement("bench", name)).format(
            **{key: sql.Identifier(value) if key == "table" else sql.SQL(value) for key, value in names.items()}
        )
        cursor = self.connection.execute(query, parameters)
        return cursor.fetchall() if cursor.description else []

    def fill(self, table: str, rows: int, dimension: int, seed: int) -> None:
        """Random vectors of unit variance, by COPY in binary."""
        generator = np.random.default_rng(seed)
        query = sql.SQL(statement("bench", "copy_rows")).format(table=sql.Identifier(table))
        blocks = (
            generator.standard_normal((min(COPY_ROWS, rows - start), dimension), dtype=np.float32)
            for start in range(0, rows, COPY_ROWS)
        )
        copy_vectors(self.connection, query, blocks, self.vector_type)

    def create_tables(self, *tables: str, dimension: int) -> None:
        """Tables with a key and a vector, and a hundred vectors to insert."""
        column = f"vector({dimension})" if self.vector_type == "vector" else self.vector_type
        self.run("create_samples", type=column)
        self.fill("samples", SAMPLES, dimension, seed=1)
        for table in tables:
            self.run("create_table", table=table, type=column)


def copy_vectors(
    connection: psycopg.Connection,
    copy_statement: sql.SQL | sql.Composed,
    blocks: Iterable[NDArray[np.float32]],
    vector_type: str,
) -> None:
    """COPY one column of vectors in binary, from blocks of (n, dimension) float32."""
    with connection.cursor().copy(copy_statement) as copy:
        copy.write(COPY_HEADER)
        for block in blocks:
            copy.write(b"".join(copied_row(row, vector_type) for row in block.astype(">f4")))
        copy.write(COPY_TRAILER)


def copied_row(vector: NDArray[np.float32], vector_type: str) -> bytes:
    """One row of one column in COPY's binary format, from big-endian floats."""
    if vector_type == "vector":
        value = struct.pack(">hh", len(vector), 0) + vector.tobytes()
    else:
        elements = np.empty(len(vector), dtype=[("bytes", ">i4"), ("value", ">f4")])
        elements["bytes"], elements["value"] = 4, vector
        value = struct.pack(">iiiii", 1, 0, FLOAT4_OID, len(vector), 1) + elements.tobytes()
    return struct.pack(">hi", 1, len(value)) + value


@contextmanager
def environment(settings: Settings) -> Iterator[Environment]:
    """Prepare the database and clean up after the benchmark, whatever happens in it."""
    with (
        tempfile.TemporaryDirectory(prefix="syncd-bench-") as folder,
        connect_blocking(settings.conninfo) as connection,
    ):
        schema.install(settings.conninfo)
        connection.autocommit = True
        connection.execute(statement("bench", "drop_schema"))
        connection.execute(statement("bench", "create_schema"))
        found = connection.execute(statement("bench", "has_vector_extension")).fetchone()
        vector_type = "real[]"
        if found is not None and found[0]:
            connection.execute(statement("bench", "create_vector_extension"))
            vector_type = "vector"
        try:
            yield Environment(settings.conninfo, Path(folder), connection, vector_type)
        finally:
            if not connection.closed:
                for (source,) in connection.execute(statement("schema", "list_sources")).fetchall():
                    if source.startswith("syncd_bench."):
                        connection.execute(statement("bench", "detach"), [source])
                connection.execute(statement("bench", "drop_schema"))


class Serving:
    """A ``syncd serve`` for the benchmark, in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], socket: Path) -> None:
        self.process = process
        self.socket = socket

    def client(self) -> Client:
        """A new connection to it."""
        return Client(self.socket, timeout=120.0)

    def memory_bytes(self, field: str = "VmRSS") -> int:
        """Memory of the process now (``VmRSS``), at most (``VmHWM``), or without files (``RssAnon``)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
        raise SyncdError(f"the system does not tell {field} of a process", hint="run the benchmark on Linux")


@contextmanager
def serving(where: Environment) -> Iterator[Serving]:
    """Start a consumer named ``bench`` and wait until it is ready; stop it at the end."""
    socket = where.directory / "s"
    variables = {
        "SYNCD_DSN": where.conninfo,
        "SYNCD_DATA_DIR": str(where.directory / "data"),
        "SYNCD_SOCKET": str(socket),
        "SYNCD_CONSUMER": "bench",
        "SYNCD_VERIFY_SECONDS": "0",
    }
    log = (where.directory / "serve.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "syncd.cli.main", "serve"],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=log,
    )
    try:
        assert process.stdout is not None
        if not process.stdout.readline().startswith(b"ready"):
            raise SyncdError(
                f"syncd serve did not start: {Path(log.name).read_text(encoding='utf-8')[-2000:]}",
                hint="run it by itself to see why",
            )
        yield Serving(process, socket)
    finally:
        process.terminate()
        process.wait(STOP_SECONDS)
        if process.stdout is not None:
            process.stdout.close()
        log.close()
