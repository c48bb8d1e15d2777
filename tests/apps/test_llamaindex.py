"""The LlamaIndex store: every request to a vector store, with a real PostgreSQL and syncd."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from syncd.errors import InvalidDocument
from syncd.testing import Throwaway

pytest.importorskip("llama_index.core", reason="pip install -e '.[dev]'")

from llama_index.core.schema import NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)

from syncd.apps.llamaindex import SyncdVectorStore


@pytest.fixture
def store(running: Throwaway) -> Iterator[SyncdVectorStore]:
    opened = SyncdVectorStore(running.dsn, collection=uuid.uuid4().hex, address=running.socket)
    yield opened
    opened.close()


def node(name: str, vector: list[float], document: str = "", **metadata: object) -> TextNode:
    made = TextNode(id_=name, text=f"text of {name}", embedding=vector, metadata=metadata)
    if document:
        made.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id=document)
    return made


NODES = [
    node("a", [1, 0], "first", lang="en", year=2020, tags=["x", "y"]),
    node("b", [1, 1], "first", lang="de", year=2024, tags=["y"]),
    node("c", [0, 1], "second", year=2022, tags=["z"]),
]


def query(**parameters: Any) -> VectorStoreQuery:
    asked: dict[str, Any] = {"query_embedding": [1.0, 0.0], "similarity_top_k": 10}
    return VectorStoreQuery(**asked | parameters)


def test_nodes_come_back_as_they_were_written_nearest_first(store: SyncdVectorStore) -> None:
    assert store.add(NODES) == ["a", "b", "c"]
    found = store.query(query())
    assert found.ids == ["a", "b", "c"]
    assert found.similarities == pytest.approx([1, 2**-0.5, 0], abs=1e-6)
    first = (found.nodes or [])[0]
    assert (first.get_content(), first.metadata, first.ref_doc_id) == (
        "text of a",
        NODES[0].metadata,
        "first",
    )
    assert [each.node_id for each in store.get_nodes(["c", "nobody", "a"])] == ["c", "a"]


def test_documents_written_again_or_deleted_are_seen_at_once(store: SyncdVectorStore) -> None:
    store.add(NODES)
    store.add([node("a", [-1, 0], "first")])
    assert store.query(query()).ids == ["b", "c", "a"]
    store.delete("first")
    assert store.query(query()).ids == ["c"]
    store.delete_nodes(["c"])
    assert store.query(query()).ids == []
    store.add(NODES)
    store.clear()
    assert store.query(query()).ids == []


@pytest.mark.anyio
async def test_the_same_without_blocking_the_loop(store: SyncdVectorStore) -> None:
    await store.async_add(NODES)
    assert (await store.aquery(query(similarity_top_k=2))).ids == ["a", "b"]
    await store.adelete("first")
    assert (await store.aquery(query())).ids == ["c"]
    assert [each.node_id for each in await store.aget_nodes(["c"])] == ["c"]
    await store.adelete_nodes(["c"])
    await store.aclear()
    assert (await store.aquery(query())).ids == []


@pytest.mark.parametrize(
    ("operator", "key", "value", "expected"),
    [
        (FilterOperator.EQ, "lang", "en", ["a"]),
        (FilterOperator.NE, "lang", "en", ["b", "c"]),
        (FilterOperator.GT, "year", 2022, ["b"]),
        (FilterOperator.GTE, "year", 2022, ["b", "c"]),
        (FilterOperator.LT, "year", 2022, ["a"]),
        (FilterOperator.LTE, "year", 2022, ["a", "c"]),
        (FilterOperator.IN, "lang", ["en", "fr"], ["a"]),
        (FilterOperator.NIN, "year", [2020, 2022], ["b"]),
        (FilterOperator.ANY, "tags", ["x", "z"], ["a", "c"]),
        (FilterOperator.ALL, "tags", ["x", "y"], ["a"]),
        (FilterOperator.CONTAINS, "tags", "y", ["a", "b"]),
        (FilterOperator.TEXT_MATCH, "lang", "e", ["a", "b"]),
        (FilterOperator.TEXT_MATCH_INSENSITIVE, "lang", "EN", ["a"]),
        (FilterOperator.IS_EMPTY, "lang", None, ["c"]),
    ],
)
def test_operators(
    store: SyncdVectorStore, operator: FilterOperator, key: str, value: Any, expected: list[str]
) -> None:
    store.add(NODES)
    filters = MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])
    assert store.query(query(filters=filters)).ids == expected


def test_conditions_documents_and_ids(store: SyncdVectorStore) -> None:
    store.add(NODES)
    english = MetadataFilter(key="lang", value="en")
    late = MetadataFilter(key="year", value=2022, operator=FilterOperator.GTE)

    def ids(
        condition: FilterCondition, *filters: MetadataFilter | MetadataFilters
    ) -> list[str] | None:
        found: list[str] | None = store.query(
            query(filters=MetadataFilters(filters=list(filters), condition=condition))
        ).ids
        return found

    assert ids(FilterCondition.AND, english, late) == []
    assert ids(FilterCondition.OR, english, late) == ["a", "b", "c"]
    assert ids(FilterCondition.NOT, late) == ["a"]
    either = MetadataFilters(filters=[english, late], condition=FilterCondition.OR)
    assert ids(FilterCondition.AND, either, late) == ["b", "c"]
    assert store.query(query(doc_ids=["second"])).ids == ["c"]
    assert store.query(query(node_ids=["c", "a"])).ids == ["a", "c"]


def test_queries_that_cannot_be_asked_are_refused(store: SyncdVectorStore) -> None:
    for operator, value in (
        (FilterOperator.TEXT_MATCH, 1),
        (FilterOperator.GT, ["a"]),
        (FilterOperator.ALL, 1),
    ):
        wrong = MetadataFilters(
            filters=[MetadataFilter(key="lang", value=value, operator=operator)]
        )
        with pytest.raises(
            ValueError, match=f"no filter {operator.value!r} on 'lang' for a value of type"
        ):
            store.query(query(filters=wrong))
    wrong = MetadataFilters(
        filters=[MetadataFilter(key="lang", value=1, operator=FilterOperator.IN)]
    )
    with pytest.raises(ValueError, match="IN and NIN on 'lang' take a list"):
        store.query(query(filters=wrong))
    for mode in set(VectorStoreQueryMode) - {
        VectorStoreQueryMode.DEFAULT,
        VectorStoreQueryMode.MMR,
    }:
        with pytest.raises(
            ValueError, match=f"mode default or mmr with an embedding, not {mode.value}"
        ):
            store.query(query(mode=mode))
    with pytest.raises(ValueError, match="with an embedding"):
        store.query(query(query_embedding=None))
    with pytest.raises(ValueError, match="give one"):
        store.query(query(mode=VectorStoreQueryMode.MMR), mmr_prefetch_k=9, mmr_prefetch_factor=2)


def test_marginal_relevance_prefers_unlike_documents(store: SyncdVectorStore) -> None:
    assert store.query(query(mode=VectorStoreQueryMode.MMR)).ids == []
    store.add(
        [
            node("first", [1, 0]),
            node("twin", [1, 0.01]),
            node("other", [0.7, 0.7], lang="en"),
            node("far", [-1, 0]),
        ]
    )

    def ids(
        number: int = 2, filters: MetadataFilters | None = None, **options: Any
    ) -> list[str] | None:
        asked = query(mode=VectorStoreQueryMode.MMR, similarity_top_k=number, filters=filters)
        found: list[str] | None = store.query(asked, **options).ids
        return found

    assert store.query(query(similarity_top_k=2)).ids == ["first", "twin"]
    assert ids(mmr_threshold=0.2, mmr_prefetch_k=3) == ["first", "other"]
    assert ids(mmr_threshold=0.2) == ["first", "far"]  # eight candidates
    assert ids(mmr_threshold=0.2, mmr_prefetch_factor=1) == ["first", "twin"]
    assert ids(mmr_threshold=1) == ["first", "twin"]
    assert ids(mmr_threshold=1, mmr_prefetch_k=1) == [
        "first",
        "twin",
    ]  # never fewer candidates than results
    assert ids(filters=MetadataFilters(filters=[MetadataFilter(key="lang", value="en")])) == [
        "other"
    ]
    assert len(ids(10) or []) == 4


def test_an_index_of_llamaindex_on_it_retrieves(store: SyncdVectorStore) -> None:
    from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex

    context = StorageContext.from_defaults(vector_store=store)
    index = VectorStoreIndex(NODES, storage_context=context, embed_model=MockEmbedding(2))
    assert {each.node.node_id for each in index.as_retriever(similarity_top_k=3).retrieve("x")} == {
        "a",
        "b",
        "c",
    }


def test_nodes_are_read_and_deleted_by_filters(store: SyncdVectorStore) -> None:
    store.add(NODES)
    english = MetadataFilters(filters=[MetadataFilter(key="lang", value="en")])
    assert [each.node_id for each in store.get_nodes(filters=english)] == ["a"]
    assert store.get_nodes(["b", "c"], filters=english) == []
    assert store.get_nodes([], filters=english) == []
    assert sorted(
        each.node_id for each in store.get_nodes(filters=MetadataFilters(filters=[]))
    ) == ["a", "b", "c"]
    store.delete_nodes(["b", "c"], filters=english)
    store.delete_nodes()
    assert store.query(query()).ids == ["a", "b", "c"]
    store.delete_nodes(filters=english)
    assert store.query(query()).ids == ["b", "c"]
    store.clear()
    assert store.get_nodes(filters=english) == []


def test_metadata_of_a_node_and_of_its_document_is_json_or_refused_by_the_nodes_id(
    store: SyncdVectorStore,
) -> None:
    given = {
        "at": datetime(2024, 2, 29, tzinfo=UTC),
        "n": np.int64(7),
        "v": np.array([1.5]),
        "d": Decimal("0.5"),
        "u": uuid.UUID(int=1),
    }
    stored = {
        "at": "2024-02-29T00:00:00+00:00",
        "n": 7,
        "v": [1.5],
        "d": 0.5,
        "u": str(uuid.UUID(int=1)),
    }
    good = node("good", [1, 0], "", **given)
    good.relationships[NodeRelationship.SOURCE] = RelatedNodeInfo(node_id="whole", metadata=given)
    good.relationships[NodeRelationship.CHILD] = [RelatedNodeInfo(node_id="part", metadata=given)]
    store.add([good])
    (back,) = store.get_nodes(["good"])
    assert (back.metadata, back.source_node and back.source_node.metadata) == (stored, stored)
    assert [each.metadata for each in back.child_nodes or []] == [stored]
    assert good.metadata is not back.metadata
    assert good.metadata["n"].dtype == np.int64  # the caller's own node is unchanged
    bad = node("bad", [1, 0])
    for wrong in ({"n": float("nan")}, {"n": {"a"}}, {"n": "a\0"}):
        bad.metadata = wrong
        with pytest.raises(InvalidDocument, match="'bad': "):
            store.add([good, bad])
    bad.metadata = {}
    bad.embedding = None
    with pytest.raises(InvalidDocument, match="'bad': it has no vector"):
        store.add([good, bad])
    assert store.query(query()).ids == ["good"]
