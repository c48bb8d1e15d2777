"""Filters in an index without a database: refusals with reasons, caches, and few matching rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from syncd.errors import InvalidFilter
from syncd.index.comparison import Comparison
from syncd.index.dataset import DatasetIndex
from syncd.index.filter import attributes
from syncd.index.filter.language import (
    MAX_CONDITIONS,
    MAX_DEPTH,
    MAX_VALUES,
    find_path,
    parse_filter,
)
from syncd.index.search.plan import SearchResult
from syncd.types import AttachedColumn, ColumnKind, Metric
from tests.unit.index.rows import SMALL_CHUNKS, random_vectors

KINDS: dict[str, ColumnKind] = {
    "year": "integer",
    "score": "numeric",
    "lang": "text",
    "mood": "enum",
    "flag": "boolean",
    "uid": "uuid",
    "at": "instant",
    "local": "timestamp",
    "day": "date",
    "tags": "text_array",
    "doc": "json",
    "a.b": "integer",
}
COLUMNS = tuple(AttachedColumn(name, kind) for name, kind in KINDS.items())


def nested(depth: int) -> dict[str, Any]:
    return {"year": 1} if depth == 0 else {"not": nested(depth - 1)}


@pytest.mark.parametrize(
    ("wanted", "said", "hint"),
    [
        ({"nosuch": 1}, "no filterable column 'nosuch'", "columns: year, score"),
        ({"lang.x": 1}, "no filterable column 'lang.x'", "doc.<key>"),
        (
            {"year": "2020"},
            "\"2020\" cannot be compared with 'year', which holds numbers",
            "columns: year",
        ),
        ({"year": True}, "true cannot be compared with 'year'", "columns: year"),
        ({"year": [1, 2]}, "[1,2] cannot be compared with 'year'", "columns: year"),
        ({"lang": 1}, "1 cannot be compared with 'lang', which holds strings", "columns: year"),
        (
            {"flag": 1},
            "1 cannot be compared with 'flag', which holds true and false",
            "columns: year",
        ),
        ({"uid": "x"}, "cannot be compared with 'uid', which holds uuids", "columns: year"),
        (
            {"at": "yesterday"},
            "cannot be compared with 'at', which holds points in time",
            "columns: year",
        ),
        (
            {"local": "2024-01-31T12:00:00Z"},
            "holds timestamps without a time zone",
            "columns: year",
        ),
        ({"day": "2024-01-31T12:00:00"}, "holds dates", "columns: year"),
        ({"day": "2023-02-29"}, "holds dates", "columns: year"),
        (
            {"lang": {"near": 1}},
            "'near' is not an operator of 'lang'",
            "its operators: eq, ne, in, gt, gte, lt, lte, text_match",
        ),
        (
            {"flag": {"gt": True}},
            "'gt' is not an operator of 'flag'",
            "its operators: eq, ne, in; ",
        ),
        (
            {"mood": {"gt": "ok"}},
            "'gt' is not an operator of 'mood'",
            "its operators: eq, ne, in; ",
        ),
        (
            {"tags": {"gt": "a"}},
            "'gt' is not an operator of 'tags'",
            "its operators: eq, ne, in, contains, any; ",
        ),
        (
            {"doc": {"lang": "en"}},
            "'lang' is not an operator of 'doc'",
            "for a key of it write doc.lang",
        ),
        ({"lang": {}}, "'lang' has no condition", "its operators: eq"),
        (
            {"year": {"gt": None}},
            "'gt' of 'year' does not accept null",
            'for IS NULL write {"column": null}',
        ),
        ({"doc.flag": {"lt": True}}, "true and false have no order", 'write {"column": true}'),
        ({"year": {"in": 1}}, "'in' of 'year' takes a list", 'write {"in": [...]}'),
        ({"tags": {"any": "a"}}, "'any' of 'tags' takes a list", 'write {"any": [...]}'),
        (
            {"tags": {"contains": ["a", None]}},
            "null cannot be compared with 'tags'",
            "columns: year",
        ),
        (
            {"not": [{"year": 1}]},
            "expected an object with conditions, got [{",
            'write {"column": value}',
        ),
        ({"or": {"year": 1}}, "'or' takes a list of objects", 'write {"or": [{…}, {…}]}'),
        ({"or": []}, "'or' takes a list of objects", 'write {"or": [{…}, {…}]}'),
        ({"none": []}, "'none' takes a list of objects", 'write {"none": [{…}, {…}]}'),
        ({"none": 1}, "no filterable column 'none'", "columns: year"),
        (
            {"lang": {"path": ["a"], "eq": 1}},
            "'path' is not an operator of 'lang'",
            "its operators: eq",
        ),
        ({"doc": {"path": ["a.b"]}}, "'doc' has no condition", "its operators: eq"),
        (
            {"doc": {"path": "a.b", "eq": 1}},
            "'path' of 'doc' takes a list of keys",
            '{"doc": {"path": ["a.b"], "eq": 7}}',
        ),
        ({"doc": {"path": [], "eq": 1}}, "'path' of 'doc' takes a list of keys", "columns: year"),
        ({"doc": {"path": [1], "eq": 1}}, "'path' of 'doc' takes a list of keys", "columns: year"),
        ({"doc": {"path": ["a"] * 17, "eq": 1}}, "more than 16 keys", "columns: year"),
        ({"doc": {"path": ["a"], "b": 1}}, "'b' is not an operator of 'doc'", "its operators: eq"),
        (
            {"doc.a": {"is_array": 1}},
            "'is_array' of 'doc.a' takes true or false",
            'write {"is_array": true}',
        ),
        ({"doc.a": {"is": [[1]]}}, "[1] cannot be compared with 'doc.a'", "columns: year"),
        (
            {"doc.a": {"text_match": 1}},
            "'text_match' of 'doc.a' takes a string, or a list of strings",
            'write {"text_match": "…"}',
        ),
        (
            {"year": {"text_match": "1"}},
            "'text_match' is not an operator of 'year'",
            "its operators: eq, ne, in, gt",
        ),
        (nested(MAX_DEPTH), f"nested more than {MAX_DEPTH} deep", "use fewer levels"),
        (
            {"or": [{"year": 1}] * (MAX_CONDITIONS + 1)},
            f"more than {MAX_CONDITIONS} conditions",
            '{"in": […]}',
        ),
        ({"year": {"in": list(range(MAX_VALUES + 1))}}, f"more than {MAX_VALUES} values", "split"),
        ({"x" * 5000: 1}, "no filterable column", "columns: year"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_filter_that_cannot_be_asked_is_refused_with_the_operators_that_can(
    wanted: dict[str, Any], said: str, hint: str
) -> None:
    with pytest.raises(InvalidFilter) as caught:
        parse_filter(wanted, COLUMNS, "d")
    assert said in str(caught.value)
    assert hint in caught.value.hint
    assert len(str(caught.value)) + len(caught.value.hint) < 600


def test_a_filter_of_a_dataset_without_columns_is_refused_unless_it_asks_for_nothing() -> None:
    with pytest.raises(InvalidFilter, match="has no filterable columns") as caught:
        parse_filter({"lang": "en"}, (), "d")
    assert "columns => ARRAY" in caught.value.hint
    assert parse_filter({}, (), "d") is None


def test_a_column_whose_name_has_dots_is_that_column() -> None:
    path = find_path("a.b", (AttachedColumn("a", "json"), AttachedColumn("a.b", "integer")))
    assert path is not None
    assert (path.column, path.keys) == (1, ())


def test_a_number_larger_than_any_of_json_is_answered(tmp_path: Path) -> None:
    index = DatasetIndex.create(
        tmp_path, metric="l2", key_kind="integer", dim=2, columns=(AttachedColumn("n", "numeric"),)
    )
    huge = "9" * 6000
    index.apply([1, 2], np.ones((2, 2), dtype=np.float32), [], columns=[f"[{huge}]", "[1]"])
    assert keys_where(index, {"n": {"gt": 10**300}}) == [1]
    assert keys_where(index, {"n": 10**40}) == []
    view = index.view
    assert view.attributes is not None
    path = find_path("n", view.columns)
    assert path is not None
    assert (
        msgspec.json.encode(view.attributes.values([path], view.find([1])))
        == f"[[{huge}]]".encode()
    )


def keys_where(index: DatasetIndex, wanted: dict[str, Any]) -> list[object]:
    """Keys of the nearest rows that pass, nearest to 0 first."""
    view = index.view
    origin = np.zeros((1, index.dim or 2), dtype=np.float32)
    return list(
        index.search(origin, 1000, view=view.where(parse_filter(wanted, view.columns, "d")))[0].keys
    )


def test_a_row_whose_column_alone_differs_is_found_by_a_deep_comparison(tmp_path: Path) -> None:
    index = DatasetIndex.create(
        tmp_path,
        metric="l2",
        key_kind="integer",
        dim=2,
        columns=(AttachedColumn("lang", "text"), AttachedColumn("n", "numeric")),
    )
    vectors = random_vectors(4, 2)
    prints = np.arange(4, dtype=np.int64)
    index.apply([1, 2, 3, 4], vectors, [], prints, ['["a", 1]'] * 4)
    there = ['["a", 1.00]', '["b", 1]', '["a", 1]', '["a", 1.0000000000000000000001]']
    shallow, deep = Comparison(index.view), Comparison(index.view)
    shallow.rows([1, 2, 3, 4], prints)
    deep.deep([1, 2, 3, 4], vectors, prints, there)
    assert not shallow.stale
    assert deep.stale == [2, 4]


def test_rows_are_read_once_and_the_rows_that_a_filter_found_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = DatasetIndex.create(
        tmp_path,
        metric="l2",
        key_kind="integer",
        dim=2,
        columns=(AttachedColumn("n", "integer"),),
        chunk_bytes=SMALL_CHUNKS,
    )
    add(index, range(100))
    assert keys_where(index, {"n": {"lt": 3}}) == [0, 1, 2]
    read: list[tuple[int, int]] = []
    before = attributes.Attributes._read

    def counted(self: attributes.Attributes, paths: Any, lines: Any, start: int, stop: int) -> None:
        read.append((start, stop))
        before(self, paths, lines, start, stop)

    monkeypatch.setattr(attributes.Attributes, "_read", counted)
    assert keys_where(index, {"n": {"lt": 3}}) == [0, 1, 2]
    assert keys_where(index, {"n": {"gte": 98}}) == [98, 99]
    assert read == []
    add(index, range(98, 110))
    assert keys_where(index, {"n": {"gte": 98}}) == list(range(98, 110))
    assert read == [(100, 112)]


def test_no_more_filters_and_paths_are_kept_than_is_bounded(tmp_path: Path) -> None:
    index = DatasetIndex.create(
        tmp_path, metric="l2", key_kind="integer", dim=2, columns=(AttachedColumn("doc", "json"),)
    )
    vectors = np.ones((3, 2), dtype=np.float32)
    index.apply(
        [1, 2, 3],
        vectors,
        [],
        columns=[json.dumps([{f"k{number}": number for number in range(200)}])] * 3,
    )
    sizes = []
    for number in range(200):
        assert len(keys_where(index, {f"doc.k{number}": number})) == 3
        sizes.append(index.bytes_memory)
    assert max(sizes[-50:]) == min(sizes[-50:])


def add(index: DatasetIndex, keys: range) -> None:
    """Add rows at (key, 0) whose column is the key."""
    vectors = np.array([[key, 0] for key in keys], dtype=np.float32)
    index.apply(
        list(keys),
        vectors,
        [],
        np.array(keys, dtype=np.int64) + len(keys),
        [f"[{key}]" for key in keys],
    )


@pytest.mark.parametrize("selectivity", [0.5, 0.1, 0.01, 0.001])
@pytest.mark.parametrize(("metric", "half"), [("l2", False), ("cosine", False), ("ip", True)])
def test_the_nearest_are_found_however_few_rows_pass(
    tmp_path: Path, selectivity: float, metric: Metric, half: bool
) -> None:
    rows, dim = 20_000, 16
    index = DatasetIndex.create(
        tmp_path,
        metric=metric,
        key_kind="integer",
        half=half,
        dim=dim,
        columns=(AttachedColumn("n", "double"),),
        chunk_bytes=1 << 18,
    )
    chance = np.random.default_rng(1).random(rows)
    index.apply(
        list(range(rows)),
        random_vectors(rows, dim),
        [],
        columns=[f"[{value!r}]" for value in chance.tolist()],
    )
    index.apply([], np.empty((0, dim), dtype=np.float32), list(range(0, rows, 7)))
    view = index.view
    passing = [key for key in range(rows) if chance[key] < selectivity and key % 7]
    queries = random_vectors(20, dim, seed=2)
    filtered = view.where(parse_filter({"n": {"lt": selectivity}}, view.columns, "d"))
    assert filtered.live.count == len(passing)
    for found, query in zip(index.search(queries, 10, view=filtered), queries, strict=True):
        assert_nearest(found, query, view.vectors_of(view.find(passing)), passing, metric)


def assert_nearest(
    found: SearchResult, query: Any, vectors: Any, keys: list[int], metric: Metric
) -> None:
    """Compare with the ten nearest, by brute force in float64."""
    vectors, query = vectors.astype(np.float64), query.astype(np.float64)
    if metric == "l2":
        distances = np.linalg.norm(vectors - query, axis=1)
    else:
        distances = -(vectors @ query)
        if metric == "cosine":
            distances = 1 + distances / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    by_key = dict(zip(keys, distances.tolist(), strict=True))
    assert len(found.keys) == min(10, len(keys))
    np.testing.assert_allclose(found.distances, [by_key[int(key)] for key in found.keys], atol=1e-3)
    np.testing.assert_allclose(found.distances, np.sort(distances)[:10], atol=1e-3)
