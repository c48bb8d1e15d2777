"""What a client searches: a syncd, or a pgvector table. An engine is a value, handed to clients' processes; each opens it for itself."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql

from syncd.errors import DatabaseError
from syncd.rpc.client import Client
from syncd.statements import statement

OPERATORS = {"cosine": "<=>", "l2": "<->", "ip": "<#>"}
OPERATOR_CLASSES = {"cosine": "vector_cosine_ops", "l2": "vector_l2_ops", "ip": "vector_ip_ops"}
BINARY = 1

Search = Callable[[NDArray[np.float32]], list[int]]
"""The keys nearest to a vector, nearest first."""


class Engine(Protocol):
    """One way to search, at one setting."""

    @property
    def name(self) -> str:
        """Whose index it is."""
        ...

    @property
    def setting(self) -> str:
        """What decides on its recall."""
        ...

    def open(self) -> Search:
        """Connect; the connection ends with the process."""
        ...


@dataclass(frozen=True, slots=True)
class SyncdEngine:
    """Searches by RPC, at a recall target."""

    socket: str
    dataset: str
    recall: float
    k: int

    @property
    def name(self) -> str:
        """Whose index it is."""
        return "syncd"

    @property
    def setting(self) -> str:
        """What decides on its recall."""
        return "exact" if self.recall == 1 else f"recall {self.recall:g}"

    def open(self) -> Search:
        """Connect."""
        client = Client(self.socket, timeout=120.0)
        exact = self.recall == 1

        def search(vector: NDArray[np.float32]) -> list[int]:
            hits = client.search(self.dataset, vector, k=self.k, recall=None if exact else self.recall, exact=exact)
            return [int(str(hit.key)) for hit in hits]

        return search


@dataclass(frozen=True, slots=True)
class PgvectorEngine:
    """Searches by a prepared statement, vectors in binary, and libpq with as little Python about it as there can be."""

    conninfo: str
    table: str
    metric: str
    ef_search: int | None
    """None: without the index, row by row."""
    k: int

    @property
    def name(self) -> str:
        """Whose index it is."""
        return "pgvector"

    @property
    def setting(self) -> str:
        """What decides on its recall."""
        return "scan" if self.ef_search is None else f"ef_search {self.ef_search}"

    def open(self) -> Search:
        """Connect, set ``ef_search`` and prepare."""
        connection = psycopg.connect(self.conninfo, autocommit=True)
        connection.execute(statement("bench", "use_index"), [str(self.ef_search is not None)])
        if self.ef_search is not None:
            connection.execute(statement("bench", "set_ef_search"), [str(self.ef_search)])
        query = sql.SQL(statement("bench", "nearest")).format(
            table=sql.Identifier(self.table), operator=sql.SQL(OPERATORS[self.metric]), k=sql.Literal(self.k)
        )
        prepared = connection.pgconn.prepare(b"nearest", query.as_bytes(connection))
        if prepared.error_message:
            raise DatabaseError(prepared.error_message.decode())

        def search(vector: NDArray[np.float32]) -> list[int]:
            value = struct.pack(">hh", len(vector), 0) + vector.astype(">f4").tobytes()
            found = connection.pgconn.exec_prepared(b"nearest", [value], [BINARY], BINARY)
            if found.error_message:
                raise DatabaseError(found.error_message.decode())
            keys = b"".join(found.get_value(row, 0) or b"" for row in range(found.ntuples))
            return list(struct.unpack(f">{found.ntuples}q", keys))

        return search
