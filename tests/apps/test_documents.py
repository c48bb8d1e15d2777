"""Behaviour of both stores: the table's metric, refused documents, a table that is made again."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any

import numpy as np
import psycopg
import pytest

from syncd.apps.contents import Document
from syncd.apps.documents import Documents
from syncd.errors import DatabaseError, InvalidDocument, SettingsError
from syncd.testing import Throwaway
from syncd.types import Metric

Opening = Callable[..., Documents]
SEVEN: Any = 7
NOTHING: Any = None
"""Values that are not text, given as text."""


@pytest.fixture
def opened(running: Throwaway) -> Iterator[Opening]:
    """Open stores of the test's own table and collection, with other arguments if given."""
    some: list[Documents] = []
    name = f"t{uuid.uuid4().hex}"

    def make(**arguments: Any) -> Documents:
        given: dict[str, Any] = {
            "dsn": running.dsn,
            "table": name,
            "collection": "c",
            "address": running.socket,
        }
        some.append(Documents(**given | arguments))
        return some[-1]

    yield make
    for each in some:
        each.close()
    with psycopg.connect(running.dsn, autocommit=True) as connection:
        # a dropped table's source fails until it is detached
        connection.execute(
            "SELECT syncd.detach(%s) WHERE to_regclass(%s) IS NOT NULL", [name, name]
        )
        connection.execute(
            "SELECT syncd.unregister(a.id) FROM syncd.attachments AS a WHERE NOT EXISTS (SELECT "
            "FROM pg_class AS c WHERE c.oid = a.source)"
        )


@pytest.fixture
def store(opened: Opening) -> Documents:
    return opened()


def ids(store: Documents, vector: Any = (1.0, 0.0)) -> list[str]:
    return [found.document.id for found in store.search(vector, 10)]


# The metric


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_a_store_has_the_metric_of_its_table(opened: Opening, metric: Metric) -> None:
    first = opened(metric=metric)
    first.write([Document("a", "")], [[3.0, 4.0]])
    second = opened()
    assert (first.metric, second.metric) == (metric, metric)
    distance = {"l2": math.sqrt(20), "ip": -3.0, "cosine": 0.4}[metric]
    assert [round(found.distance, 5) for found in second.search([1.0, 0.0], 1)] == [
        pytest.approx(distance, abs=1e-4)
    ]


def test_another_metric_than_the_tables_is_an_error_at_opening(opened: Opening) -> None:
    opened(metric="l2")
    with pytest.raises(
        SettingsError, match="is attached with metric 'l2', expected 'cosine'"
    ) as caught:
        opened(metric="cosine")
    assert caught.value.hint == "open it without `metric`, or with metric='l2'"
    assert opened(metric="l2").metric == "l2"


# Documents that could not be found afterwards


