"""A source: a table that syncd follows, and the SQL that reads its rows.

The expressions come from ``syncd.present_rules``: attach compiled them, and Postgres prints them
with the present names. They are SQL text, not values, and run with the rights of syncd's role.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, LiteralString

from psycopg import sql

from syncd.keys import KEY_KINDS, TIMES, has_null, parse_key, parse_keys
from syncd.postgres.batch import Query
from syncd.shard import WHOLE, Shard
from syncd.statements import filled, number_list
from syncd.types import (
    AttachedColumn,
    ColumnKind,
    DatasetName,
    Key,
    KeyKind,
    Metric,
    split_dataset_name,
)

LOCK_PARTITIONS_UP_TO = 100
"""A pass locks a table and all its partitions if there are at most this many.

Each lock takes an entry of a table that the whole server shares: 9,000 locks have exhausted it and
failed other programs' transactions. With more partitions a pass locks the root alone, which keeps
each partition from being dropped, detached or altered. The planner locks the partitions of the
keys. Only the truncation of one partition can then be seen before the position includes it; its
marker in the outbox makes the next pass read the source again.
"""

GUESSED_KEYS = 100
"""Number of outbox rows whose table rows the first message of a pass reads at most."""

TRUE = sql.Literal(True)
ESCAPED = re.compile(r'["\\]')
"""Characters that have a backslash before them in an element of an array."""


@dataclass(frozen=True)
class Source:
    """One row of ``syncd.attachments``, with the present types of its columns.

    ``schema`` and ``table`` are ``None`` if the table was dropped. ``trouble`` is the reason why
    the source cannot be read as it is. ``arguments_md5`` covers all facts that an index depends on.
    """

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
    column_kinds: list[ColumnKind]
    arguments_md5: str
    send: str | None
    """Quoted name of the function that sends the vector in binary.

    ``None`` if the table or the column was dropped.
    """
    partitions: int | None = None
    """Number of partitions at all levels at the last look; ``None`` for a table without partitions.
    """
    arguments: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The arguments of attach, as the user gave them."""
    last_name: str | None = None
    """The table's name at the last look, quoted for SQL."""
    successor: str | None = None
    """If the table was dropped: another table with its name that is not attached, quoted for SQL.

    The name is the last one, or the name at attach.
    """
    trouble: str = ""
    dropped: frozenset[str] = frozenset()
    """The attached columns that no longer exist under their names."""
    shard: Shard = WHOLE
    """The shard whose rows are read."""

    @property
    def name(self) -> str:
        """The table's name for people."""
        return (
            f"{self.schema}.{self.table}"
            if self.table
            else f"dropped table {self.last_name or self.oid}"
        )

    def is_same(self, other: Source) -> bool:
        """Whether an index of one source is an index of the other.

        The id alone does not show it: a database that was turned back gives an id out again.
        """
        mine, others = (
            (
                each.id,
                each.oid,
                each.arguments_md5,
                each.key_kinds,
                each.vector_type,
                each.dimension,
                each.metric,
            )
            for each in (self, other)
        )
        return mine == others

    @property
    def key_kinds(self) -> list[KeyKind]:
        """Kinds of the key's columns, as the index distinguishes them.

        A type that cannot be a key (see ``trouble``) counts as text.
        """
        return [KEY_KINDS.get(name, "text") for name in self.key_types]

    @property
    def key_kind(self) -> KeyKind:
        """Kind of the source's keys in the index."""
        return self.key_kinds[0] if len(self.key) == 1 else "composite"

    @property
    def half(self) -> bool:
        """Whether the index stores two bytes per element."""
        return self.vector_type == "halfvec"

    @property
    def attached_columns(self) -> tuple[AttachedColumn, ...]:
        """The columns that a search may filter on, and how their values are compared."""
        return tuple(
            AttachedColumn(*column) for column in zip(self.columns, self.column_kinds, strict=True)
        )

    @property
    def identifier(self) -> sql.Identifier:
        """The table's name as SQL."""
        assert self.schema is not None
        assert self.table is not None
        return sql.Identifier(self.schema, self.table)

    @property
    def rows_from(self) -> sql.Composed:
        """The FROM item that reads exactly this source's rows."""
        return self.alone if self.partitions is None else sql.Composed([self.identifier])

    @property
    def alone(self) -> sql.Composed:
        """The table without its children."""
        return filled("passes", "one_table", table=self.identifier)

    def parse_key(self, text: str | int) -> Key:
        """A key of the outbox or of a row in syncd's own form; raises ``ValueError``."""
        return parse_key(self.key_kinds, text)

    def parse_keys(self, texts: Sequence[str | int]) -> list[Key]:
        """``parse_key`` for many keys."""
        return parse_keys(self.key_kinds, texts)

    def key_array(self, keys: Iterable[Key]) -> str:
        """Keys as the parameter of ``read_keys``: an array as PostgreSQL reads it.

        Numbers and uuids need no quotes.
        """
        if self.key_kind in ("integer", "uuid"):
            return "{" + ",".join(map(str, keys)) + "}"
        escaped = (ESCAPED.sub(r"\\\g<0>", str(key)) for key in keys)
        return "{" + ",".join(f'"{text}"' for text in escaped) + "}"

    def lock(self) -> sql.Composed:
        """Take ACCESS SHARE: no rewrite or truncation may empty the table before it is read.

        The pass takes its snapshot before it reads.
        """
        return filled("passes", "lock_source", source=self.locked)

    @property
    def locked(self) -> sql.Composable:
        """The table as LOCK names it: with its partitions if they are few."""
        alone = self.partitions is None or self.partitions > LOCK_PARTITIONS_UP_TO
        return self.alone if alone else self.identifier

    @cached_property
    def keys_query(self) -> bytes:
        """``read_keys`` as text: to put it together costs a fifth of a small pass."""
        return self.read_keys().as_bytes(None)

    def read(self, keys: Iterable[Key]) -> Query:
        """The statement that reads live rows by key.

        A plan that knows the keys skips partitions; one that is kept locks them all.
        """
        whole = self.partitions is None
        return Query(self.keys_query, [self.key_array(keys)], binary=True, prepare=whole)

    @cached_property
    def changed_query(self) -> bytes:
        """Live rows with keys among the first ``GUESSED_KEYS`` outbox rows since a position."""
        texts = filled(
            "passes", "changed_texts", source=sql.Literal(self.id), most=sql.Literal(GUESSED_KEYS)
        )
        return self.read_keys(texts=texts).as_bytes(None)

    def read_changed(self, xmax: int, sources: Iterable[int]) -> Query:
        """The statement that reads what changed since a position without open transactions.

        ``sources`` are those whose outbox rows count.
        """
        return Query(self.changed_query, [str(xmax), f"{{{number_list(sources)}}}"], binary=True)

    def read_keys(
        self, *, vectors: bool = True, texts: sql.Composable | None = None
    ) -> sql.Composed:
        """Live rows by key; without ``texts`` the only parameter is the keys.

        They are in the outbox's form.
        """
        texts = texts or filled("passes", "asked_texts")
        if len(self.key) > 1:
            return self.read_composite_keys(texts, vectors=vectors)
        column, kind = sql.Identifier(self.key[0]), self.key_kinds[0]
        keys = filled("passes", "keys", texts=texts, type=raw(self.key_types[0]))
        if kind in TIMES:
            keys = filled("passes", "time_keys", texts=texts, kind=sql.Identifier(kind))
        return self.read_rows("read_rows_by_key", vectors=vectors, column=column, keys=keys)

    def read_composite_keys(self, texts: sql.Composable, *, vectors: bool) -> sql.Composed:
        """Live rows by a key of several columns."""
        elements = [
            filled("passes", "element", place=sql.Literal(place), type=raw(kind))
            for place, kind in enumerate(self.key_types)
        ]
        match_columns: sql.Composable = TRUE
        if self.partitions is not None:
            match_columns = sql.SQL(" AND ").join(map(self.match_column, range(len(self.key))))
        return self.read_rows(
            "read_rows_by_composite_key",
            vectors=vectors,
            texts=texts,
            elements=sql.SQL(", ").join(elements),
            match_columns=match_columns,
        )

    def match_column(self, place: int) -> sql.Composed:
        """Condition: one column has the value that a composite key has in its place."""
        column, kind = sql.Identifier(self.key[place]), self.key_kinds[place]
        if kind in TIMES:
            return filled(
                "passes",
                "match_time_column",
                column=column,
                place=sql.Literal(place),
                kind=sql.Identifier(kind),
            )
        return filled(
            "passes",
            "match_column",
            column=column,
            place=sql.Literal(place),
            type=raw(self.key_types[place]),
        )

    def read_all(
        self, only: Sequence[DatasetName] | None, *, vectors: bool, failing: Sequence[Key] = ()
    ) -> sql.Composed:
        """All live rows, or those of the datasets ``only``, without the rows ``failing``.

        No expression runs on the rows ``failing``.
        """
        if not failing:
            return self.read_page(None, None, only, vectors=vectors)
        return self.read_rows(
            "read_all_but",
            vectors=vectors,
            failing=sql.SQL(", ").join(
                sql.SQL("({})").format(self.key_literal(key)) for key in failing
            ),
            match_datasets=self.match_datasets(only),
        )

    def read_page(
        self,
        after: Key | None,
        until: Key | None,
        only: Sequence[DatasetName] | None,
        *,
        vectors: bool = True,
    ) -> sql.Composed:
        """Live rows of one page of a scan: keys above ``after`` and up to ``until``.

        With ``only``: rows of these datasets.
        """
        return self.read_rows(
            "read_page",
            vectors=vectors,
            from_start=sql.Literal(after is None),
            after=self.key_literal(after),
            to_end=sql.Literal(until is None),
            until=self.key_literal(until),
            match_datasets=self.match_datasets(only),
        )

    def match_datasets(self, names: Sequence[DatasetName] | None) -> sql.Composable:
        """Condition: a row is in one of the datasets, or in any dataset for None."""
        if names is None:
            return TRUE
        wanted = sql.Literal([json.dumps(split_dataset_name(name)) for name in names])
        matches = filled(
            "passes",
            "match_datasets",
            project=raw(self.project),
            dataset=raw(self.dataset),
            wanted=wanted,
        )
        return self.if_mine(matches)

    @property
    def outbox_tells_shard(self) -> bool:
        """Whether a key's text in the outbox is that of the row, so that both have one bucket.

        Older triggers wrote the times of a composite key as the writer's session did.
        """
        return len(self.key) == 1 or TIMES.isdisjoint(self.key_kinds)

    @property
    def mine(self) -> sql.Composable:
        """Condition: a row is of the shard. It is not true for a row without a key."""
        if self.shard.is_whole:
            return TRUE
        return condition_of(self.shard, sql.SQL("{}::text").format(self.key_expression()))

    def if_mine(self, condition: sql.Composable, *, otherwise: bool = False) -> sql.Composable:
        """``condition`` for rows of the shard, ``otherwise`` for the other rows."""
        if self.shard.is_whole:
            return condition
        return filled(
            "passes",
            "if_mine",
            mine=self.mine,
            condition=condition,
            otherwise=sql.Literal(otherwise),
        )

    def read_page_end(self, after: Key | None, page_rows: int) -> sql.Composed:
        """The last key of the next page; without a row if fewer than ``page_rows`` are left."""
        return filled(
            "passes",
            "read_page_end",
            key=self.key_expression(),
            source=self.rows_from,
            from_start=sql.Literal(after is None),
            after=self.key_literal(after),
            key_columns=self.key_columns(),
            page_rows=sql.Literal(page_rows),
        )

    def plan(self) -> sql.Composed:
        """Parse and plan the rules, without reading a row: an error here is an error of a rule."""
        return filled("passes", "plan", query=self.read_all(None, vectors=False))

    def read_rows(self, name: str, *, vectors: bool, **parts: sql.Composable) -> sql.Composed:
        """A statement that reads live rows.

        Its columns: key, project, dataset, vector, fingerprint and attached columns. Vector and
        columns are NULL without ``vectors``; the columns are NULL also if none is attached.
        """
        return filled(
            "passes",
            name,
            key=self.key_expression(),
            project=raw(self.project),
            dataset=raw(self.dataset),
            vector=sql.Identifier(self.vector),
            send=raw(self.send or "byteasend"),
            key_columns=self.key_columns(),
            columns=sql.SQL(", ").join(map(sql.Identifier, self.columns)),
            sent_vector=sql.Identifier("syncd_r", "syncd_vector") if vectors else sql.NULL,
            sent_columns=sql.Identifier("syncd_r", "syncd_columns")
            if vectors and self.columns
            else sql.NULL,
            fingerprint=filled(
                "passes", "fingerprint_with_columns" if self.columns else "fingerprint"
            ),
            source=self.rows_from,
            **({"live": self.if_mine(raw(self.live))} | parts),
        )

    def may_lack_keys(self) -> sql.Composed:
        """Whether the table may have rows with a NULL in a key column."""
        return filled(
            "passes", "may_lack_keys", oid=sql.Literal(self.oid), key=sql.Literal(self.key)
        )

    def read_unkeyed(self) -> sql.Composed:
        """The live rows with a NULL in a key column: a label instead of the key, no vectors."""
        partitioned = sql.Literal(self.partitions is not None)
        return self.read_rows(
            "read_unkeyed_rows", vectors=False, partitioned=partitioned, live=raw(self.live)
        )

    def read_unkeyed_labels(self) -> sql.Composed:
        """The labels of all rows with a NULL in a key column, live or not."""
        return filled(
            "passes",
            "read_unkeyed_labels",
            key=self.key_expression(),
            partitioned=sql.Literal(self.partitions is not None),
            source=self.rows_from,
            key_columns=self.key_columns(),
        )

    def is_unkeyed(self, key: str) -> bool:
        """Whether a key of the outbox has a part that is NULL."""
        return len(self.key) > 1 and "null" in key and has_null(key)

    def key_columns(self) -> sql.Composed:
        """The key's columns, in the order of its index."""
        return sql.SQL(", ").join(sql.Identifier(column) for column in self.key)

    def key_expression(self) -> sql.Composable:
        """Expression for the key, in the form that ``parse_key`` takes."""
        if self.key_kind == "integer":
            return sql.Identifier(self.key[0])
        if self.key_kind == "composite":
            elements = sql.SQL(", ").join(map(self.key_element, range(len(self.key))))
            return filled("passes", "composite_key", columns=elements)
        return filled("passes", "text_key", column=self.key_element(0))

    def key_element(self, place: int) -> sql.Composable:
        """Expression for one key column, in the form that the trigger writes."""
        column = sql.Identifier(self.key[place])
        if self.key_kinds[place] in TIMES:
            return filled("passes", "time_column", column=column, type=raw(self.key_types[place]))
        return column

    def key_literal(self, key: Key | None) -> sql.Composed:
        """A key's elements as literals of the key columns' types; NULLs for None."""
        elements: list[str | int | None] = [key]
        if len(self.key) > 1:
            elements = [None] * len(self.key) if key is None else json.loads(str(key))
        return sql.SQL(", ").join(
            filled(
                "passes",
                "bound",
                value=sql.NULL if element is None else sql.Literal(str(element)),
                type=raw(kind),
            )
            for element, kind in zip(elements, self.key_types, strict=True)
        )


def condition_of(shard: Shard, key: sql.Composable) -> sql.Composed:
    """Condition: the expression ``key``, a key's text, is in one of a shard's buckets."""
    return filled(
        "passes",
        "mine",
        key=key,
        first=sql.Literal(shard.first_bucket),
        last=sql.Literal(shard.last_bucket),
    )


def raw(expression: LiteralString) -> sql.SQL:
    """An expression, or a type's name, that Postgres itself printed.

    Braces and percent signs in it are text, not placeholders: a ``RawCursor`` runs the statements
    of a source.
    """
    return sql.SQL(expression)
