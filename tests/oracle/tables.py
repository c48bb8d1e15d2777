"""The tables that the oracle writes to, and the contents of a correct index of them.

Each row has a number ``n`` from which its key is computed, so one rule fits every kind of key.
PostgreSQL is always asked for the rows of a table. Only whether a vector can be indexed is decided
here.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, LiteralString

import numpy as np
import psycopg
from numpy.typing import NDArray

from syncd.client.calls import Key

Vectors = NDArray[np.float64]

DIMENSION = 4
TOPICS: tuple[str | None, ...] = ("a", "b", "Čeď/%", "d", "e", None)
"""Values of the column that selects the dataset. A live row without one is in no dataset."""

ANCHORED_TOPIC = "a"
ANCHORS = (-3, -2, -1)
"""Rows of the array tables that no rule changes.

They keep the dataset's dimension when a row of another length comes.
"""

MISFITS = (900, 901)
"""Numbers of rows that get a vector of another length.

They are fewer than the anchors, so the dataset's dimension does not change.
"""


@dataclass(frozen=True, eq=False)
class Table:
    """One source.

    ``key``: SQL expressions over ``n`` in the order of the key's columns. ``to_wire`` makes the
    form of a key in the RPC.
    """

    name: LiteralString
    columns: LiteralString
    key: Mapping[LiteralString, LiteralString]
    vector_type: LiteralString
    metric: str
    to_wire: Callable[[Sequence[Any]], Key]
    constraint: LiteralString = ""
    dataset: LiteralString = "topic"
    partition_by: LiteralString = ""
    partitions: Mapping[LiteralString, LiteralString] = field(default_factory=dict)
    """Partitions, each with its parent and its bounds. The anchors are in the last one."""

    @property
    def is_array(self) -> bool:
        """Whether the column is an array: it takes NaN, other lengths and NULL elements."""
        return self.vector_type.endswith("[]")

    @property
    def can_upsert(self) -> bool:
        """Whether ON CONFLICT works: not with a deferrable constraint."""
        return not self.constraint

    @property
    def key_columns(self) -> str:
        return ", ".join(self.key)

    def key_of(self, n: str) -> str:
        """The key's expressions for a number in SQL."""
        return ", ".join(expression.format(n=n) for expression in self.key.values())

    def set_key(self, n: str) -> str:
        """Assignments that give a row another number, and with it another key."""
        return ", ".join(
            ["n = " + n, *(f"{column} = {value.format(n=n)}" for column, value in self.key.items())]
        )

    def literal(self, vector: Sequence[float]) -> str:
        """A vector as this table's column reads it."""
        text = ",".join(repr(float(np.float32(element))) for element in vector)
        return f"{{{text}}}" if self.is_array else f"[{text}]"

    def create(self, connection: psycopg.Connection) -> None:
        """Make the table with its anchors, and attach it."""
        connection.execute(
            f"CREATE TABLE {self.name} (n integer NOT NULL, {self.columns}, "
            f"topic text, deleted_at timestamptz, v {self.vector_type}, "
            f"PRIMARY KEY ({self.key_columns}) {self.constraint}) {self.partition_by}".encode()
        )
        for partition, bounds in self.partitions.items():
            connection.execute(f"CREATE TABLE {partition} PARTITION OF {bounds}".encode())
        self.put_anchors(connection)
        connection.execute(
            "SELECT syncd.attach(%s, vector => 'v', project => %s, dataset => %s, "
            "live => 'deleted_at IS NULL', metric => %s)",
            [self.name, f"'{self.name}'", self.dataset, self.metric],
        )

    def put_anchors(self, connection: psycopg.Connection) -> None:
        """Insert the anchors; the table has none."""
        if self.is_array:
            rows = [(n, ANCHORED_TOPIC, self.literal([1, n, 2, n])) for n in ANCHORS]
            self.insert(connection, rows)

    def insert(
        self,
        connection: psycopg.Connection,
        rows: Sequence[tuple[int, str | None, str | None]],
        on_conflict: str = "",
    ) -> None:
        """Insert rows of number, topic and vector in one statement."""
        connection.execute(
            f"INSERT INTO {self.name} (n, {self.key_columns}, topic, v) "
            f"SELECT n, {self.key_of('n')}, topic, v::{self.vector_type} "
            "FROM unnest(%s::integer[], %s::text[], %s::text[]) AS r (n, topic, v) "
            f"{on_conflict}".encode(),
            [
                [n for n, _, _ in rows],
                [topic for _, topic, _ in rows],
                [vector for _, _, vector in rows],
            ],
        )

    def read(self, connection: psycopg.Connection) -> Expected:
        """The contents of a correct index of the table now."""
        expected = Expected()
        cursor = connection.execute(
            f"SELECT {self.dataset}, v::text, {self.key_columns} FROM {self.name} "
            "WHERE deleted_at IS NULL AND v IS NOT NULL".encode()
        )
        for topic, text, *key in cursor.fetchall():
            vector = self.indexable(text)
            if topic is None or vector is None:
                expected.quarantined.append(self.to_wire(key))
            else:
                expected.datasets.setdefault(f"{self.name}/{topic}", {})[self.to_wire(key)] = vector
        return expected

    def indexable(self, text: str) -> Vectors | None:
        """The vector rounded to float32, or None if it cannot be indexed."""
        if not self.is_array:
            elements = json.loads(text)
        elif text.count("{") != 1 or "NULL" in text or text == "{}":
            return None
        else:
            elements = [float(element) for element in text[1:-1].split(",")]
        with np.errstate(over="ignore"):
            vector = np.array(elements, dtype=np.float64).astype(np.float32).astype(np.float64)
        if len(vector) != DIMENSION or not np.isfinite(vector).all():
            return None
        return None if self.metric == "cosine" and not vector.any() else vector

    def nearest(
        self, connection: psycopg.Connection, topic: str, query: Vectors, k: int
    ) -> list[float] | None:
        """pgvector's answer: ascending distances; None for an array column."""
        if self.is_array:
            return None
        cursor = connection.execute(
            f"SELECT (v <-> %s::vector)::double precision FROM {self.name} "
            f"WHERE deleted_at IS NULL AND v IS NOT NULL AND {self.dataset} = %s "
            "ORDER BY 1 LIMIT %s".encode(),
            [self.literal(query.tolist()), topic, k],
        )
        return [float(row[0]) for row in cursor.fetchall()]


