"""LlamaIndex's vector store on a PostgreSQL table, searched by syncd.

Needs ``pip install 'syncd[llamaindex]'``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode, MetadataMode, RelatedNodeInfo
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from syncd.apps.contents import Document, InvalidDocuments
from syncd.apps.documents import Documents, Found
from syncd.apps.llamaindex_filters import as_filter
from syncd.json_values import json_value
from syncd.types import Metric

MODES = (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR)
MMR_PREFETCH_FACTOR = 4.0


class SyncdVectorStore(BasePydanticVectorStore):
    """Nodes in a PostgreSQL table, searched by syncd.

    A query sees every write that this store has finished; ``query(..., after=token)`` takes another
    writer's token. ``similarities`` are 1 - distance under ``cosine``, the inner product under
    ``ip``, and 1 / (1 + distance) under ``l2``. The parameters are those of
    ``syncd.apps.documents.Documents``. The asynchronous methods run in threads, and do not block
    the event loop.
    """

    stores_text: bool = True
    _documents: Documents = PrivateAttr()

    def __init__(
        self,
        dsn: str = "",
        *,
        collection: str = "default",
        table: str = "llamaindex_documents",
        metric: Metric | None = None,
        address: str | os.PathLike[str] | None = None,
        token: str | None = None,
    ) -> None:
        super().__init__(stores_text=True)
        self._documents = Documents(
            dsn, table=table, collection=collection, metric=metric, address=address, token=token
        )

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name of this class."""
        return "SyncdVectorStore"

    @property
    def client(self) -> Documents:
        """The table of documents."""
        return self._documents

    @property
    def last_token(self) -> str | None:
        """Token of this store's writes, for readers in other programs."""
        return self._documents.last_token

    def close(self) -> None:
        """Close the connections."""
        self._documents.close()

    def add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:
        """Write nodes that have embeddings; a node with the same id is replaced."""
        rows, wrong = [], InvalidDocuments(len(nodes))
        for node in nodes:
            with wrong.of(node.node_id):
                content = node.get_content(metadata_mode=MetadataMode.NONE)
                metadata = node_to_metadata_dict(plain(node), remove_text=True, flat_metadata=False)
                rows.append(Document(node.node_id, content, metadata, node.ref_doc_id))
        wrong.raise_if_any("correct their metadata, and write again")
        self._documents.write(rows, [node.embedding for node in nodes])
        return [row.id for row in rows]

    def delete(self, ref_doc_id: str, **_: Any) -> None:
        """Delete the nodes of a document."""
        self._documents.delete_of(ref_doc_id)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **_: Any
    ) -> None:
        """Delete nodes: these, those that pass the filters, or those of these that pass.

        Without ids and filters no node is deleted.
        """
        self._documents.delete(self._ids(node_ids, filters))

    def clear(self) -> None:
        """Delete every node of the collection."""
        self._documents.delete()

    def get_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """Nodes: these, those that pass the filters, or those of these that pass.

        They are in the order of ``node_ids``. Without ids and filters there are none.
        """
        return [as_node(each) for each in self._documents.read(self._ids(node_ids, filters))]

    def query(
        self, query: VectorStoreQuery, *, after: str | None = None, **kwargs: Any
    ) -> VectorStoreQueryResult:
        """The nearest nodes to ``query_embedding``; in mode ``mmr``, near nodes that differ.

        ``mmr_threshold``, ``mmr_prefetch_factor`` and ``mmr_prefetch_k`` are those of LlamaIndex's
        other stores. Raises ``ValueError`` in modes that compare texts: syncd compares vectors.
        """
        if query.mode not in MODES or query.query_embedding is None:
            raise ValueError(
                "syncd answers queries of mode default or mmr with an embedding, not "
                f"{query.mode.value}"
            )
        limit = query.similarity_top_k
        if query.mode == VectorStoreQueryMode.MMR:
            near = self._nearest(query, max(limit, candidates(limit, kwargs)), after)
            found, similarities = self._unlike(
                query, near, kwargs.get("mmr_threshold", query.mmr_threshold)
            )
        else:
            found = self._nearest(query, limit, after)
            similarities = [self._similarity(each.distance) for each in found]
        return VectorStoreQueryResult(
            nodes=[as_node(each.document) for each in found],
            similarities=similarities,
            ids=[each.document.id for each in found],
        )

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """See ``add``."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """See ``delete``."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self,
        node_ids: list[str] | None = None,
        filters: MetadataFilters | None = None,
        **delete_kwargs: Any,
    ) -> None:
        """See ``delete_nodes``."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters, **delete_kwargs)

    async def aclear(self) -> None:
        """See ``clear``."""
        await asyncio.to_thread(self.clear)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """See ``get_nodes``."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """See ``query``."""
        return await asyncio.to_thread(self.query, query, **kwargs)

    def _ids(self, node_ids: list[str] | None, filters: MetadataFilters | None) -> list[str]:
        """The ids of the nodes that ids and filters select."""
        if filters is None or node_ids == []:
            return node_ids or []
        passing = self._documents.ids_where(as_filter(filters))
        if node_ids is None:
            return passing
        chosen = set(passing)
        return [each for each in node_ids if each in chosen]

    def _nearest(self, query: VectorStoreQuery, k: int, after: str | None) -> list[Found]:
        assert query.query_embedding is not None
        asked = as_filter(query.filters) if query.filters is not None else {}
        conditions = [asked] if asked else []
        if query.node_ids:  # a retriever passes an empty list for "any"
            conditions.append({"id": {"in": query.node_ids}})
        if query.doc_ids:
            conditions.append({"document_id": {"in": query.doc_ids}})
        return self._documents.search(
            query.query_embedding, k, {"and": conditions} if conditions else None, after
        )

    def _unlike(
        self, query: VectorStoreQuery, near: list[Found], threshold: float | None
    ) -> tuple[list[Found], list[float]]:
        """The nodes that LlamaIndex's maximal marginal relevance chooses, and its scores.

        A node that was deleted meanwhile no longer has a vector, and is left out.
        """
        assert query.query_embedding is not None
        vectors = self._documents.vectors([each.document.id for each in near])
        there = {each.document.id: each for each in near if each.document.id in vectors}
        if not there:
            return [], []
        scores, names = get_top_k_mmr_embeddings(
            query.query_embedding,
            [vectors[name].tolist() for name in there],
            similarity_top_k=query.similarity_top_k,
            embedding_ids=list(there),
            mmr_threshold=threshold,
        )
        return [there[name] for name in names], scores

    def _similarity(self, distance: float) -> float:
        if self._documents.metric == "cosine":
            return 1 - distance
        return -distance if self._documents.metric == "ip" else 1 / (1 + distance)


def candidates(limit: int, options: Mapping[str, Any]) -> int:
    """Number of nearest nodes that the maximal marginal relevance chooses from."""
    if "mmr_prefetch_k" in options and "mmr_prefetch_factor" in options:
        raise ValueError("mmr_prefetch_k and mmr_prefetch_factor exclude each other: give one")
    factor = options.get("mmr_prefetch_factor", MMR_PREFETCH_FACTOR)
    return int(options.get("mmr_prefetch_k", limit * factor))


def as_node(document: Document) -> BaseNode:
    """LlamaIndex's form of a document."""
    return metadata_dict_to_node(dict(document.metadata), document.content)


def plain(node: BaseNode) -> BaseNode:
    """A copy of a node with its metadata as JSON; raises ``ValueError``.

    A node also repeats the metadata of related nodes; this is converted as well.
    """

    def related(given: Any) -> Any:
        if isinstance(given, RelatedNodeInfo):
            return given.model_copy(update={"metadata": json_value(given.metadata)})
        return [related(each) for each in given]

    relationships = {name: related(each) for name, each in node.relationships.items()}
    return node.model_copy(
        update={"metadata": json_value(node.metadata), "relationships": relationships}
    )
