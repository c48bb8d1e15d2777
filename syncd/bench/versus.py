"""A table that syncd follows and, to compare, the same table with an HNSW index.

Both are loaded, indexed and warm.
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
from syncd.bench.vector_set import K, Recall, Truth, VectorSet
from syncd.cores import memory_bytes
from syncd.errors import SettingsError

FOLLOWED, HNSW = "followed", "hnsw"
MAX_EF_SEARCH = 1000
GRAPH_BYTES = 400
"""Bytes of a row's neighbours in an HNSW graph with m = 16, and of its header."""


@dataclass(frozen=True, slots=True)
class Turns:
    """Seconds of each engine in each round, number of rounds, and whether pgvector is measured."""

    seconds: float
    rounds: int
    versus: bool


@dataclass(frozen=True, slots=True)
class Build:
    """Time from a loaded table until its index answers searches."""

    engine: str
    index: str
    rows: int
    seconds: float
    index_bytes: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Both tables, and the engines that search them."""

    where: Environment
    service: Serving
    metric: str
    index: str
    builds: list[Build]
    versus: bool
    filter: Below | None = None

    @property
    def approximate(self) -> bool:
        """Whether syncd's searches are approximate, so that their recall is to be measured."""
        return self.index == "codes"

    def syncd(self, recall: float) -> SyncdEngine:
        """syncd at a recall target; exact if the service has only an exact index."""
        target = 1.0 if self.index == "exact" else recall
        return SyncdEngine(str(self.service.socket), FOLLOWED, target, K, self.filter)

    def pgvector(self, ef_search: int | None) -> PgvectorEngine:
        """pgvector with this ``ef_search``; None: without the HNSW index."""
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
    """Load the first rows of a set, start syncd, and build both indexes one after the other.

    pgvector's table also gets a B-tree index on each column.
    """
    if versus and where.vector_type != "vector":
        raise SettingsError("the server has no pgvector", hint="omit --versus, or use: --embedded")
    create(where, FOLLOWED, vectors.dimension, columns)
    blocks = where.progress.track(
        vectors.blocks(0, rows), total=-(-rows // 1000), description=f"loading {rows} rows"
    )
    where.load(FOLLOWED, blocks, columns)
    where.run("vacuum", table=FOLLOWED)
    with serving(where) as service:
        with where.step("syncd: from attach to searchable"):
            begun = time.perf_counter()
            given: list[object] = [f"syncd_bench.{FOLLOWED}", vectors.metric, list(columns)]
            where.run("attach_with_columns", given)
            found = service.wait_searchable(FOLLOWED, rows)
            index = str(found.index)
            seconds = round(time.perf_counter() - begun, 2)
            builds = [Build("syncd", index, rows, seconds, found.bytes)]
        if versus:
            create(where, HNSW, vectors.dimension, columns)
            where.copy(HNSW)
            where.run("vacuum", table=HNSW)
            with where.step("pgvector: CREATE INDEX"):
                seconds = round(create_hnsw(where, vectors, rows), 2)
            size = where.value("index_bytes", [f"syncd_bench.{HNSW}"])
            builds.append(Build("pgvector", "hnsw", rows, seconds, size))
            for column in columns:
                where.run("create_btree", table=HNSW, column=column)
        yield Pair(where, service, vectors.metric, index, builds, versus)


def create(where: Environment, table: str, dimension: int, columns: Columns) -> None:
    """Create an empty table."""
    where.create(table, dimension)
    for column in columns:
        where.run("add_column", table=table, column=column)


def create_hnsw(where: Environment, vectors: VectorSet, rows: int) -> float:
    """Build the HNSW index; returns seconds.

    It gets the memory that the graph needs, at most a quarter of the machine's. A build that does
    not fit into memory is many times slower.
    """
    wanted = rows * (vectors.dimension * 4 + GRAPH_BYTES) * 5 // 4
    memory = memory_bytes() // 4
    kilobytes = min(max(wanted >> 10, 64 << 10), memory >> 10, 2**31 - 1)
    where.run("set_setting", ["maintenance_work_mem", f"{kilobytes}kB"])
    operators = OPERATOR_CLASSES[vectors.metric]
    begun = time.perf_counter()
    try:
        where.run("create_hnsw", table=HNSW, operators=operators)
    except psycopg.errors.DiskFull:
        # parallel workers share memory in /dev/shm, which has 64 MB in many containers
        where.run("set_setting", ["max_parallel_maintenance_workers", "0"])
        begun = time.perf_counter()
        where.run("create_hnsw", table=HNSW, operators=operators)
    return time.perf_counter() - begun


class Recalls:
    """The measured recall of engines. Each is measured once, which also warms it."""

    def __init__(self, searchers: Clients, truth: Truth) -> None:
        self.searchers = searchers
        self.truth = truth
        self.known: dict[Engine, Recall] = {}

    def of(self, engine: Engine) -> float:
        """Mean recall over the queries."""
        return self.measured(engine).mean

    def measured(self, engine: Engine) -> Recall:
        """Recall over the queries."""
        if engine not in self.known:
            self.known[engine] = self.truth.recall(*self.searchers.answers(engine))
        return self.known[engine]

    def bracket(
        self, make: Callable[[int | None], PgvectorEngine], wanted: float
    ) -> list[PgvectorEngine]:
        """The cheapest engine with the wanted recall; before it the best one below, if any.

        ``ef_search`` is found to 5 %. If even its maximum is not sufficient, a scan of the table
        is.
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
