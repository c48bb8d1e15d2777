"""A table of documents in PostgreSQL whose searches are answered by syncd: what the LangChain and the LlamaIndex store share.

The invariant: a search sees every write that this object has finished. Texts and metadata are read from the table, so an answer never holds
a document that is gone.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray
from psycopg import Connection, sql
from psycopg.rows import class_row
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool

from syncd.errors import DatabaseError, NotReady, UnknownDataset
from syncd.per_process import PerProcess
from syncd.rpc.calls import Hit, Vector
from syncd.rpc.client import Client
from syncd.statements import statement
from syncd.types import Metric, Token, dataset_name

MAX_CONNECTIONS = 4
METADATA = "metadata"


@dataclass(frozen=True, slots=True)
class Document:
    """A row without its vector. ``document_id`` names what it was cut from, where it was."""

    id: str
    content: str
    metadata: dict[str, Any] = field(default_factory=dict)
    document_id: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A document and its distance, as pgvector's operators count it."""

    document: Document
    distance: float


class Documents:
    """One collection of one table. Threads may share it, and so may processes that fork: each opens its own connections.

    ``dsn`` is libpq's connection string, by default its ``PG*`` variables; ``address`` and ``token`` are those of ``syncd.connect``.
    ``table`` is a name, or ``schema.name``; it is made and attached where it does not exist, for which its user needs ``USAGE`` on schema
    ``syncd``. ``metric`` is what the table is attached with then.
    """

    def __init__(
        self,
        dsn: str = "",
        *,
        table: str,
        collection: str,
        metric: Metric = "cosine",
        address: str | os.PathLike[str] | None = None,
        token: str | None = None,
    ) -> None:
        self.table = table
        self.collection = collection
        self.metric = metric
        self.dataset = dataset_name(table, collection)
        self.last_token: str | None = None
        self._name = sql.Identifier(*table.split("."))
        self._name_in_query = sql.Identifier(*table.replace("%", "%%").split("."))  # psycopg reads % in names too
        self._own = PerProcess(lambda: _Own(dsn, address, token), _Own.leave)
        try:
            self._create()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close this process's connections; the object is of no use in it afterwards."""
        self._own.get().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, documents: Sequence[Document], vectors: Sequence[Vector]) -> None:
        """Insert or replace, all or none of them."""
        rows = [
            {
                "collection": self.collection,
                "id": each.id,
                "document_id": each.document_id,
                "content": each.content,
                "metadata": Jsonb(each.metadata),
                "embedding": np.asarray(vector, dtype=np.float64).tolist(),
            }
            for each, vector in zip(documents, vectors, strict=True)
        ]
        with self._own.get().connection() as connection:
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(self._statement("write_document"), rows)
            self._remember(connection)

    def delete(self, ids: Sequence[str] | None = None) -> None:
        """Delete these, or without ``ids`` all of the collection; those that are not there do no harm."""
        if ids is None:
            self._change("delete_collection")
        else:
            self._change("delete_documents", ids=list(ids))

    def delete_of(self, document_id: str) -> None:
        """Delete all that was cut from one document."""
        self._change("delete_of_document", document_id=document_id)

    def read(self, ids: Sequence[str]) -> list[Document]:
        """Those of these documents that there are, in the order of ``ids``."""
        with self._own.get().connection() as connection, connection.cursor(row_factory=class_row(Document)) as cursor:
            cursor.execute(self._statement("read_documents"), {"collection": self.collection, "ids": list(ids)})
            found = {document.id: document for document in cursor}
        return [found[each] for each in ids if each in found]

    def search(
        self, vector: Vector, k: int, conditions: Mapping[str, Any] | None = None, after: str | None = None
    ) -> list[Found]:
        """The ``k`` nearest, nearest first. ``after`` is another writer's token; this object's own writes are always seen."""
        hits = self._hits(vector, k, conditions, after)
        distances = {key[1]: hit.distance for hit in hits if isinstance(key := hit.key, tuple)}
        return [Found(document, distances[document.id]) for document in self.read([str(each) for each in distances])]

    def vectors(self, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The indexed vectors of these documents, of unit length where the metric is cosine."""
        if not ids:
            return {}  # of a collection without rows there is no dataset to ask
        with self._own.get().client() as client:
            rows = client.get(self.dataset, [(self.collection, each) for each in ids], vectors=True)
        return {str(row.key[1]): row.vector for row in rows if isinstance(row.key, tuple) and row.vector is not None}

    def _hits(self, vector: Vector, k: int, conditions: Mapping[str, Any] | None, after: str | None) -> list[Hit]:
        if k <= 0:
            return []
        with self._own.get().client() as client:
            if after is not None:
                client.wait(after)  # by itself: neither of two tokens vouches for the other
            try:
                return client.search(self.dataset, vector, k=k, filter=conditions, after=self.last_token)
            except (UnknownDataset, NotReady):  # nothing written yet, or another program has only now made the table
                if not self._has_vectors():
                    return []
            try:
                return client.search(self.dataset, vector, k=k, filter=conditions, consistency="strong")
            except UnknownDataset:
                raise DatabaseError(
                    f"table {self.table} has vectors of collection {self.collection!r}, but syncd does not follow it",
                    hint="attach it: see the `attach_documents` statement of syncd/sql/queries/apps.sql",
                ) from None

    def _create(self) -> None:
        with self._own.get().connection() as connection:
            connection.execute(statement("apps", "lock_creation"))
            name = self._name.as_string(connection)
            if connection.execute(statement("apps", "has_table"), [name]).fetchone() == (False,):
                connection.execute(self._statement("create_documents"), {})
                connection.execute(
                    statement("apps", "attach_documents"),
                    {"source": name, "project": self.table, "metric": self.metric},
                )

    def _change(self, name: str, **parameters: object) -> None:
        with self._own.get().connection() as connection:
            with connection.transaction():
                connection.execute(self._statement(name), {"collection": self.collection, **parameters})
            self._remember(connection)

    def _remember(self, connection: Connection) -> None:
        """Keep a token that was taken after the commit: whoever sees it sees every write that had finished, by whatever thread."""
        row = connection.execute(statement("apps", "token")).fetchone()
        assert row is not None
        with self._own.get().lock:
            new, last = Token.parse(row[0]), Token.parse(self.last_token or "0")
            if new.xid > last.xid or new.history != last.history:
                self.last_token = row[0]

    def _has_vectors(self) -> bool:
        with self._own.get().connection() as connection:
            return connection.execute(self._statement("has_vectors"), {"collection": self.collection}).fetchone() == (
                True,
            )

    def _statement(self, name: str) -> sql.Composed:
        return sql.SQL(statement("apps", name)).format(table=self._name_in_query)


class _Own:
    """What one process has of a ``Documents``: a pool of database connections, and clients of syncd."""

    def __init__(self, dsn: str, address: str | os.PathLike[str] | None, token: str | None) -> None:
        self.lock = threading.Lock()
        self._address, self._token = address, token
        self._clients: list[Client] = []
        self._idle: deque[Client] = deque()
        self._opened: WeakSet[Connection] = WeakSet()
        self._pool = ConnectionPool(
            dsn, min_size=0, max_size=MAX_CONNECTIONS, open=False, configure=self._opened.add,
            check=ConnectionPool.check_connection,
        )  # fmt: skip

    def connection(self) -> AbstractContextManager[Connection]:
        """A connection to the database; raises ``psycopg.OperationalError`` after ``close``."""
        self._pool.open()  # does nothing where it is open
        return self._pool.connection()

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A client that no other thread uses: one that waits for a write does not hold up the others."""
        try:
            client = self._idle.pop()
        except IndexError:
            client = Client(self._address, token=self._token)
            self._clients.append(client)
        try:
            yield client
        finally:
            self._idle.append(client)

    def close(self) -> None:
        """Close them all."""
        self._pool.close()
        while self._idle:
            self._idle.pop().close()

    def leave(self) -> None:
        """Close this process's descriptors of the parent's connections, which go on: no word is sent to the database.

        libpq's objects are never finished here: psycopg finishes those alone that the same process has made.
        """
        for connection in tuple(self._opened):
            if not connection.closed:
                os.close(connection.fileno())
        for client in self._clients:
            client.close()


def on_metadata(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """A filter over metadata as syncd's filter over the table's columns: each name gets ``metadata.`` before it."""
    found: dict[str, Any] = {}
    for name, value in conditions.items():
        if name == "not":
            found[name] = on_metadata(value)
        elif name in ("and", "or"):
            found[name] = [on_metadata(each) for each in value]
        else:
            found[f"{METADATA}.{name}"] = value
    return found
