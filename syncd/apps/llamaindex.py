"""LlamaIndex's vector store on a PostgreSQL table, with searches answered by syncd. Needs ``pip install 'syncd[llamaindex]'``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any

from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode, MetadataMode
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from syncd.apps.documents import METADATA, Document, Documents, Found
from syncd.types import Metric

OPERATORS = {
    FilterOperator.EQ: "eq",
    FilterOperator.NE: "ne",
    FilterOperator.GT: "gt",
    FilterOperator.GTE: "gte",
    FilterOperator.LT: "lt",
    FilterOperator.LTE: "lte",
    FilterOperator.IN: "in",
    FilterOperator.ANY: "any",
    FilterOperator.ALL: "contains",
    FilterOperator.CONTAINS: "contains",
}
MODES = (VectorStoreQueryMode.DEFAULT, VectorStoreQueryMode.MMR)
MMR_PREFETCH_FACTOR = 4.0


class SyncdVectorStore(BasePydanticVectorStore):
    """Nodes in a table of yours, searched by syncd.

    A query sees every write that this store has finished; ``query(..., after=token)`` takes the token of another writer. ``similarities``
    are 1 - distance under ``cosine``, the inner product under ``ip``, and 1 / (1 + distance) under ``l2``. The parameters are those of
    ``syncd.apps.documents.Documents``. The asynchronous methods run in threads, and do not hold up the loop.
    """

    stores_text: bool = True
    _documents: Documents = PrivateAttr()

    def __init__(
        self,
        dsn: str = "",
        *,
        collection: str = "default",
        table: str = "llamaindex_documents",
        metric: Metric = "cosine",
        address: str | os.PathLike[str] | None = None,
        token: str | None = None,
    ) -> None:
        super().__init__(stores_text=True)
        self._documents = Documents(
            dsn, table=table, collection=collection, metric=metric, address=address, token=token
        )  # fmt: skip

    @classmethod
    def class_name(cls) -> str:
        """What LlamaIndex calls it."""
        return "SyncdVectorStore"

    @property
    def client(self) -> Documents:
        """The table of documents."""
        return self._documents

    @property
    def last_token(self) -> str | None:
        """The token of this store's writes, for a reader elsewhere."""
        return self._documents.last_token

    def close(self) -> None:
        """Close the connections."""
        self._documents.close()

    def add(self, nodes: Sequence[BaseNode], **_: Any) -> list[str]:
        """Write nodes that have embeddings; one whose id is there is replaced."""
        rows = [
            Document(
                node.node_id,
                node.get_content(metadata_mode=MetadataMode.NONE),
                node_to_metadata_dict(node, remove_text=True, flat_metadata=False),
                node.ref_doc_id,
            )
            for node in nodes
        ]
        self._documents.write(rows, [node.get_embedding() for node in nodes])
        return [row.id for row in rows]

    def delete(self, ref_doc_id: str, **_: Any) -> None:
        """Delete the nodes of a document."""
        self._documents.delete_of(ref_doc_id)

    def delete_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **_: Any) -> None:
        """Delete nodes by their ids."""
        refuse(filters)
        self._documents.delete(node_ids or [])

    def clear(self) -> None:
        """Delete every node of the collection."""
        self._documents.delete()

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """Nodes by their ids."""
        refuse(filters)
        return [as_node(each) for each in self._documents.read(node_ids or [])]

    def query(self, query: VectorStoreQuery, *, after: str | None = None, **kwargs: Any) -> VectorStoreQueryResult:
        """The nearest nodes to ``query_embedding``, or in mode ``mmr`` nodes near to it of which each is unlike the one before.

        ``mmr_threshold``, ``mmr_prefetch_factor`` and ``mmr_prefetch_k`` are those of LlamaIndex's other stores. Raises ``ValueError`` in modes
        that look at texts: syncd compares vectors.
        """
        if query.mode not in MODES or query.query_embedding is None:
            raise ValueError(f"syncd answers queries of mode default or mmr with an embedding, not {query.mode.value}")
        limit = query.similarity_top_k
        if query.mode == VectorStoreQueryMode.MMR:
            near = self._nearest(query, max(limit, candidates(limit, kwargs)), after)
            found, similarities = self._unlike(query, near, kwargs.get("mmr_threshold", query.mmr_threshold))
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
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
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

    def _nearest(self, query: VectorStoreQuery, k: int, after: str | None) -> list[Found]:
        assert query.query_embedding is not None
        conditions = [as_filter(query.filters)] if query.filters is not None else []
        if query.node_ids:  # a retriever passes an empty list for "any"
            conditions.append({"id": {"in": query.node_ids}})
        if query.doc_ids:
            conditions.append({"document_id": {"in": query.doc_ids}})
        return self._documents.search(query.query_embedding, k, {"and": conditions} if conditions else None, after)

    def _unlike(
        self, query: VectorStoreQuery, near: list[Found], threshold: float | None
    ) -> tuple[list[Found], list[float]]:
        """Those that LlamaIndex's maximal marginal relevance chooses, and its scores. One deleted meanwhile has no vector any more."""
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
    """How many of the nearest the relevance chooses from."""
    if "mmr_prefetch_k" in options and "mmr_prefetch_factor" in options:
        raise ValueError("mmr_prefetch_k and mmr_prefetch_factor say the same: give one")
    return int(options.get("mmr_prefetch_k", limit * options.get("mmr_prefetch_factor", MMR_PREFETCH_FACTOR)))


def as_node(document: Document) -> BaseNode:
    """A node as LlamaIndex wrote it."""
    return metadata_dict_to_node(document.metadata, document.content)


def as_filter(filters: MetadataFilters) -> dict[str, Any]:
    """LlamaIndex's filter in syncd's words; raises ``ValueError`` for an operator that syncd has not."""
    each = [as_filter(one) if isinstance(one, MetadataFilters) else as_condition(one) for one in filters.filters]
    if filters.condition == FilterCondition.OR:
        return {"or": each}
    return {"not": {"and": each}} if filters.condition == FilterCondition.NOT else {"and": each}


def as_condition(condition: MetadataFilter) -> dict[str, Any]:
    """One comparison."""
    name = f"{METADATA}.{condition.key}"
    if condition.operator == FilterOperator.IS_EMPTY:
        return {name: {"eq": None}}
    if condition.operator == FilterOperator.NIN:
        return {"not": {name: {"in": condition.value}}}
    if condition.operator not in OPERATORS:
        raise ValueError(f"syncd has no filter for {condition.operator.value}; it has {', '.join(OPERATORS)}")
    return {name: {OPERATORS[condition.operator]: condition.value}}


def refuse(filters: MetadataFilters | None) -> None:
    """Filters are for queries."""
    if filters is not None:
        raise ValueError("nodes are read and deleted by their ids: filters are for queries")
