"""LangChain's own tests of a vector store, and tests of behaviour that they do not cover."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from syncd.testing import Throwaway

pytest.importorskip("langchain_core", reason="pip install -e '.[dev]'")
suites = pytest.importorskip(
    "langchain_tests.integration_tests.vectorstores", reason="pip install -e '.[dev]'"
)

from langchain_core.documents import Document  # noqa: E402
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings  # noqa: E402

from syncd.apps.langchain import SyncdVectorStore  # noqa: E402


class Words(Embeddings):
    """An embedding for texts that are vectors, such as ``1 0``."""

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]

    def embed_query(self, text: str) -> list[float]:
        return [float(word) for word in text.split()]


def store_in(running: Throwaway, embedding: Embeddings, collection: str = "") -> SyncdVectorStore:
    name = collection or uuid.uuid4().hex
    return SyncdVectorStore(embedding, running.dsn, collection=name, address=running.socket)


@pytest.fixture
def store(running: Throwaway) -> Iterator[SyncdVectorStore]:
    opened = store_in(running, Words())
    yield opened
    opened.close()


@pytest.mark.anyio
class TestLangChainsOwnSuite(suites.VectorStoreIntegrationTests):  # type: ignore[name-defined]
    @pytest.fixture
    def vectorstore(self, running: Throwaway) -> Iterator[SyncdVectorStore]:
        opened = store_in(running, self.get_embeddings())
        yield opened
        opened.close()


def test_a_search_sees_the_writes_of_every_thread_that_has_finished(
    store: SyncdVectorStore,
) -> None:
    def write(number: int) -> bool:
        (name,) = store.add_texts([f"1 {number}"])
        return name in [document.id for document in store.similarity_search(f"1 {number}", k=100)]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(write, range(80)))


def test_a_reader_elsewhere_sees_a_write_by_its_token(
    running: Throwaway, store: SyncdVectorStore
) -> None:
    reader = store_in(running, Words(), store.documents.collection)
    try:
        for number in range(50):
            store.add_texts([f"1 {number}"], ids=["same"])
            (found,) = reader.similarity_search("1 0", after=store.last_token)
            assert found.page_content == f"1 {number}"
    finally:
        reader.close()


def test_filters_are_over_metadata(store: SyncdVectorStore) -> None:
    store.add_documents(
        [
            Document(
                id="a",
                page_content="1 0",
                metadata={"lang": "en", "year": 2020, "size": {"height": 1}},
            ),
            Document(
                id="b",
                page_content="1 1",
                metadata={"lang": "de", "year": 2024, "size": {"height": 2}},
            ),
            Document(id="c", page_content="0 1", metadata={"year": 2022}),
        ]
    )

    def ids(**conditions: object) -> list[str | None]:
        return [document.id for document in store.similarity_search("1 0", k=10, filter=conditions)]

    assert ids(lang="en") == ["a"]
    assert ids(year={"gte": 2022}) == ["b", "c"]
    assert ids(**{"not": {"lang": "de"}}) == ["a"]  # as NOT in SQL: c has no lang
    assert ids(**{"or": [{"lang": None}, {"size.height": 2}]}) == ["b", "c"]


def test_scores_are_distances_and_relevance_is_their_complement(store: SyncdVectorStore) -> None:
    store.add_texts(["2 0", "0 5"], ids=["same way", "across"])
    scored = store.similarity_search_with_score("1 0", k=2)
    assert [(document.id, round(distance, 6)) for document, distance in scored] == [
        ("same way", 0.0),
        ("across", 1.0),
    ]
    relevant = store.similarity_search_with_relevance_scores("1 0", k=2)
    assert [round(score, 6) for _, score in relevant] == [1.0, 0.0]


def test_a_table_that_was_made_a_moment_ago_answers(running: Throwaway) -> None:
    """Also before syncd has seen the table, and for a program that has not made it."""
    for number in range(10):
        table = f"fresh_{uuid.uuid4().hex}"
        stores = [
            SyncdVectorStore(Words(), running.dsn, table=table, address=running.socket)
            for _ in range(2)
        ]
        try:
            assert stores[number % 2].similarity_search("1 0") == []
            stores[0].add_texts(["1 0"], ids=["x"])
            assert [document.id for document in stores[1].similarity_search("1 0")] == ["x"]
        finally:
            for each in stores:
                each.close()


def test_marginal_relevance_prefers_unlike_documents(store: SyncdVectorStore) -> None:
    assert store.max_marginal_relevance_search("1 0", k=2) == []
    store.add_texts(["1 0", "1 0.01", "0.7 0.7"], ids=["first", "twin", "other"])
    assert [each.id for each in store.similarity_search("1 0", k=2)] == ["first", "twin"]
    assert [
        each.id for each in store.max_marginal_relevance_search("1 0", k=2, lambda_mult=0.2)
    ] == ["first", "other"]


def test_collections_and_tables_with_the_same_ids_are_apart(
    running: Throwaway, store: SyncdVectorStore
) -> None:
    other_collection = store_in(running, Words())
    other_table = SyncdVectorStore(
        Words(),
        running.dsn,
        collection=store.documents.collection,
        table="public.other%table",
        address=running.socket,
    )
    try:
        for number, each in enumerate((store, other_collection, other_table)):
            each.add_texts([f"1 {number}"], ids=["x"])
        found = [
            each.similarity_search("1 0")[0].page_content
            for each in (store, other_collection, other_table)
        ]
        assert found == ["1 0", "1 1", "1 2"]
        store.delete()
        assert store.similarity_search("1 0") == []
        assert [document.id for document in other_collection.similarity_search("1 0")] == ["x"]
    finally:
        other_collection.close()
        other_table.close()


def test_a_table_that_syncd_does_not_follow_is_an_error_and_not_empty(running: Throwaway) -> None:
    store = SyncdVectorStore(Words(), running.dsn, table="forgotten", address=running.socket)
    try:
        with psycopg.connect(running.dsn, autocommit=True) as connection:
            connection.execute("SELECT syncd.detach('forgotten')")
        running.catch_up()
        store.add_texts(["1 0"])
        with pytest.raises(Exception, match="syncd does not follow it"):
            store.similarity_search("1 0")
    finally:
        store.close()


def test_a_store_made_from_texts_has_them(running: Throwaway) -> None:
    store = SyncdVectorStore.from_texts(
        ["a", "b"],
        DeterministicFakeEmbedding(size=4),
        [{"n": 1}, {"n": 2}],
        dsn=running.dsn,
        collection=uuid.uuid4().hex,
        address=running.socket,
    )
    try:
        retriever = store.as_retriever(search_kwargs={"k": 1, "filter": {"n": 2}})
        assert [document.page_content for document in retriever.invoke("a")] == ["b"]
    finally:
        store.close()
