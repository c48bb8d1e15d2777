"""LlamaIndex's filters find the documents that its SimpleVectorStore finds.

Every operator and condition is tried.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from syncd.testing import Throwaway

pytest.importorskip("llama_index.core", reason="pip install -e '.[dev]'")

from llama_index.core.schema import TextNode
from llama_index.core.vector_stores import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
)

from syncd.apps.llamaindex import SyncdVectorStore

Operator = FilterOperator
KEYS = [
    "level",
    "a.b",
    "a",
    "b",
    "",
    "and",
    "not",
    "none",
    "path",
    "eq",
    "metadata",
    "id",
    "q\"'%",
    "\u00e4 \u4e2d",
]
SCALARS: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    1.0,
    1.5,
    "",
    "a",
    "A",
    "ab",
    "aB",
    "b",
    "1",
    "true",
    10**20,
    "x" * 300,
]
TEXTS = ["", "a", "A", "AB", "b", "1", "ab"]
NUMBERS: list[Any] = [0, 1, 2, 1.0, 1.5, -1, 10**20]
ORDERED = (Operator.GT, Operator.GTE, Operator.LT, Operator.LTE)

scalars = st.sampled_from(SCALARS)
values = st.one_of(
    scalars,
    scalars,
    st.lists(scalars.filter(lambda each: each is not None), max_size=3),
    st.just({"a": 1, "ab": "x"}),
)
SAMPLE_LISTS: list[list[Any]] = [
    *([], ["a"], ["a", "ab"], ["ab", "a"], ["a", "a"], [""]),
    *([1], [1, 2], [2, 3], [3, 2], [True], [False, "1"]),
]
SAMPLES: list[dict[str, Any]] = [
    {},
    *({"level": each} for each in SCALARS),
    *({"level": each} for each in SAMPLE_LISTS),
    {"level": {}},
    {"level": {"a": 1, "ab": "x"}},
]
LISTS: list[Any] = [[], ["a"], ["a", "ab"], ["ab", "a"], [""], ["1", "b"], [2, 3], [10**20]]
OPERANDS: dict[FilterOperator, list[Any]] = {
    # In Python, a list with 0 or 1 equals a list with False or True; syncd compares lists as JSON.
    **{key: [*TEXTS, *NUMBERS, None, *LISTS] for key in (Operator.EQ, Operator.NE)},
    **{key: [*TEXTS, *NUMBERS] for key in ORDERED},
    **{
        key: [*TEXTS, *LISTS, [0], [1], [1, 2], [0, 1], [1.0]]
        for key in (Operator.IN, Operator.NIN, Operator.ANY, Operator.ALL)
    },
    **dict.fromkeys((Operator.TEXT_MATCH, Operator.TEXT_MATCH_INSENSITIVE), TEXTS),
    Operator.CONTAINS: [*TEXTS, *NUMBERS],
    Operator.IS_EMPTY: [None],
}
conditions = st.sampled_from([*FilterCondition, None])


def comparisons(keys: list[str]) -> st.SearchStrategy[MetadataFilter]:
    """Comparisons of these keys, with every operator."""
    return st.sampled_from(list(Operator)).flatmap(
        lambda operator: st.builds(
            MetadataFilter,
            key=st.sampled_from(keys),
            value=st.sampled_from(OPERANDS[operator]),
            operator=st.just(operator),
        )
    )


@st.composite
def documents_and_filters(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[MetadataFilters]]:
    """Metadata with few keys, so that documents have the keys that filters ask for."""
    keys = draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=2, unique=True))
    one = comparisons(keys)
    some = one | st.builds(MetadataFilters, filters=st.lists(one, max_size=2), condition=conditions)
    filters = st.builds(MetadataFilters, filters=st.lists(some, max_size=3), condition=conditions)
    single = st.builds(
        MetadataFilters, filters=st.lists(one, min_size=1, max_size=1), condition=conditions
    )
    rich = st.fixed_dictionaries({keys[0]: values}, optional=dict.fromkeys(keys[1:], values))
    documents = draw(st.lists(st.one_of(rich, rich, rich, st.just({})), min_size=5, max_size=10))
    return documents, draw(st.lists(single, min_size=6, max_size=10)) + draw(
        st.lists(filters, min_size=2, max_size=4)
    )


@pytest.fixture(scope="module")
def store(running: Throwaway) -> Iterator[SyncdVectorStore]:
    opened = SyncdVectorStore(running.dsn, collection=uuid.uuid4().hex, address=running.socket)
    yield opened
    opened.close()


def nodes_of(documents: list[dict[str, Any]]) -> list[TextNode]:
    return [
        TextNode(id_=str(number), text="t", metadata=each, embedding=[1.0, float(number)])
        for number, each in enumerate(documents)
    ]


def found(store: Any, wanted: MetadataFilters) -> set[str]:
    """Ids that a store finds."""
    query = VectorStoreQuery(query_embedding=[1.0, 1.0], similarity_top_k=100, filters=wanted)
    return set(store.query(query).ids or [])


def passes(reference: SimpleVectorStore, wanted: MetadataFilters) -> bool:
    """Whether the reference's only document passes; raises ``TypeError`` as the reference does.

    The reference refuses nested filters. Here it decides on each of their parts.
    """
    if not any(isinstance(each, MetadataFilters) for each in wanted.filters):
        return bool(found(reference, wanted))
    each = [
        passes(
            reference, one if isinstance(one, MetadataFilters) else MetadataFilters(filters=[one])
        )
        for one in wanted.filters
    ]
    if wanted.condition == FilterCondition.OR:
        return any(each)
    return not any(each) if wanted.condition == FilterCondition.NOT else all(each)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(drawn=documents_and_filters())
def test_every_filter_finds_the_documents_that_the_reference_store_finds(
    store: SyncdVectorStore, drawn: tuple[list[dict[str, Any]], list[MetadataFilters]]
) -> None:
    """Each document is tried alone: if the reference cannot compare one, the others still count."""
    documents, wanted = drawn
    nodes = nodes_of(documents)
    store.clear()
    store.add(nodes)
    references = {node.node_id: SimpleVectorStore() for node in nodes}
    for node in nodes:
        references[node.node_id].add([node])
    for each in wanted:
        ours = found(store, each)
        for name, reference in references.items():
            try:
                expected = passes(reference, each)
            except TypeError:
                continue
            assert (name in ours) == expected, (documents[int(name)], each)


@pytest.mark.parametrize("operator", list(Operator))
def test_every_comparison_is_the_reference_stores(
    store: SyncdVectorStore, operator: FilterOperator
) -> None:
    """All sample values against all sample operands, and their negations.

    A value that the reference cannot compare does not pass.
    """
    nodes = nodes_of(SAMPLES)
    store.clear()
    store.add(nodes)
    references = [SimpleVectorStore() for _ in nodes]
    for node, reference in zip(nodes, references, strict=True):
        reference.add([node])
    for operand in OPERANDS[operator]:
        for condition in (FilterCondition.AND, FilterCondition.NOT):
            one = MetadataFilter(key="level", value=operand, operator=operator)
            asked = MetadataFilters(filters=[one], condition=condition)
            ours, compared = found(store, asked), set()
            expected = set()
            for node, reference in zip(nodes, references, strict=True):
                try:
                    expected |= found(reference, asked)
                    compared.add(node.node_id)
                except TypeError:
                    continue
            assert ours & compared == expected, (
                asked,
                [SAMPLES[int(name)] for name in ours & compared ^ expected],
            )
            assert len(compared) >= 2  # none of them compares anything


@pytest.mark.parametrize("condition", list(FilterCondition))
@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_found_alongside_a_missing_and_an_empty_one(
    store: SyncdVectorStore, key: str, condition: FilterCondition
) -> None:
    """NOT, no filters, NE and IS_EMPTY, by keys with dots and odd characters."""
    nodes = nodes_of(
        [{key: "secret"}, {key: "draft"}, {key: "public"}, {}, {key: ""}, {key: []}, {key: None}]
    )
    reference = SimpleVectorStore()
    store.clear()
    store.add(nodes)
    reference.add(nodes)
    secret, draft = MetadataFilter(key=key, value="secret"), MetadataFilter(key=key, value="draft")
    other = MetadataFilter(key=key, value="secret", operator=Operator.NE)
    neither = MetadataFilter(key=key, value=["secret", "draft"], operator=Operator.NIN)
    empty = MetadataFilter(key=key, value=None, operator=Operator.IS_EMPTY)
    wanted: list[list[MetadataFilter]] = [
        [secret, draft],
        [secret],
        [],
        [other],
        [neither],
        [empty],
    ]
    for some in wanted:
        asked = MetadataFilters(filters=list(some), condition=condition)
        assert found(store, asked) == found(reference, asked), asked


def test_long_lists_are_answered(store: SyncdVectorStore) -> None:
    store.clear()
    store.add(nodes_of([{"n": "5"}, {"n": ["7"]}, {"n": 9}]))
    many = [str(number) for number in range(4000)]
    for operator, expected in (
        (Operator.IN, {"0"}),
        (Operator.NIN, {"1", "2"}),
        (Operator.ANY, {"0", "1"}),
    ):
        assert (
            found(
                store,
                MetadataFilters(filters=[MetadataFilter(key="n", value=many, operator=operator)]),
            )
            == expected
        )
    with pytest.raises(ValueError, match="a text of 101 characters is too long"):
        found(
            store,
            MetadataFilters(
                filters=[MetadataFilter(key="n", value="x" * 101, operator=Operator.IN)]
            ),
        )
