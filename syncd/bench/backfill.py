"""Backfill: how fast a table that is there already becomes searchable, and what memory that takes beside the vectors themselves."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass

import numpy as np
from psycopg import sql

from syncd.bench.environment import Environment, serving
from syncd.statements import statement

TABLE = "backfill"
POLL_SECONDS = 0.01
COPY_HEADER = b"PGCOPY\n\xff\r\n\0" + struct.pack(">ii", 0, 0)
COPY_TRAILER = struct.pack(">h", -1)
FLOAT4_OID = 700


@dataclass(frozen=True, slots=True)
class Backfill:
    """Rows a second from the attach on, and bytes of memory that are neither the vectors nor there before."""

    rows: int
    dimension: int
    seconds: float
    rows_per_second: int
    vector_bytes: int
    peak_anonymous_bytes: int
    beside_vectors_bytes: int


def measure(where: Environment, *, rows: int, dimension: int, seed: int = 0) -> Backfill:
    """Fill a table, attach it under a running syncd, and wait until all of it is indexed."""
    where.create_tables(TABLE, dimension=dimension)
    fill(where, rows, dimension, seed)
    where.run("vacuum", table=TABLE)
    with serving(where) as service, service.client() as client:
        before = service.memory_bytes("RssAnon")
        begun = time.perf_counter()
        where.run("attach", [f"syncd_bench.{TABLE}", "cosine"])
        peak = before
        while True:
            found = {row.dataset: row for row in client.datasets()}.get(f"default/{TABLE}")
            peak = max(peak, service.memory_bytes("RssAnon"))
            if found is not None and found.state == "ready" and found.count == rows:
                break
            time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - begun
    vector_bytes = rows * dimension * 4
    return Backfill(rows, dimension, round(seconds, 2), round(rows / seconds), vector_bytes, peak, peak - before)


def fill(where: Environment, rows: int, dimension: int, seed: int) -> None:
    """Random unit-variance vectors, by COPY in binary."""
    generator = np.random.default_rng(seed)
    query = sql.SQL(statement("bench", "copy_rows")).format(table=sql.Identifier(TABLE))
    with where.connection.cursor().copy(query) as copy:
        copy.write(COPY_HEADER)
        for start in range(0, rows, 1000):
            block = generator.standard_normal((min(1000, rows - start), dimension)).astype(">f4")
            copy.write(b"".join(copy_row(row, where.vector_type) for row in block))
        copy.write(COPY_TRAILER)


def copy_row(vector: np.ndarray[tuple[int, ...], np.dtype[np.float32]], vector_type: str) -> bytes:
    """One row of one column in COPY's binary format."""
    if vector_type == "vector":
        value = struct.pack(">hh", len(vector), 0) + vector.tobytes()
    else:
        elements = np.empty(len(vector), dtype=[("bytes", ">i4"), ("value", ">f4")])
        elements["bytes"], elements["value"] = 4, vector
        value = struct.pack(">iiiii", 1, 0, FLOAT4_OID, len(vector), 1) + elements.tobytes()
    return struct.pack(">hi", 1, len(value)) + value
