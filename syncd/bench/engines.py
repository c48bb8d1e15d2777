"""Engines that a client searches: a syncd, or a pgvector table.

An engine is a value that is passed to the clients' processes. Each process opens it for itself.
Both are searched with as little work in the client as possible: the request is made before it is
timed, and the answer is decoded later, and only to measure recall.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import sql
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

from syncd.client import calls
from syncd.client.address import UnixAddress
from syncd.client.exchange import read_answer, request_line, take_result, unavailable
from syncd.errors import DatabaseError
from syncd.postgres.connection import open_session
from syncd.statements import filled, statement

OPERATORS = {"cosine": "<=>", "l2": "<->", "ip": "<#>"}
OPERATOR_CLASSES = {"cosine": "vector_cosine_ops", "l2": "vector_l2_ops", "ip": "vector_ip_ops"}
BINARY = 1
ANSWER_BYTES = 1 << 16
"""Bytes to read at once; an answer with 10 keys has 400 to 500."""
ERROR = b'"error":'
"""Part of every answer that is an error, and of no other: the keys are numbers."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Connected(Generic[T]):
    """An open connection. Only ``ask`` is timed."""

    request: Callable[[NDArray[np.float32]], bytes]
    """The request that searches for a vector."""
    ask: Callable[[bytes], T]
    """Send a request and wait for the whole answer; raises ``SyncdError`` if it is an error."""
    keys: Callable[[T], list[int]]
    """The keys in an answer, nearest first."""


class Found(msgspec.Struct):
    """The part of syncd's result that is decoded."""

    keys: list[int]


class FoundAnswer(msgspec.Struct):
    """syncd's answer to a search."""

    result: Found


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

    def open(self) -> AbstractContextManager[Connected[Any]]:
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
    def open(self) -> Iterator[Connected[bytes]]:
        """Connect. Requests and answers are lines, without a client library."""
        exact = self.recall == 1
        recall = None if exact else self.recall
        passing = None if self.filter is None else {self.filter.column: {"lt": self.filter.limit}}
        address = UnixAddress(self.socket)
        decode = msgspec.json.Decoder(FoundAnswer).decode

        def call(vector: NDArray[np.float32]) -> calls.Call[calls.Found[calls.Hit]]:
            return calls.search(
                self.dataset, vector, k=self.k, recall=recall, exact=exact, filter=passing
            )

        with socket.socket(socket.AF_UNIX) as link:
            try:
                link.connect(self.socket)
            except OSError as error:
                raise unavailable(address, error) from error
            send, receive = link.sendall, link.recv

            def ask(request: bytes) -> bytes:
                try:
                    send(request)
                    answer = receive(ANSWER_BYTES)
                    while answer[-1:] != b"\n":
                        more = receive(ANSWER_BYTES)
                        if not more:
                            raise ConnectionResetError
                        answer += more
                except OSError as error:
                    raise unavailable(address, error) from error
                if ERROR in answer:
                    take_result(call(np.empty(0, dtype=np.float32)), read_answer(answer))
                return answer

            yield Connected(
                lambda vector: request_line(1, call(vector)),
                ask,
                lambda answer: decode(answer).result.keys,
            )


@dataclass(frozen=True, slots=True)
class PgvectorEngine:
    """Searches by a prepared statement with binary vectors, by libpq's own calls."""

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
    def open(self) -> Iterator[Connected[PGresult]]:
        """Connect, set ``ef_search`` and prepare."""
        with self.connect() as connection:
            yield prepared(connection, self.query(sql.SQL("$1")).as_bytes(connection))

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


def prepared(connection: psycopg.Connection, query: bytes) -> Connected[PGresult]:
    """Searches by a query of one parameter, pgvector's vector, whose rows are bigint keys."""
    result = connection.pgconn.prepare(b"nearest", query)
    if result.error_message:
        raise DatabaseError(result.error_message.decode())
    execute, formats = connection.pgconn.exec_prepared, [BINARY]

    def ask(request: bytes) -> PGresult:
        answer = execute(b"nearest", [request], formats, BINARY)
        if answer.status != ExecStatus.TUPLES_OK:
            raise DatabaseError(answer.error_message.decode())
        return answer

    def keys(answer: PGresult) -> list[int]:
        found = b"".join(answer.get_value(row, 0) or b"" for row in range(answer.ntuples))
        return list(struct.unpack(f">{answer.ntuples}q", found))

    return Connected(
        lambda vector: struct.pack(">hh", len(vector), 0) + vector.astype(">f4").tobytes(),
        ask,
        keys,
    )
