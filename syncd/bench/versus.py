"""A table that syncd follows and, to compare, the same table with an HNSW index; both loaded,
indexed and warm.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg

from syncd.bench.clients import Clients
from syncd.bench.engines import OPERATOR_CLASSES, Below, Engine, PgvectorEngine, SyncdEngine
from syncd.bench.environment import NO_COLUMNS, Columns, Environment, Serving, serving
from syncd.bench.vector_set import K, Truth, VectorSet
from syncd.cores import memory_bytes
from syncd.errors import SettingsError

FOLLOWED, HNSW = "followed", "hnsw"
MAX_EF_SEARCH = 1000
GRAPH_BYTES = 400
"""A row's neighbours in an HNSW graph with m = 16, and its head."""


@dataclass(frozen=True, slots=True)
class Turns:
    """How long each engine runs in each round, how many rounds there are, and whether pgvector is
    one.
    """

    seconds: float
    rounds: int
    versus: bool


@dataclass(frozen=True, slots=True)
class Build:
    """From a loaded table to one that is searched by its index."""

    engine: str
    index: str
    rows: int
    seconds: float
    index_bytes: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Both tables and what searches them."""

    where: Environment
    service: Serving
    metric: str
    index: str
    builds: list[Build]
    versus: bool
    filter: Below | None = None

    def syncd(self, recall: float) -> SyncdEngine:
        """Searches at a recall target; ``exact`` where the service has no other index."""
        return SyncdEngine(
            str(self.service.socket),
            FOLLOWED,
            1.0 if self.index == "exact" else recall,
            K,
            self.filter,
        )

    def pgvector(self, ef_search: int | None) -> PgvectorEngine:
        """Searches of the HNSW index."""
        return PgvectorEngine(self.where.conninfo, HNSW, self.metric, ef_search, K, self.filter)


@contextmanager
def pair(
    where: Environment,
    vectors: VectorSet,
    rows: int,
    *,
    versus: bool,
    columns: Columns = NO_COLUMNS,
) -> Iterator[Pair]:
    """Load the first rows of a set, start syncd, and build both indexes one after the other;
    pgvector's table has one on each column too.
    """
    if versus and where.vector_type != "vector":
        raise SettingsError(
            "the server has no pgvector", hint="leave --versus out, or use: --embedded"
        )
    create(where, FOLLOWED, vectors.dimension, columns)
    blocks = where.progress.track(
        vectors.blocks(0, rows), total=-(-rows // 1000), description=f"loading {rows} rows"
    )
    where.load(FOLLOWED, blocks, columns)
    where.run("vacuum", table=FOLLOWED)
    with serving(where) as service:
        with where.step("syncd: from attach to searchable"):
            begun = time.perf_counter()
            where.run(
                "attach_with_columns", [f"syncd_bench.{FOLLOWED}", vectors.metric, list(columns)]
            )
            found = service.wait_searchable(FOLLOWED, rows)
            index = str(found.index)
            builds = [
                Build("syncd", index, rows, round(time.perf_counter() - begun, 2), found.bytes)
            ]
        if versus:
            create(where, HNSW, vectors.dimension, columns)
            where.copy(HNSW)
            where.run("vacuum", table=HNSW)
            with where.step("pgvector: CREATE INDEX"):
                seconds = create_hnsw(where, vectors, rows)
            builds.append(
                Build(
                    "pgvector",
                    "hnsw",
                    rows,
                    round(seconds, 2),
                    where.value("index_bytes", [f"syncd_bench.{HNSW}"]),
                )
            )
            for column in columns:
                where.run("create_btree", table=HNSW, column=column)
        yield Pair(where, service, vectors.metric, index, builds, versus)


def create(where: Environment, table: str, dimension: int, columns: Columns) -> None:
    """An empty table."""
    where.create(table, dimension)
    for column in columns:
        where.run("add_column", table=table, column=column)


def create_hnsw(where: Environment, vectors: VectorSet, rows: int) -> float:
    """With the memory that the graph needs, at most a quarter of the machine's: a build that does
    not fit is many times slower.
    """
    wanted = rows * (vectors.dimension * 4 + GRAPH_BYTES) * 5 // 4
    memory = memory_bytes() // 4
    where.run(
        "set_setting",
        ["maintenance_work_mem", f"{min(max(wanted >> 10, 64 << 10), memory >> 10, 2**31 - 1)}kB"],
    )
    operators = OPERATOR_CLASSES[vectors.metric]
    begun = time.perf_counter()
    try:
        where.run("create_hnsw", table=HNSW, operators=operators)
    except (
        psycopg.errors.DiskFull
    ):  # parallel workers share memory by /dev/shm, which is 64 MB in many containers
        where.run("set_setting", ["max_parallel_maintenance_workers", "0"])
        begun = time.perf_counter()
        where.run("create_hnsw", table=HNSW, operators=operators)
    return time.perf_counter() - begun


class Recalls:
    """The measured recall of engines, each asked once; which also warms them."""

    def __init__(self, searchers: Clients, truth: Truth) -> None:
        self.searchers = searchers
        self.truth = truth
        self.known: dict[Engine, tuple[float, int]] = {}

    def of(self, engine: Engine) -> float:
        """Mean recall over the queries."""
        if engine not in self.known:
            numbers, answers = self.searchers.answers(engine)
            self.known[engine] = (self.truth.recall(numbers, answers), len(numbers))
        return self.known[engine][0]

    def queries(self, engine: Engine) -> int:
        """How many queries that was measured with."""
        return self.known[engine][1]

    def bracket(
        self, make: Callable[[int | None], PgvectorEngine], wanted: float
    ) -> list[PgvectorEngine]:
        """The cheapest engine whose recall is at least the wanted one, and before it the best one
        below, where there is one.

        ``ef_search`` to 5 %; where even the largest one is not enough, a scan of the table is.
        """
        low, high = K, MAX_EF_SEARCH
        if self.of(make(low)) >= wanted:
            return [make(low)]
        if self.of(make(high)) < wanted:
            return [make(high), make(None)]
        while high - low > max(1, low // 20):
            middle = round((low * high) ** 0.5)  # recall grows with the logarithm
            middle = min(max(middle, low + 1), high - 1)
            if self.of(make(middle)) >= wanted:
                high = middle
            else:
                low = middle
        return [make(low), make(high)]
