"""A source: a table that syncd watches, and the SQL that reads its rows.

The expressions come from ``syncd.attachments``, where attach stored them as Postgres prints them back; they are SQL text, not values, and run
with the rights of the role that syncd connects as.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString

import psycopg
from psycopg import sql

from syncd.statements import statement
from syncd.types import AttachedColumn, ColumnKind, DatasetName, Key, KeyKind, Metric

KEY_KINDS: dict[str, KeyKind] = {
    "smallint": "integer",
    "integer": "integer",
    "bigint": "integer",
    "uuid": "uuid",
    "text": "text",
    "character varying": "text",
}

COLUMN_KINDS: dict[str, ColumnKind] = {
    "smallint": "integer",
    "integer": "integer",
    "bigint": "integer",
    "real": "real",
    "double precision": "number",
    "numeric": "number",
    "text": "text",
    "character varying": "text",
    "boolean": "boolean",
    "uuid": "uuid",
    "timestamp with time zone": "instant",
    "timestamp without time zone": "timestamp",
    "date": "date",
    "text[]": "text_array",
    "character varying[]": "text_array",
    "smallint[]": "integer_array",
    "integer[]": "integer_array",
    "bigint[]": "integer_array",
    "jsonb": "json",
}
"""What ``syncd.check_columns`` lets attach take."""


@dataclass(frozen=True, slots=True)
class Source:
    """One row of ``syncd.attachments``; ``schema`` and ``table`` are ``None`` when the table was dropped."""

    id: int
    oid: int
    schema: str | None
    table: str | None
    key: list[str]
    key_types: list[str]
    vector: str
    vector_type: str
    dimension: int | None
    project: str
    dataset: str
    live: str
    metric: Metric
    columns: list[str]
    arguments_md5: str
    send: str | None
    """The function that gives the vector's binary form, quoted; ``None`` when table or column were dropped."""
    column_types: list[str]
    """Of ``columns``, as the catalogue has them now; empty for one that was dropped."""

    @property
    def name(self) -> str:
        """The table's name for people."""
        return f"{self.schema}.{self.table}" if self.table else f"dropped table {self.oid}"

    @property
    def key_kind(self) -> KeyKind:
        """How the index stores this source's keys."""
        return KEY_KINDS[self.key_types[0]] if len(self.key) == 1 else "composite"

    @property
    def half(self) -> bool:
        """Whether the vectors are kept in two bytes an element."""
        return self.vector_type == "halfvec"

    @property
    def attached_columns(self) -> tuple[AttachedColumn, ...]:
        """The columns that a search may filter on, and how their values are compared."""
        kinds = (COLUMN_KINDS.get(kind, "text") for kind in self.column_types)
        return tuple(AttachedColumn(name, kind) for name, kind in zip(self.columns, kinds, strict=True))

    @property
    def identifier(self) -> sql.Identifier:
        """The table's name as SQL."""
        assert self.schema is not None
        assert self.table is not None
        return sql.Identifier(self.schema, self.table)

    def parse_key(self, text: str | int) -> Key:
        """A key as the outbox or a row has it, as syncd's own."""
        if self.key_kind == "integer":
            return int(text)
        if self.key_kind == "composite":
            return json.dumps(json.loads(str(text)), separators=(",", ":"), ensure_ascii=False)
        return str(text)

    def parse_keys(self, texts: Sequence[str | int]) -> list[Key]:
        """``parse_key`` of many."""
        return [int(text) for text in texts] if self.key_kind == "integer" else [self.parse_key(text) for text in texts]

    def key_array(self, keys: Sequence[str]) -> str | Sequence[str]:
        """Keys as the parameter of ``read_keys``. Numbers and uuids need no quoting, and one text is cheaper than a list."""
        return "{" + ",".join(keys) + "}" if self.key_kind in ("integer", "uuid") else keys

    def lock(self) -> sql.Composed:
        """Take ACCESS SHARE, so that no rewrite or truncation can empty the table between the snapshot and the reading."""
        return passes("lock_source").format(source=self.identifier)

    def read_keys(self, *, vectors: bool = True) -> sql.Composed:
        """Live rows by key; the one parameter is the keys, as the outbox has them."""
        if len(self.key) == 1:
            match = passes("match_keys").format(column=sql.Identifier(self.key[0]), type=raw(self.key_types[0]))
        else:
            elements = [
                passes("json_element").format(place=sql.Literal(place), type=raw(kind))
                for place, kind in enumerate(self.key_types)
            ]
            match = passes("match_composite_keys").format(
                columns=self.key_columns(), elements=sql.SQL(", ").join(elements)
            )
        return self.read_rows(match, vectors=vectors)

    def read_all(self, only: Sequence[DatasetName] | None, *, vectors: bool) -> sql.Composed:
        """All live rows, or those of the datasets ``only``."""
        return self.read_rows(passes("match_everything") if only is None else self.of_datasets(only), vectors=vectors)

    def read_range(self, after: Key | None, until: Key | None, only: Sequence[DatasetName] | None) -> sql.Composed:
        """Live rows of one page of a scan: keys above ``after`` and up to ``until``, of the datasets ``only`` if given."""
        matches: list[sql.Composable] = [self.after(after)]
        if until is not None:
            matches.append(passes("match_until").format(columns=self.key_columns(), until=self.key_literal(until)))
        if only is not None:
            matches.append(self.of_datasets(only))
        return self.read_rows(sql.SQL(" AND ").join(matches))

    def of_datasets(self, names: Sequence[DatasetName]) -> sql.Composed:
        """The rows of some datasets."""
        wanted = [json.dumps(split_dataset_name(name)) for name in names]
        return passes("match_datasets").format(
            project=raw(self.project), dataset=raw(self.dataset), wanted=sql.Literal(wanted)
        )

    def read_page_end(self, after: Key | None, page_rows: int) -> sql.Composed:
        """The last key of the next page; no row where fewer than ``page_rows`` are left."""
        return passes("read_page_end").format(
            key=self.key_expression(),
            source=self.identifier,
            after=self.after(after),
            columns=self.key_columns(),
            page_rows=sql.Literal(page_rows),
        )

    def read_rows(self, match: sql.Composable, *, vectors: bool = True) -> sql.Composed:
        """Key, project, dataset, vector, fingerprint and attached columns of the live rows that match.

        NULL for vector and columns where ``vectors`` are not wanted, and for the columns where there are none.
        """
        columns: sql.Composable = passes("not_sent")
        if self.columns:
            columns = passes("columns").format(columns=sql.SQL(", ").join(map(sql.Identifier, self.columns)))
        return passes("read_rows").format(
            key=self.key_expression(),
            project=raw(self.project),
            dataset=raw(self.dataset),
            vector=sql.Identifier(self.vector),
            send=raw(self.send or "byteasend"),
            hashed=self.key_columns(),
            columns=columns,
            sent=passes("sent_vector" if vectors else "not_sent"),
            sent_columns=passes("sent_columns" if vectors and self.columns else "not_sent"),
            fingerprint=passes("fingerprint_with_columns" if self.columns else "fingerprint"),
            source=self.identifier,
            match=match,
            live=raw(self.live),
        )

    def after(self, key: Key | None) -> sql.Composed:
        """The rows above a key."""
        if key is None:
            return sql.Composed([passes("match_everything")])
        return passes("match_after").format(columns=self.key_columns(), after=self.key_literal(key))

    def key_columns(self) -> sql.Composed:
        """The key's columns, in the order of its index."""
        return sql.SQL(", ").join(sql.Identifier(column) for column in self.key)

    def key_expression(self) -> sql.Composable:
        """The key as ``parse_key`` takes it."""
        if self.key_kind == "integer":
            return sql.Identifier(self.key[0])
        if self.key_kind == "composite":
            return passes("composite_key").format(columns=self.key_columns())
        return passes("text_key").format(column=sql.Identifier(self.key[0]))

    def key_literal(self, key: Key) -> sql.Composed:
        """A key's elements as literals of the key columns' types."""
        elements = json.loads(key) if self.key_kind == "composite" and isinstance(key, str) else [key]
        return sql.SQL(", ").join(
            passes("literal_element").format(value=sql.Literal(str(element)), type=raw(kind))
            for element, kind in zip(elements, self.key_types, strict=True)
        )


def passes(name: str) -> sql.SQL:
    """A statement, or a part of one, of ``queries/passes.sql``."""
    return sql.SQL(statement("passes", name))


def raw(expression: LiteralString) -> sql.SQL:
    """An expression, or a type's name, that Postgres itself printed. Braces and percent signs in it are text, not placeholders: the
    statements of a source are run by a ``RawCursor``."""
    return sql.SQL(expression)


def split_dataset_name(name: DatasetName) -> tuple[str, str]:
    """Project and dataset as the user's expressions give them."""
    project, _, dataset = name.partition("/")
    return project.replace("%2F", "/").replace("%25", "%"), dataset


def read_sources(connection: psycopg.Connection) -> list[Source]:
    """All sources, in the order in which they were attached."""
    return [Source(*row) for row in connection.execute(statement("sources", "read_attachments")).fetchall()]


def read_fingerprint_probe(connection: psycopg.Connection) -> int:
    """A number that depends on the server's way to hash, as fingerprints do: on its version, and on its byte order."""
    row = connection.execute(statement("passes", "read_fingerprint_probe")).fetchone()
    assert row is not None
    return int(row[0])