@dataclass
class Expected:
    """Datasets of one table with keys and vectors, and keys of live rows that cannot be indexed."""

    datasets: dict[str, dict[Key, Vectors]] = field(default_factory=dict)
    quarantined: list[Key] = field(default_factory=list)


def distances(metric: str, vectors: Vectors, query: Vectors) -> Vectors:
    """Distances as pgvector defines them: (n,) for vectors of (n, dimension)."""
    result: Vectors
    if metric == "l2":
        result = np.linalg.norm(vectors - query, axis=1)
    elif metric == "ip":
        result = -(vectors @ query)
    else:
        result = 1 - vectors @ query / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))
    return result


def bad_vectors(table: Table) -> list[str]:
    """Vectors of an array column that cannot be indexed; a zero vector has no direction."""
    bad = ["{NaN,1,2,3}", "{1,2,3,Infinity}", "{1,NULL,2,3}", "{}", "{{1,2},{3,4}}"]
    if table.metric == "cosine":
        bad.append("{0,0,0,0}")
    if table.vector_type == "double precision[]":
        bad.append("{1e300,0,0,0}")
    return bad


ITEMS = Table(
    name="items",
    columns="id bigint",
    key={"id": "{n}::bigint"},
    vector_type="vector(4)",
    metric="l2",
    to_wire=lambda key: int(key[0]),
)
DOCS = Table(
    name="docs",
    columns="id uuid",
    key={"id": "lpad(to_hex({n}), 32, 'a')::uuid"},
    vector_type="real[]",
    metric="cosine",
    to_wire=lambda key: str(uuid.UUID(str(key[0]))),
    dataset="lower(topic)",
)
NOTES = Table(
    name="notes",
    columns="slug text",
    key={"slug": """E'k\\'"\\\\é, ' || {n}"""},
    vector_type="double precision[]",
    metric="ip",
    to_wire=lambda key: str(key[0]),
)
PARTS = Table(
    name="parts",
    columns="tenant text, number bigint",
    key={"tenant": """E't "\\\\ü' || ({n}) %% 3""", "number": "{n}::bigint"},
    vector_type="real[]",
    metric="l2",
    to_wire=lambda key: (str(key[0]), int(key[1])),
    constraint="DEFERRABLE",
    dataset="topic || '+'",
)
SHELVES = Table(
    name="shelves",
    columns="number bigint, shelf smallint",
    key={
        "number": "{n}::bigint",
        "shelf": "(CASE WHEN {n} < 0 THEN 2 ELSE ({n}) %% 3 END)::smallint",
    },
    vector_type="real[]",
    metric="l2",
    to_wire=lambda key: (int(key[0]), int(key[1])),
    partition_by="PARTITION BY LIST (shelf)",
    partitions={
        "shelves_0": "shelves FOR VALUES IN (0) PARTITION BY HASH (number)",
        "shelves_0_even": "shelves_0 FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
        "shelves_0_odd": "shelves_0 FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
        "shelves_1": "shelves FOR VALUES IN (1)",
        "shelves_rest": "shelves DEFAULT",
    },
)
TABLES = (ITEMS, DOCS, NOTES, PARTS, SHELVES)
BY_NAME = {table.name: table for table in TABLES}
