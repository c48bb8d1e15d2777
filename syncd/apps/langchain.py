"""LangChain's ``VectorStore`` on a PostgreSQL table, searched by syncd.

Needs ``pip install 'syncd[langchain]'``.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from syncd.apps.contents import Document as Row
from syncd.apps.documents import Documents
from syncd.apps.metadata_filters import on_metadata
from syncd.types import Metric

Filter = Mapping[str, Any]


class SyncdVectorStore(VectorStore):
    """Documents in a PostgreSQL table, searched by syncd.

    A search sees every write that this store has finished; ``after`` takes another writer's token.
    ``filter`` is a syncd filter over the metadata: ``{"lang": "en", "year": {"gte": 2020}}``. Its
    operators may begin with a ``$``; see ``syncd.apps.metadata_filters``. Scores are distances as
    pgvector computes them: the nearest document has the smallest. Metadata is converted by
    ``syncd.json_values``. The other parameters are those of ``syncd.apps.documents.Documents``. The
    asynchronous methods are LangChain's defaults, which run in threads.
    """

    def __init__(
        self,
        embedding: Embeddings,
        dsn: str = "",
        *,
        collection: str = "default",
        table: str = "langchain_documents",
        metric: Metric | None = None,
        address: str | os.PathLike[str] | None = None,
        token: str | None = None,
    ) -> None:
        self._embedding = embedding
        self.documents = Documents(
            dsn, table=table, collection=collection, metric=metric, address=address, token=token
        )

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[Any, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """A store to which these texts were added. ``kwargs`` are those of the class."""
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def close(self) -> None:
        """Close the connections."""
        self.documents.close()

    @property
    def embeddings(self) -> Embeddings:
        """The model that embeds texts."""
        return self._embedding

    @property
    def last_token(self) -> str | None:
        """Token of this store's writes, for readers in other programs."""
        return self.documents.last_token

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[Any, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **_: Any,
    ) -> list[str]:
        """Embed and write texts; a document with the same id is replaced. Returns the ids."""
        contents = list(texts)
        names = [each or str(uuid.uuid4()) for each in ids or [None] * len(contents)]
        rows = [
            Row(name, content, metadata)
            for name, content, metadata in zip(
                names, contents, metadatas or [{}] * len(contents), strict=True
            )
        ]
        self.documents.write(rows, self._embedding.embed_documents(contents))
        return names

    def delete(self, ids: list[str] | None = None, **_: Any) -> bool:
        """Delete these documents; None: all of the collection, as LangChain defines."""
        self.documents.delete(ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Those of the documents that exist."""
        return [as_document(each) for each in self.documents.read(ids)]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The nearest documents; takes ``filter`` and ``after``."""
        return self.similarity_search_by_vector(self._embedding.embed_query(query), k, **kwargs)

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, **kwargs: Any
    ) -> list[Document]:
        """The nearest documents to a vector."""
        return [
            document
            for document, _ in self.similarity_search_with_score_by_vector(embedding, k, **kwargs)
        ]

    def similarity_search_with_score(
        self, query: str, k: int = 4, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The nearest documents and their distances."""
        return self.similarity_search_with_score_by_vector(
            self._embedding.embed_query(query), k, **kwargs
        )

    def similarity_search_with_score_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        *,
        filter: Filter | None = None,  # noqa: A002 - LangChain's name
        after: str | None = None,
        **_: Any,
    ) -> list[tuple[Document, float]]:
        """The nearest documents to a vector, and their distances."""
        found = self.documents.search(
            embedding, k, None if filter is None else on_metadata(filter) or None, after
        )
        return [(as_document(each.document), each.distance) for each in found]

    def max_marginal_relevance_search(
        self, query: str, k: int = 4, fetch_k: int = 20, lambda_mult: float = 0.5, **kwargs: Any
    ) -> list[Document]:
        """``k`` of the ``fetch_k`` nearest documents, each unlike the previous ones."""
        vector = self._embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(
            vector, k, fetch_k, lambda_mult, **kwargs
        )

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        **kwargs: Any,
    ) -> list[Document]:
        """``max_marginal_relevance_search`` for a vector."""
        near = {
            str(each.id): each
            for each in self.similarity_search_by_vector(embedding, fetch_k, **kwargs)
        }
        vectors = self.documents.vectors(list(near))
        names = [name for name in near if name in vectors]
        if not names:
            return []
        chosen = maximal_marginal_relevance(
            np.asarray(embedding, dtype=np.float32),
            [vectors[name].tolist() for name in names],
            lambda_mult,
            k,
        )
        return [near[names[place]] for place in chosen]

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        if self.documents.metric == "cosine":
            return self._cosine_relevance_score_fn
        if self.documents.metric == "l2":
            return self._euclidean_relevance_score_fn
        return self._max_inner_product_relevance_score_fn


def as_document(document: Row) -> Document:
    """LangChain's form of a document."""
    return Document(id=document.id, page_content=document.content, metadata=dict(document.metadata))
