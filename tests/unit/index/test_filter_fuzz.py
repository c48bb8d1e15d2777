"""Any JSON as a filter is answered, or is an invalid filter; there is never another error."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from syncd.errors import InvalidFilter
from syncd.index.dataset import DatasetIndex
from syncd.index.filter.language import parse_filter
from syncd.types import AttachedColumn, ColumnKind

KINDS: dict[str, ColumnKind] = {
    "integer": "integer",
    "real": "real",
    "double": "double",
    "numeric": "numeric",
    "text": "text",
    "character": "character",
    "enum": "enum",
    "boolean": "boolean",
    "uuid": "uuid",
    "instant": "instant",
    "timestamp": "timestamp",
    "date": "date",
    "texts": "text_array",
    "integers": "integer_array",
    "json": "json",
    "none": "integer",
}
COLUMNS = tuple(AttachedColumn(name, kind) for name, kind in KINDS.items())
ROW: list[Any] = [
    7,
    1.5,
    1.5,
    1.5,
    "a",
    "a",
    "sad",
    True,
    "00000000-0000-0000-0000-000000000001",
    "2024-02-29T12:30:00+00:00",
    "2024-02-29T12:30:00",
    "2024-02-29",
    ["a", None],
    [1, None],
    {"a": ["b", 1, None, {}], "a.b": "text", "": 1.5, "path": {"not": True}},
    1,
]
WORDS = [
    "eq",
    "ne",
    "in",
    "gt",
    "gte",
    "lt",
    "lte",
    "contains",
    "any",
    "is",
    "is_array",
    "text_match",
    "text_match_insensitive",
    "path",
    "not",
    "and",
    "or",
    "none",
    "near",
    "",
]
NAMES = [*KINDS, "json.a", "json.a.b", "json.", "json" + ".x" * 20, "nosuch", "a\x00b"]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(
        [
            "a",
            "2024-02-29",
            "infinity",
            "NaN",
            "00000000000000000000000000000001",
            "\0",
            "a.b",
            "0001-01-01T00:00:00+23:59",
        ]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
keys = st.one_of(
    st.sampled_from(NAMES),
    st.sampled_from(WORDS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
)
shapes = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(keys, inner, max_size=4)),
    max_leaves=12,
)
by_path = st.builds(
    lambda keys, asked: {"json": {"path": keys, **asked}},
    st.lists(st.one_of(scalars, st.lists(scalars, max_size=1)), max_size=2) | scalars,
    st.dictionaries(st.sampled_from(WORDS), scalars, max_size=2),
)
likely = st.recursive(
    by_path
    | st.dictionaries(
        st.sampled_from(NAMES),
        st.one_of(
            scalars,
            st.dictionaries(
                st.sampled_from(WORDS),
                st.one_of(scalars, st.lists(scalars, max_size=3)),
                max_size=3,
            ),
        ),
        max_size=3,
    ),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["not"]), inner, max_size=1),
        st.dictionaries(
            st.sampled_from(["and", "or", "none"]), st.lists(inner, max_size=3), max_size=2
        ),
    ),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def index() -> Iterator[DatasetIndex]:
    """An index with a row of values of every kind, and a row of NULLs."""
    with tempfile.TemporaryDirectory() as folder:
        made = DatasetIndex.create(
            Path(folder), metric="l2", key_kind="integer", dim=2, columns=COLUMNS
        )
        lines = [msgspec.json.encode(row).decode() for row in (ROW, [None] * len(ROW))]
        made.apply([1, 2], np.ones((2, 2), dtype=np.float32), [], columns=lines)
        yield made


def answer(index: DatasetIndex, wanted: Any) -> None:
    """Search with the filter in the same way as the service."""
    view = index.view
    try:
        found = parse_filter(msgspec.json.decode(msgspec.json.encode(wanted)), view.columns, "d")
    except InvalidFilter:
        return
    view.where(found)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(wanted=st.one_of(shapes, st.dictionaries(keys, shapes, max_size=4), likely))
def test_every_filter_is_answered_or_invalid(index: DatasetIndex, wanted: Any) -> None:
    answer(index, wanted)


@pytest.mark.parametrize("operator", ["not", "and", "or", "none", "json.a", "in"])
@pytest.mark.parametrize("depth", [15, 16, 17, 400])
def test_a_filter_however_deep_is_answered_or_invalid(
    index: DatasetIndex, operator: str, depth: int
) -> None:
    wanted: Any = {"integer": 1}
    for _ in range(depth):
        wanted = {operator: wanted if operator in ("not", "json.a") else [wanted]}
    answer(index, wanted)


@pytest.mark.parametrize("operator", ["in", "any", "contains", "is", "path"])
def test_a_filter_however_long_is_answered_or_invalid(index: DatasetIndex, operator: str) -> None:
    for length in (9_999, 10_001, 200_000):
        answer(index, {"json.a": {operator: ["a"] * length}})
    answer(index, {"or": [{"integer": number} for number in range(100_000)]})
    answer(index, {f"json.{number}": number for number in range(100_000)})
