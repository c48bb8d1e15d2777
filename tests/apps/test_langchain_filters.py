"""LangChain's filters find the documents that its InMemoryVectorStore finds with a function."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from syncd.errors import InvalidFilter
from syncd.testing import Throwaway

pytest.importorskip("langchain_core", reason="pip install -e '.[dev]'")

from langchain_core.documents import Document
from langchain_core.vectorstores import InMemoryVectorStore

from syncd.apps.langchain import SyncdVectorStore
from tests.apps.test_langchain import Words

SCALARS: list[Any] = [True, False, 0, 1, 2.0, 1.5, "", "a", "A", "ab", "1"]
NAMES = [
    "lang",
    "loc.pageNumber",
    "loc",
    "a.b.c",
    "",
    ".",
    "not",
    "or",
    "none",
    "path",
    "$eq",
    "q\"'%",
]
WORDS = ("not", "or", "none")
LISTS = ("and", "or", "none", "$and", "$or")
COMPARE = {
    "gt": lambda x, y: x > y,
    "gte": lambda x, y: x >= y,
    "lt": lambda x, y: x < y,
    "lte": lambda x, y: x <= y,
}

scalars = st.sampled_from(SCALARS)
values = st.one_of(st.none(), scalars, scalars, st.lists(scalars, max_size=3))
operators = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "eq": st.none() | scalars,
            "ne": st.none() | scalars,
            "in": st.lists(scalars, max_size=3),
        },
    ),
    st.dictionaries(
        st.sampled_from(list(COMPARE)),
        st.sampled_from([0, 1, 1.5, "a", "ab"]),
        min_size=1,
        max_size=2,
    ),
).filter(bool)
with_dollar = st.builds(
    lambda asked, dollar: {f"{'$' if dollar else ''}{name}": each for name, each in asked.items()},
    operators,
    st.booleans(),
)


@st.composite
def documents_and_filters(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metadata with few keys, so that documents have the keys that filters ask for."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=2, unique=True))
    inside = st.dictionaries(st.sampled_from(["pageNumber", "b"]), values, max_size=2)
    known = {
        name: st.one_of(values, values, inside)
        for name in (*names, *(name.split(".")[0] for name in names))
    }
    asked = st.one_of(st.none(), scalars, st.lists(scalars, max_size=2), with_dollar)
    leaves = st.dictionaries(
        st.sampled_from([name for name in names if name not in WORDS] or ["lang"]),
        asked,
        min_size=1,
        max_size=2,
    )
    filters = st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda one: {"not": one}, inner),
            st.builds(
                lambda word, some: {word: some},
                st.sampled_from(LISTS),
                st.lists(inner, min_size=1, max_size=3),
            ),
        ),
        max_leaves=4,
    )
    documents = draw(st.lists(st.fixed_dictionaries({}, optional=known), min_size=4, max_size=8))
    return documents, draw(st.lists(filters, min_size=6, max_size=12))


def passes(wanted: dict[str, Any], document: dict[str, Any]) -> bool | None:
    """A filter's value in SQL's three-valued logic, written without a look at the store."""
    parts: list[bool | None] = []
    for given_name, value in wanted.items():
        name = given_name.removeprefix("$")
        if name == "not" and isinstance(value, dict):
            inner = passes(value, document)
            parts.append(None if inner is None else not inner)
        elif name in ("and", "or", "none") and isinstance(value, list):
            each = [passes(one, document) for one in value]
            parts.append(
                conjunction(each)
                if name == "and"
                else disjunction(each)
                if name == "or"
                else True not in each
            )
        else:
            parts += compared(found_in(document, given_name), value)
    return conjunction(parts)


def conjunction(parts: list[bool | None]) -> bool | None:
    return False if False in parts else None if None in parts else True


def disjunction(parts: list[bool | None]) -> bool | None:
    return True if True in parts else None if None in parts else False


def found_in(document: dict[str, Any], name: str) -> Any:
    """The value of the key of that name, or else of the path of its parts."""
    if document.get(name) is not None:
        return document[name]
    value: Any = document
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def compared(found: Any, asked: Any) -> list[bool | None]:
    """The results of each comparison of a value."""
    if isinstance(asked, list):
        whole = isinstance(found, list) and len(found) == len(asked)
        return [
            None
            if found is None
            else whole and all(same(*both) for both in zip(found, asked, strict=True))
        ]
    if not isinstance(asked, dict):
        asked = {"eq": asked}
    parts: list[bool | None] = []
    for word, operand in asked.items():
        operator = word.removeprefix("$")
        if operator in COMPARE:
            kind = str if isinstance(operand, str) else int | float
            comparable = isinstance(found, kind) and not isinstance(found, bool)
            parts.append(COMPARE[operator](found, operand) if comparable else None)
            continue
        operands = operand if operator == "in" else [operand]
        if operand is None:
            among: bool | None = found is None
        elif found is None:
            among = None if operands else False
        else:
            candidates = found if isinstance(found, list) else [found]
            among = any(same(each, one) for each in candidates for one in operands)
        parts.append(among if operator != "ne" else None if among is None else not among)
    return parts


def same(one: Any, other: Any) -> bool:
    """Equality in JSON: true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


@pytest.fixture(scope="module")
def store(running: Throwaway) -> Iterator[SyncdVectorStore]:
    opened = SyncdVectorStore(
        Words(), running.dsn, collection=uuid.uuid4().hex, address=running.socket
    )
    yield opened
    opened.close()


@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(drawn=documents_and_filters())
def test_every_filter_finds_the_documents_that_the_reference_store_finds(
    store: SyncdVectorStore, drawn: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    documents, wanted = drawn
    made = [
        Document(id=str(number), page_content="1 0", metadata=each)
        for number, each in enumerate(documents)
    ]
    reference = InMemoryVectorStore(Words())
    store.delete()
    for each in (store, reference):
        each.add_documents(made)
    for asked in [*wanted, {}]:
        ours = {each.id for each in store.similarity_search("1 0", 100, filter=asked)}
        theirs = reference.similarity_search(
            "1 0", 100, filter=lambda each, asked=asked: passes(asked, each.metadata) is True
        )
        assert ours == {each.id for each in theirs}, (asked, documents)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda document: bool(document),
        ["lang"],
        "lang",
        1,
        {1: "a"},
        {"lang": {}},
        {"lang": {"near": 1}},
        {"lang": {"$near": 1}},
        {"$like": {"x": 1}},
        {"lang": {"in": "a"}},
        {"lang": {"gt": [1]}},
        {"lang": {"path": "x", "eq": 1}},
        {"lang": {"path": [1], "eq": 1}},
        {"or": [1]},
        {"or": []},
        {"and": ["x"]},
        {"not": {"lang": {"a": 1}}},
        {"lang": {"a", "b"}},
        {"lang": float("nan")},
        {"lang": object()},
        {"lang": "\0"},
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_malformed_filter_is_an_invalid_filter(store: SyncdVectorStore, wrong: Any) -> None:
    store.add_texts(["1 0"])
    with pytest.raises(InvalidFilter) as caught:
        store.similarity_search("1 0", filter=wrong)
    assert caught.value.hint
