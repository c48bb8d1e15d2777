"""The attached tables with their present layout: types of columns, and troubles."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import psycopg

from syncd.keys import KEY_KINDS, TIMES
from syncd.postgres.source import Source
from syncd.postgres.vectors import VECTOR_TYPES
from syncd.shard import WHOLE, Shard
from syncd.statements import statement
from syncd.types import ColumnKind


def read_sources(connection: psycopg.Connection, shard: Shard = WHOLE) -> list[Source]:
    """All sources, in the order of their attachment, to read the rows of ``shard``."""
    sources = [
        replace(Source(*row), shard=shard)
        for row in connection.execute(statement("sources", "read_attachments")).fetchall()
    ]
    layouts = {
        row[0]: row[1:]
        for row in connection.execute(statement("catalogue", "read_layouts")).fetchall()
    }
    return [as_it_is_now(source, *layouts[source.id]) for source in sources if source.id in layouts]


def as_it_is_now(
    source: Source,
    key_types: Sequence[str | None],
    vector_type: str | None,
    dimension: int | None,
    column_kinds: Sequence[ColumnKind | Literal[""] | None],
) -> Source:
    """The source with the present types of its columns; they may have changed since attach."""
    trouble = layout_trouble(source, key_types, vector_type, column_kinds)
    if not trouble:
        source = replace(source, column_kinds=[kind for kind in column_kinds if kind])
        present = [kind for kind in key_types if kind is not None]
        source = replace(
            source, key_types=present, vector_type=str(vector_type), dimension=dimension
        )
    # A longer integer is the same key. Another kind of key, vector or attached column, or another
    # dimension, makes another index.
    kinds = [KEY_KINDS.get(kind, kind) for kind in source.key_types]
    depends_on = json.dumps(
        [source.arguments_md5, kinds, source.vector_type, source.dimension, source.column_kinds]
    )
    digest = hashlib.md5(depends_on.encode(), usedforsecurity=False).hexdigest()
    dropped = frozenset(
        name for name, kind in zip(source.columns, column_kinds, strict=True) if kind is None
    )
    return replace(source, arguments_md5=digest, trouble=trouble, dropped=dropped)


def layout_trouble(
    source: Source,
    key_types: Sequence[str | None],
    vector_type: str | None,
    column_kinds: Sequence[ColumnKind | Literal[""] | None],
) -> str:
    """Reason why the table cannot be read as key, vector and columns; empty if it can."""
    if source.table is None:
        if source.successor is not None and source.successor != source.last_name:
            return (
                f"the table was dropped, and {source.successor} has its former name now: "
                f"run: {like_before(source)}"
            )
        again = f"; or, if it was created again: {like_before(source)}" if source.last_name else ""
        return f"the table was dropped: run: syncd detach {source.oid}{again}"
    attached = list(zip(source.columns, column_kinds, strict=True))
    for name, kind in (
        *zip(source.key, key_types, strict=True),
        (source.vector, vector_type),
        *attached,
    ):
        if kind is None:
            return f"there is no column {name}"
    for name, kind in zip(source.key, key_types, strict=True):
        if kind not in KEY_KINDS:
            return f"column {name} is of type {kind}, which cannot be a key"
    for name, before, kind in zip(source.key, source.key_types, key_types, strict=True):
        kinds = {KEY_KINDS.get(before), KEY_KINDS[str(kind)]}
        # The triggers write times in another form than other keys.
        if len(kinds) == 2 and kinds & TIMES:
            return f"column {name} was of type {before} and is of type {kind} now"
    if vector_type not in VECTOR_TYPES:
        return f"column {source.vector} is of type {vector_type}, which holds no vector"
    for name, kind in attached:
        if kind == "":
            return f"column {name} was given a type or a collation that cannot be filtered on"
    return ""


def like_before(source: Source) -> str:
    """Command that attaches a table in place of a dropped table with the same name."""
    return f"syncd attach {shlex.quote(source.successor or source.last_name or '')} --like-before"
