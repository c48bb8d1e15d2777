"""Searches from SQL, alongside pgvector at equal recall, the RPC, and psycopg at the listener.

The server has both extensions: dblink and pgvector.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg.pq.abc import PGresult

from syncd.bench import engines
from syncd.bench.clients import clients
from syncd.bench.engines import Connected
from syncd.bench.environment import Environment
from syncd.bench.reported import report
from syncd.bench.search import Comparison, Ladder, Point, compare, take_turns
from syncd.bench.vector_set import K, VectorSet, truth
from syncd.bench.versus import FOLLOWED, Build, Pair, Turns, pair
from syncd.cli.bench_options import prepared
from syncd.client.client import Client
from syncd.cores import memory_bytes
from syncd.errors import SettingsError
from tests.integration.searching import PGVECTOR, programs_with_dblink, settings_with_pgvector
from tests.servers import PostgresServer, free_port

TOKEN = "of the benchmark"  # noqa: S105 - listens on 127.0.0.1


@dataclass(frozen=True, slots=True)
class Targeted:
    """A way to search for a recall target, at an address."""

    address: str
    recall: float

    @property
    def setting(self) -> str:
        """The recall target."""
        return f"recall {self.recall:g}"


@dataclass(frozen=True, slots=True)
class ClientEngine(Targeted):
    """The RPC over TCP, by ``syncd.connect``."""

    name: str = "syncd client"

    @contextmanager
    def open(self) -> Iterator[Connected[list[Any]]]:
        """Connect."""
        with Client(self.address, token=TOKEN) as client:
            yield Connected(
                lambda vector: vector.astype(np.float32).tobytes(),
                lambda request: client.search(
                    FOLLOWED, np.frombuffer(request, np.float32), k=K, recall=self.recall
                ),
                lambda hits: [hit.key for hit in hits],
            )


@dataclass(frozen=True, slots=True)
class PsycopgEngine(Targeted):
    """The listener, by psycopg, with the vector as a text."""

    name: str = "psycopg"

    @contextmanager
    def open(self) -> Iterator[Connected[list[tuple[str, float]]]]:
        """Connect. From the first execution on the statement is prepared."""
        query = (
            f"SELECT key, distance FROM search('{FOLLOWED}', %s, k => {K}, "
            f"recall => {self.recall:g})"
        ).encode()
        with psycopg.connect(self.address, autocommit=True) as connection:
            yield Connected(
                text_of,
                lambda request: connection.execute(
                    query, (request.decode(),), prepare=True
                ).fetchall(),
                lambda rows: [int(key) for key, _ in rows],
            )


@dataclass(frozen=True, slots=True)
class JoinedEngine(Targeted):
    """``syncd.search`` in a statement of PostgreSQL, joined with the table.

    ``limit`` is the session's statement_timeout; with "0" it has none.
    """

    name: str = "syncd.search"
    limit: str = "10s"

    @contextmanager
    def open(self) -> Iterator[Connected[PGresult]]:
        """Connect and prepare, as pgvector's engine does."""
        query = (
            f"SELECT c.id FROM syncd.search('{FOLLOWED}', $1::vector, {K}, "
            f"recall => {self.recall:g}) AS s "
            f"JOIN syncd_bench.{FOLLOWED} AS c ON c.id = s.key::bigint ORDER BY s.distance"
        )
        options = f"-c statement_timeout={self.limit}"
        with psycopg.connect(self.address, autocommit=True, options=options) as connection:
            yield engines.prepared(connection, query.encode())


@dataclass(frozen=True, slots=True)
class SqlReport:
    """The build, all measurements, and the rate of ``syncd.search`` alongside pgvector's."""

    vectors: str
    rows: int
    dimension: int
    builds: list[Build]
    points: list[Point]
    comparisons: list[Comparison]


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the service listens."""

    rpc: int
    sql: int


@contextmanager
def searchable(readers: int | None = None) -> Iterator[tuple[Environment, Ports]]:
    """A server with dblink and pgvector, and a service of both protocols over TCP."""
    programs = programs_with_dblink().get(PGVECTOR)
    if programs is None:
        raise SettingsError(
            f"no PostgreSQL {PGVECTOR} with dblink is installed",
            hint='eval "$(.ci/run servers)"',
        )
    settings = settings_with_pgvector() | {"shared_buffers": f"{memory_bytes() // 4 >> 20}MB"}
    ports = Ports(free_port(), free_port())
    with ExitStack() as stack:
        server = stack.enter_context(PostgresServer(PGVECTOR, programs=programs, settings=settings))
        server.execute("CREATE EXTENSION dblink; CREATE EXTENSION vector")
        where = stack.enter_context(prepared(server.conninfo(), None, False, readers))
        target = f"host=127.0.0.1 port={ports.sql} password='{TOKEN}'"
        where.connection.execute("SELECT syncd.connect_search(%s)", [target])
        variables = {
            "SYNCD_LISTEN": f"127.0.0.1:{ports.rpc}",
            "SYNCD_SQL_LISTEN": f"127.0.0.1:{ports.sql}",
            "SYNCD_TOKEN": TOKEN,
        }
        yield replace(where, variables=variables), ports


def measure(
    vectors: VectorSet,
    *,
    recalls: list[float],
    client_numbers: list[int],
    turns: Turns,
    readers: int | None,
) -> SqlReport:
    """Load, build, find the settings of equal recall, and measure all ways in turn."""
    with ExitStack() as stack:
        where, ports = stack.enter_context(searchable(readers))
        exact = truth(
            vectors.base,
            vectors.queries,
            vectors.metric,
            track=where.track,
            neighbors=vectors.neighbors,
        )
        both = stack.enter_context(pair(where, vectors, len(vectors.base), versus=turns.versus))
        together = sum(client_numbers)
        sets = [
            stack.enter_context(clients(number, vectors.queries, together))
            for number in client_numbers
        ]
        measured, _ = report(both, sets[-1], exact, recalls)
        ladder: Ladder = {}
        with where.step("settings of equal recall"):
            for target in recalls:
                joined = JoinedEngine(where.conninfo, target)
                wanted = measured.of(joined)
                ladder[joined] = measured.bracket(both.pgvector, wanted) if turns.versus else []
                ladder[replace(joined, name="syncd.search, no limit", limit="0")] = []
                ladder |= {each: [] for each in beside(both, ports, target)}
        ways = list(
            dict.fromkeys(each for mine, others in ladder.items() for each in (mine, *others))
        )
        points = [
            point
            for searchers in sets
            for point in take_turns(
                where, searchers.asking(measured.searchers.queries), ways, measured, turns
            )
        ]
        return SqlReport(
            vectors.name,
            len(vectors.base),
            vectors.dimension,
            both.builds,
            points,
            compare(ladder, points),
        )


def beside(both: Pair, ports: Ports, target: float) -> list[Any]:
    """The ways without PostgreSQL: the RPC as bytes, by the client, and the listener by psycopg."""
    rpc = f"tcp://127.0.0.1:{ports.rpc}"
    sql = f"host=127.0.0.1 port={ports.sql} user=any dbname=any password='{TOKEN}'"
    return [both.syncd(target), ClientEngine(rpc, target), PsycopgEngine(sql, target)]


def text_of(vector: NDArray[np.float32]) -> bytes:
    """A vector as clients write it in SQL."""
    return f"[{','.join(map(str, vector.tolist()))}]".encode()
