"""A filter passes exactly the rows that the same WHERE clause passes: every type, and NULL."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from psycopg import sql

from syncd.index.dataset import DatasetIndex
from syncd.index.filter.language import parse_filter
from syncd.index.storage.bitmap import live_slots
from syncd.postgres.layout import read_sources
from syncd.types import Key
from tests.oracle.columns import (
    ASCII,
    CASED,
    COLUMNS,
    CREATE,
    JSON_SAMPLES,
    NUMBERS,
    TEXTS,
    written,
)
from tests.oracle.conditions import condition, tables_and_filters

BATCH_ROWS = 5
CONDITIONS_AT_ONCE = 100


@pytest.fixture(scope="module")
def facts(shared_database: str) -> Iterator[psycopg.Connection]:
    """A connection with the table made and attached, in a transaction that is rolled back."""
    with (
        psycopg.connect(shared_database, autocommit=True) as connection,
        connection.transaction(force_rollback=True),
    ):
        connection.execute("SET LOCAL timezone = 'UTC'")
        for command in CREATE:
            connection.execute(command.encode())
        yield connection


def indexes_of(connection: psycopg.Connection, directory: Path) -> Iterator[DatasetIndex]:
    """An index of the table, empty and after each few of its rows, read as the service reads."""
    (source,) = [each for each in read_sources(connection) if each.table == "facts"]
    index = DatasetIndex.create(
        directory,
        metric="l2",
        key_kind="integer",
        dim=2,
        columns=source.attached_columns,
        chunk_bytes=64,
    )
    read = connection.execute(source.read_all(None, vectors=True)).fetchall()
    yield index
    for start in range(0, len(read), BATCH_ROWS):
        some = read[start : start + BATCH_ROWS]
        vectors = np.ones((len(some), 2), dtype=np.float32)
        index.apply([row[0] for row in some], vectors, [], columns=[row[5] for row in some])
        yield index


def insert(connection: psycopg.Connection, table: list[dict[str, Any]]) -> None:
    """Insert rows, numbered from 0."""
    names = list(table[0])
    query = sql.SQL("INSERT INTO facts (id, {}) VALUES ({}, {})").format(
        sql.SQL(", ").join(map(sql.Identifier, names)),
        sql.Placeholder("id"),
        sql.SQL(", ").join(map(sql.Placeholder, names)),
    )
    with connection.cursor() as cursor:
        cursor.executemany(query, [row | {"id": number} for number, row in enumerate(table)])


def compare(
    connection: psycopg.Connection, index: DatasetIndex, wanted: Sequence[dict[str, Any]]
) -> None:
    """Each filter finds in the index the indexed rows that its condition finds in the table."""
    asked = [msgspec.json.decode(msgspec.json.encode(each)) for each in wanted]
    for start in range(0, len(wanted), CONDITIONS_AT_ONCE):
        some = asked[start : start + CONDITIONS_AT_ONCE]
        query = sql.SQL("SELECT id, ARRAY[{}] FROM facts WHERE id = ANY({})").format(
            sql.SQL(", ").join(map(condition, some)),
            sql.Literal(list(index.view.keys(None, 1000).keys)),
        )
        found = connection.execute(query).fetchall()
        for place, each in enumerate(some):
            assert keys_of(index, each) == {key for key, answers in found if answers[place]}, each


@pytest.mark.parametrize("name", [*COLUMNS, "attributes.n"])
def test_every_comparison_of_every_kind_is_that_of_postgres(
    facts: psycopg.Connection, tmp_path: Path, name: str
) -> None:
    """All sample values against all sample operands; many pairs are nearly equal."""
    column = COLUMNS.get(name)
    samples = (
        [None, *column.samples]
        if column is not None
        else [written({"n": value}) for value in JSON_SAMPLES]
    )
    operands = column.asked_samples if column is not None else [*TEXTS, *NUMBERS, True, False]
    operators = (
        column.operators
        if column is not None
        else ("eq", "ne", "gt", "gte", "lt", "lte", "contains", "is")
    )
    wanted: list[dict[str, Any]] = [
        {name: {operator: operand}}
        for operator in operators
        for operand in operands
        if not (isinstance(operand, bool) and operator.startswith(("g", "l")))
    ]
    if column is None:
        arrays = [
            each
            for each in JSON_SAMPLES
            if isinstance(each, list) and each != [["a"]] and None not in each
        ]
        wanted += [{name: {"is": array}} for array in arrays] + [
            {name: {"is_array": flag}} for flag in (True, False)
        ]
    if column is None or column.compared == CASED:
        wanted += [{name: {"text_match": text}} for text in TEXTS]
        wanted += [{name: {"text_match_insensitive": text}} for text in ASCII]
    wanted += [
        {word: each if word == "not" else [each]} for each in wanted for word in ("not", "none")
    ] + [
        {name: None},
        {name: {"ne": None}},
        {name: {"in": operands}},
    ]
    with facts.transaction(force_rollback=True):
        insert(facts, [{name.partition(".")[0]: value} for value in samples])
        *_, index = indexes_of(facts, tmp_path)
        compare(facts, index, wanted)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)
@given(drawn=tables_and_filters())
def test_a_filter_is_a_where_clause(
    facts: psycopg.Connection,
    tmp_path: Path,
    drawn: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    """Random filters, also while rows come and the rows found before are extended."""
    table, wanted = drawn
    with facts.transaction(force_rollback=True):
        insert(facts, table)
        for index in indexes_of(facts, tmp_path):
            compare(facts, index, wanted)


def keys_of(index: DatasetIndex, wanted: dict[str, Any]) -> set[Key]:
    """Keys that pass a filter."""
    view = index.view
    passing = view.where(parse_filter(wanted, view.columns, "facts"))
    found = live_slots(passing.live.bits, view.count)
    assert passing.live.count == len(found)
    return set(view.keys_of(found))