@pytest.mark.parametrize(
    ("vector", "reason"),
    [
        ([1.0, 2.0, 3.0], "its vector has 3 dimensions, the vectors of collection 'c' have 2"),
        ([1.0], "its vector has 1 dimensions"),
        ([], "its vector has no elements"),
        (None, "it has no vector"),
        ([math.nan, 1.0], "a NaN or an infinity"),
        ([1e39, 1.0], "a NaN or an infinity"),
        ([0.0, 0.0], "zero norm"),
        ([1e-60, 0.0], "zero norm"),
        (["x", "y"], "not a list of numbers"),
        ([[1.0, 2.0]], "not a list of numbers"),
        ([None, 1.0], "a NaN or an infinity"),
        ([{}, 1.0], "not a list of numbers"),
        ([10**400, 1.0], "not a list of numbers"),
    ],
)
def test_a_vector_that_cannot_be_indexed_is_refused_by_its_documents_id(
    store: Documents, vector: Any, reason: str
) -> None:
    """The write of which it is a part stores nothing."""
    store.write([Document("good", "before"), Document("other", "")], [[1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(InvalidDocument) as caught:
        store.write([Document("good", "after"), Document("bad", "")], [[1.0, 0.0], vector])
    assert "nothing was written: 1 of 2 documents cannot be stored: 'bad': " in str(caught.value)
    assert reason in str(caught.value)
    assert caught.value.hint
    assert isinstance(caught.value, ValueError)
    found = {each.document.id: each.document.content for each in store.search([1.0, 0.0], 10)}
    assert found == {"good": "before", "other": ""}


def test_the_first_write_of_a_collection_has_vectors_of_one_length(store: Documents) -> None:
    documents = [Document(name, "") for name in "abcde"]
    with pytest.raises(InvalidDocument, match="2 of 5 documents") as caught:
        store.write(documents, [[1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0]])
    assert "'a': its vector has 1 dimensions, most vectors of this write have 2; 'd': " in str(
        caught.value
    )
    assert ids(store) == []


def test_a_collection_whose_documents_are_all_replaced_or_deleted_takes_another_length(
    store: Documents,
) -> None:
    for number in range(5):
        store.write([Document("a", ""), Document("b", "")], [[1.0, 0.0], [0.0, 1.0]])
        assert ids(store) == ["a", "b"]
        store.write([Document("a", ""), Document("b", "")], [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        assert ids(store, (1.0, 0.0, 0.0)) == ["a", "b"]
        store.delete()
        store.write([Document("d", str(number))], [[1.0]])
        assert ids(store, (1.0,)) == ["d"]
        store.delete()


def test_the_first_of_two_first_writes_at_once_decides_the_length(opened: Opening) -> None:
    stores = [opened(collection="raced"), opened(collection="raced")]

    def write(number: int) -> bool:
        try:
            stores[number].write([Document(f"{number}", "")], [[1.0] * (number + 2)])
        except InvalidDocument:
            return False
        return True

    with ThreadPoolExecutor(2) as threads:
        for _ in range(15):
            written = list(threads.map(write, (0, 1)))
            assert sorted(written) == [False, True]
            assert ids(stores[0], [1.0] * (2 + written.index(True))) == [str(written.index(True))]
            stores[0].delete()


# Text and metadata


class Color(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (datetime(2024, 2, 29, 12, 30, tzinfo=UTC), "2024-02-29T12:30:00+00:00"),
        (date(2024, 2, 29), "2024-02-29"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Decimal("1.50"), 1.5),
        (Decimal(10), 10),
        (np.int64(7), 7),
        (np.float32(0.5), 0.5),
        (np.float64(0.25), 0.25),
        (np.longdouble(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("x"), "x"),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.datetime64("2024-02-29T12:30:00", "ns"), "2024-02-29T12:30:00"),
        (Color.RED, "red"),
        (("a", 1), ["a", 1]),
        ({"deep": {"est": np.int8(1)}, 5: None}, {"deep": {"est": 1}, "5": None}),
        (10**300, 10**300),
        ("\U0001f600 \\u0000", "\U0001f600 \\u0000"),
    ],
    ids=repr,
)
def test_metadata_is_stored_as_json_and_found_by_the_value_that_was_given(
    store: Documents, given: Any, stored: Any
) -> None:
    store.write(
        [Document("a", "", {"key": given}), Document("b", "", {"key": "other"})],
        [[1.0, 0.0], [1.0, 0.0]],
    )
    (document,) = store.read(["a"])
    assert document.metadata == {"key": stored}
    assert type(document.metadata["key"]) is type(stored)
    if not isinstance(given, dict | int):
        asked = {"metadata": {"path": ["key"], "eq": given}}
        if isinstance(stored, list):
            asked = {"metadata": {"path": ["key"], "is_array": True}}
        assert [found.document.id for found in store.search([1.0, 0.0], 10, asked)] == ["a"]


@pytest.mark.parametrize(
    "given",
    [
        math.nan, math.inf, np.float32("nan"), Decimal("NaN"), Decimal("sNaN"), Decimal("1e999"),
        "a\0b", "\ud800", {"a\0": 1}, {1.5: 1}, {True: 1}, {"a"}, b"a", object(), 1j,
        np.complex64(1), np.timedelta64(1, "s"), [[[math.nan]]], 10**5000,
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_metadata_that_json_cannot_hold_is_refused_by_its_documents_id(
    store: Documents, given: Any
) -> None:
    with pytest.raises(
        InvalidDocument, match="1 of 2 documents cannot be stored: 'bad': the metadata: "
    ):
        store.write(
            [Document("good", ""), Document("bad", "", {"key": given})], [[1.0, 0.0], [1.0, 0.0]]
        )
    assert ids(store) == []


def test_metadata_of_any_depth_is_stored_or_refused(store: Documents) -> None:
    for depth in (60, 70, 5000):
        deep: Any = 1
        for _ in range(depth):
            deep = [deep]
        if depth == 60:
            store.write([Document("a", "", {"key": deep})], [[1.0, 0.0]])
        else:
            with pytest.raises(InvalidDocument, match="nested more than"):
                store.write([Document("a", "", {"key": deep})], [[1.0, 0.0]])


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        (Document("a\0", ""), "the id: text with a NUL character"),
        (Document("a" * 3000, ""), "the id: it has more than 2000 bytes"),
        (Document(SEVEN, ""), "the id: expected text, got a value of type int"),
        (Document("a", "text\0"), "the text: text with a NUL character"),
        (Document("a", "\udfff"), "the text: text with a lone surrogate"),
        (Document("a", NOTHING), "the text: expected text, got a value of type NoneType"),
        (Document("a", "", {}, "d\0"), "the document's id: text with a NUL character"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_text_that_postgresql_cannot_hold_is_refused(
    store: Documents, document: Document, reason: str
) -> None:
    with pytest.raises(InvalidDocument) as caught:
        store.write([document], [[1.0, 0.0]])
    assert reason in str(caught.value)
    assert store.read(["a", "a\0"]) == []
    store.delete(["a\0"])


def test_an_error_names_some_of_many_documents(store: Documents) -> None:
    with pytest.raises(
        InvalidDocument,
        match=r"100 of 100 documents cannot be stored: 'n0': .*'n4': [^']*; and 95 more$",
    ):
        store.write([Document(f"n{number}", "") for number in range(100)], [[math.nan]] * 100)


# A table that goes and comes


def test_a_table_that_was_dropped_is_made_again_by_the_next_use(
    running: Throwaway, opened: Opening
) -> None:
    store = opened(metric="l2")
    uses: list[Callable[[], object]] = [
        store.delete,
        lambda: store.read(["a"]),
        lambda: ids(store),
        lambda: None,
    ]
    for number, use in enumerate(uses):
        store.write([Document("a", ""), Document("b", "")], [[1.0, 0.0], [0.0, float(number)]])
        assert ids(store) == ["a", "b"]
        drop(running, store)
        use()
        store.write([Document("c", "")], [[1.0, 0.0, 0.0]])
        assert ids(store, [1.0, 0.0, 0.0]) == ["c"]
        assert opened().metric == "l2"
        store.delete()


def test_a_table_that_was_dropped_while_no_store_was_open_is_made_again_at_opening(
    running: Throwaway, opened: Opening
) -> None:
    """The dropped table's attachment keeps the datasets' names until it is deleted."""
    for number, metric in enumerate(("l2", None, "l2", "ip")):
        store = opened(metric=metric)
        assert store.metric == (metric or "l2")
        store.write([Document(f"{number}", "")], [[1.0, 0.0]])
        assert ids(store) == [f"{number}"]
        store.close()
        drop(running, store)


def test_a_table_that_was_made_again_by_hand_is_attached_by_the_next_write(
    running: Throwaway, opened: Opening
) -> None:
    store = opened(metric="l2")
    store.write([Document("a", "")], [[1.0, 0.0]])
    with psycopg.connect(running.dsn, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE made_again (LIKE {store.table} INCLUDING ALL)".encode())
        connection.execute(
            f"DROP TABLE {store.table}; ALTER TABLE made_again RENAME TO {store.table}".encode()
        )
    store.write([Document("b", "")], [[1.0, 0.0]])
    assert ids(store) == ["b"]


def test_a_table_that_is_not_attached_is_attached_at_opening(
    running: Throwaway, opened: Opening
) -> None:
    opened(metric="ip").write([Document("a", "")], [[1.0, 0.0]])
    with psycopg.connect(running.dsn, autocommit=True) as connection:
        table = opened().table
        connection.execute("SELECT syncd.detach(%s)", [table])
    again = opened(metric="l2")
    again.write([Document("b", "")], [[0.0, 1.0]])
    assert (again.metric, ids(again)) == ("l2", ["a", "b"])


def test_a_detached_table_is_an_error_also_while_another_source_fails(
    running: Throwaway, opened: Opening
) -> None:
    """While a source fails, syncd cannot deny a dataset: it can belong to that source."""
    failing, store = opened(table=f"f{uuid.uuid4().hex}"), opened()
    drop(running, failing)
    store.write([Document("a", "")], [[1.0, 0.0]])
    assert ids(store) == ["a"]
    with psycopg.connect(running.dsn, autocommit=True) as connection:
        connection.execute("SELECT syncd.detach(%s)", [store.table])
    running.catch_up()
    with pytest.raises(DatabaseError, match="but syncd does not follow it") as caught:
        ids(store)
    assert caught.value.hint.startswith("attach it: SELECT syncd.attach(")


def test_a_role_that_may_not_attach_is_told_the_command_for_the_owner(
    running: Throwaway, opened: Opening
) -> None:
    table = opened().table
    role = f"writer{uuid.uuid4().hex[:8]}"
    with psycopg.connect(running.dsn, autocommit=True) as connection:
        connection.execute(
            f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA syncd TO {role}".encode()
        )
        connection.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO {role}".encode())
        mine = psycopg.conninfo.make_conninfo(running.dsn, user=role)
        other = opened(dsn=mine)
        other.write([Document("a", "")], [[1.0, 0.0]])
        assert ids(other) == ["a"]
        connection.execute("SELECT syncd.detach(%s)", [table])
        with pytest.raises(
            DatabaseError, match="is not attached, and this role may not attach it"
        ) as caught:
            opened(dsn=mine)
        connection.execute(caught.value.hint.partition(": ")[2].encode())
        assert ids(opened(dsn=mine)) == ["a"]


def drop(running: Throwaway, store: Documents) -> None:
    with psycopg.connect(running.dsn, autocommit=True) as connection:
        connection.execute(f"DROP TABLE {store.table}".encode())
