"""Engines that a client searches: a syncd, or a pgvector table.

An engine is a value that is passed to the clients' processes. Each process opens it for itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from syncd.client.client import Client
from syncd.errors import DatabaseError
from syncd.postgres.connection import open_session
from syncd.statements import filled, statement

OPERATORS = {"cosine": "<=>", "l2": "<->", "ip": "<#>"}
OPERATOR_CLASSES = {"cosine": "vector_cosine_ops", "l2": "vector_l2_ops", "ip": "vector_ip_ops"}
BINARY = 1

Search = Callable[[NDArray[np.float32]], list[int]]
"""A function of a vector that returns the nearest keys, nearest first."""


@dataclass(frozen=True, slots=True)
class Below:
    """A filter: the rows whose ``column`` is less than ``limit``."""

    column: str
    limit: int


class Engine(Protocol):
    """One way to search, with one setting."""

    @property
    def name(self) -> str:
        """The product: ``syncd`` or ``pgvector``."""
        ...

    @property
    def setting(self) -> str:
        """The setting that determines its recall."""
        ...

    def open(self) -> AbstractContextManager[Search]:
        """Connect; the connection ends with the block."""
        ...


@dataclass(frozen=True, slots=True)
class SyncdEngine:
    """Searches by RPC, at a recall target."""

    socket: str
    dataset: str
    recall: float
    k: int
    filter: Below | None = None

    @property
    def name(self) -> str:
        """The product: ``syncd``."""
        return "syncd"

    @property
    def setting(self) -> str:
        """The recall target, or ``exact``."""
        return "exact" if self.recall == 1 else f"recall {self.recall:g}"

    @contextmanager
    def open(self) -> Iterator[Search]:
        """Connect."""
        exact = self.recall == 1
        recall = None if exact else self.recall
        passing = None if self.filter is None else {self.filter.column: {"lt": self.filter.limit}}

        with Client(self.socket, timeout=120.0) as client:

            def search(vector: NDArray[np.float32]) -> list[int]:
                hits = client.search(
                    self.dataset, vector, k=self.k, recall=recall, exact=exact, filter=passing
                )
                return [int(str(hit.key)) for hit in hits]

            yield search


@dataclass(frozen=True, slots=True)
class PgvectorEngine:
    """Searches by a prepared statement with binary vectors, over libpq with little Python code."""

    conninfo: str
    table: str
    metric: str
    ef_search: int | None
    """None: without the index, by a scan of the table."""
    k: int
    filter: Below | None = None

    @property
    def name(self) -> str:
        """The product: ``pgvector``."""
        return "pgvector"

    @property
    def setting(self) -> str:
        """The ``ef_search``, or ``scan``."""
        return "scan" if self.ef_search is None else f"ef_search {self.ef_search}"

    @contextmanager
    def open(self) -> Iterator[Search]:
        """Connect, set ``ef_search`` and prepare."""
        with self.connect() as connection:
            prepared = connection.pgconn.prepare(
                b"nearest", self.query(sql.SQL("$1")).as_bytes(connection)
            )
            if prepared.error_message:
                raise DatabaseError(prepared.error_message.decode())

            def search(vector: NDArray[np.float32]) -> list[int]:
                value = struct.pack(">hh", len(vector), 0) + vector.astype(">f4").tobytes()
                found = connection.pgconn.exec_prepared(b"nearest", [value], [BINARY], BINARY)
                if found.error_message:
                    raise DatabaseError(found.error_message.decode())
                keys = b"".join(found.get_value(row, 0) or b"" for row in range(found.ntuples))
                return list(struct.unpack(f">{found.ntuples}q", keys))

            yield search

    def plan(self, vector: NDArray[np.float32]) -> str:
        """The nodes of the plan of a search, from the top down, each with its index."""
        literal = sql.Literal(f"[{','.join(map(str, vector.tolist()))}]")
        with self.connect() as connection:
            (found,) = connection.execute(
                filled("bench", "explain", query=self.query(literal))
            ).fetchone() or (None,)
        nodes: list[Any] = [found[0]["Plan"]] if found else []
        for node in nodes:
            nodes += node.get("Plans", [])
        names = [(node["Node Type"], node.get("Index Name")) for node in nodes]
        return " > ".join(" ".join(filter(None, each)) for each in names)

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection]:
        """A connection with the settings of this engine."""
        with open_session(self.conninfo) as connection:
            connection.execute(statement("bench", "use_index"), [str(self.ef_search is not None)])
            if self.ef_search is not None:
                connection.execute(statement("bench", "set_ef_search"), [str(self.ef_search)])
            if self.filter is not None:
                connection.execute(statement("bench", "set_iterative_scan"))
            yield connection

    def query(self, vector: sql.Composable) -> sql.Composed:
        """The query that searches for a vector."""
        names: dict[str, sql.Composable] = {
            "table": sql.Identifier(self.table),
            "operator": sql.SQL(OPERATORS[self.metric]),
            "k": sql.Literal(self.k),
            "vector": vector,
        }
        if self.filter is None:
            return filled("bench", "nearest", **names)
        names |= {
            "column": sql.Identifier(self.filter.column),
            "limit": sql.Literal(self.filter.limit),
        }
        return filled("bench", "nearest_below", **names)
