"""A table of documents in PostgreSQL, searched by syncd: the shared part of both vector stores.

Invariants: a search sees every write that this object has finished. Texts and metadata are read
from the table, so an answer never has a deleted document.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar
from weakref import WeakSet

import numpy as np
import psycopg
from numpy.typing import NDArray
from psycopg import Connection, sql
from psycopg import errors as pg
from psycopg.rows import class_row
from psycopg_pool import ConnectionPool

from syncd.apps.contents import Document, check_lengths, checked_rows, storable
from syncd.client.calls import Hit, Vector
from syncd.client.client import Client
from syncd.errors import DatabaseError, NotReady, SettingsError, UnknownDataset
from syncd.per_process import PerProcess
from syncd.postgres import session
from syncd.protocol.messages import MAX_RESULTS
from syncd.statements import filled, statement
from syncd.types import Metric, Token, dataset_name

MAX_CONNECTIONS = 4
CONNECT = {"autocommit": True, "client_encoding": "UTF8", "prepare_threshold": None}
"""Connection parameters that also work behind a pooler.

There the next transaction may be in another session. So each transaction sets what it needs, and no
statement is prepared.
"""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """A document and its distance, as pgvector's operators compute it."""

    document: Document
    distance: float


class Documents:
    """One collection of one table.

    Threads may share it, and so may a process and its forked children: each process opens its own
    connections. ``dsn`` is libpq's connection string, by default its ``PG*`` variables. ``address``
    and ``token`` are those of ``syncd.connect``. ``table`` is a name, or ``schema.name``. If the
    table does not exist, or was dropped meanwhile, it is created and attached; this needs ``USAGE``
    on schema ``syncd``. ``metric`` is the metric of that attach, by default cosine. If the table is
    already attached with another metric, ``SettingsError`` is raised.
    """

    def __init__(
        self,
        dsn: str = "",
        *,
        table: str,
        collection: str,
        metric: Metric | None = None,
        address: str | os.PathLike[str] | None = None,
        token: str | None = None,
    ) -> None:
        self.table = table
        self.collection = collection
        self.metric: Metric = metric or "cosine"
        self._asked_metric = metric
        self._oid: int | None = None
        self.dataset = dataset_name(table, collection)
        self.last_token: str | None = None
        self._name = sql.Identifier(*table.split("."))
        # psycopg interprets % in names as well
        self._name_in_query = sql.Identifier(*table.replace("%", "%%").split("."))
        self._own = PerProcess(lambda: _Own(dsn, address, token), _Own.leave)
        try:
            with self._own.get().connection() as connection:
                self._open(connection)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close this process's connections. The object cannot be used in it afterwards."""
        self._own.get().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, documents: Sequence[Document], vectors: Sequence[Vector | None]) -> None:
        """Insert or replace documents, all or none of them.

        Raises ``InvalidDocument``, which names the documents that cannot be stored or indexed.
        """
        rows = checked_rows(self.collection, documents, vectors, self.metric)
        ids = [row["id"] for row in rows]

        def insert(connection: Connection) -> None:
            with session.transaction(connection), connection.cursor() as cursor:
                present = self._lengths(connection, ids)
                if (
                    not present
                ):  # the second of two first writes waits, and sees the first's lengths
                    connection.execute(statement("apps", "lock_first_write"), [self.dataset])
                    present = self._lengths(connection, ids)
                check_lengths(rows, present, self.collection)
                cursor.executemany(self._statement("write_document"), rows)
            self._remember(connection)

        if rows:
            self._on_table(insert)

    def delete(self, ids: Sequence[str] | None = None) -> None:
        """Delete these documents; None: all of the collection. Unknown ids are ignored."""
        if ids is None:
            self._change("delete_collection")
        else:
            self._change("delete_documents", ids=storable(ids))

    def delete_of(self, document_id: str) -> None:
        """Delete all rows that were cut from one document."""
        self._change("delete_of_document", document_id=document_id)

    def read(self, ids: Sequence[str]) -> list[Document]:
        """Those of the documents that exist, in the order of ``ids``."""

        def found(connection: Connection) -> dict[str, Document]:
            with (
                session.transaction(connection),
                connection.cursor(row_factory=class_row(Document)) as cursor,
            ):
                cursor.execute(
                    self._statement("read_documents"),
                    {"collection": self.collection, "ids": storable(ids)},
                )
                return {document.id: document for document in cursor}

        documents = self._on_table(found)
        return [documents[each] for each in ids if each in documents]

    def search(
        self,
        vector: Vector,
        k: int,
        conditions: Mapping[str, Any] | None = None,
        after: str | None = None,
    ) -> list[Found]:
        """The ``k`` nearest documents, nearest first.

        ``after`` is another writer's token. The search always sees this object's own writes.
        """
        hits = self._hits(vector, k, conditions, after)
        distances = {key[1]: hit.distance for hit in hits if isinstance(key := hit.key, tuple)}
        return [
            Found(document, distances[document.id])
            for document in self.read([str(each) for each in distances])
        ]

    def ids_where(self, conditions: Mapping[str, Any]) -> list[str]:
        """The ids of all documents that a filter selects, in no order."""

        def found(connection: Connection) -> list[int]:
            with session.transaction(connection):
                return self._lengths(connection, [])

        lengths = self._on_table(found)
        if not lengths:
            return []
        hits = self._hits(np.ones(lengths[0], dtype=np.float32), MAX_RESULTS, conditions, None)
        if len(hits) == MAX_RESULTS:
            raise ValueError(f"the filter matches {MAX_RESULTS} documents or more: ask for fewer")
        return [str(key[1]) for hit in hits if isinstance(key := hit.key, tuple)]

    def vectors(self, ids: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """The indexed vectors of these documents, (d,) float32; of unit length under cosine."""
        if not ids:
            return {}  # a collection without rows has no dataset
        with self._own.get().client() as client:
            rows = client.get(self.dataset, [(self.collection, each) for each in ids], vectors=True)
        return {
            str(row.key[1]): row.vector
            for row in rows
            if isinstance(row.key, tuple) and row.vector is not None
        }

    def _hits(
        self, vector: Vector, k: int, conditions: Mapping[str, Any] | None, after: str | None
    ) -> list[Hit]:
        if k <= 0:
            return []
        with self._own.get().client() as client:
            if after is not None:
                client.wait(after)  # a call of its own: neither of two tokens includes the other
            try:
                return client.search(
                    self.dataset, vector, k=k, filter=conditions, after=self.last_token
                )
            except (UnknownDataset, NotReady):  # no rows yet, or the table is new
                if not self._on_table(self._has_vectors):
                    return []
            return client.search(self.dataset, vector, k=k, filter=conditions, consistency="strong")

    def _open(self, connection: Connection) -> None:
        """Create the table and attach it if necessary, and read its metric."""
        with session.transaction(connection):
            connection.execute(statement("apps", "lock_creation"))
            name = self._name.as_string(connection)
            oid, metric = self._look(connection)
            if oid is None:
                connection.execute(self._statement("create_documents"), {})
            if metric is None:
                self._attach(connection, name)
                oid, metric = self._look(connection)
        if self._asked_metric not in (None, metric):
            raise SettingsError(
                f"table {self.table} is attached with metric {metric!r}, expected "
                f"{self._asked_metric!r}",
                hint=f"open it without `metric`, or with metric={metric!r}",
            )
        assert metric is not None
        self._oid, self.metric = oid, metric

    def _attach(self, connection: Connection, name: str) -> None:
        """Attach the table; if it replaces a dropped table of this name, with that one's arguments.

        Raises ``DatabaseError`` if the role is not the table's owner.
        """
        row = connection.execute(statement("apps", "dropped_metric"), [name]).fetchone()
        again = row is not None and self._asked_metric in (None, row[0])
        command = statement("apps", "reattach_documents" if again else "attach_documents")
        given = {"source": name, "project": self.table, "metric": self._asked_metric or self.metric}
        try:
            connection.execute(command, given)
            connection.execute(statement("apps", "detach_dropped"), given)
        except pg.InsufficientPrivilege as error:
            raise DatabaseError(
                f"table {self.table} is not attached, and this role may not attach it: "
                f"{error.diag.message_primary}",
                hint=f"as the table's owner: {self._attach_command(connection)}",
            ) from error

    def _attach_command(self, connection: Connection) -> str:
        """The command that the table's owner has to run."""
        name = self._name.as_string(connection)
        given = {"source": name, "project": self.table, "metric": self._asked_metric or self.metric}
        shown = psycopg.ClientCursor(connection).mogrify(
            statement("apps", "attach_documents"), given
        )
        return f"{' '.join(shown[shown.index('SELECT') :].split())};"

    def _look(self, connection: Connection) -> tuple[int | None, Metric | None]:
        """The oid of the table that has the name now, and the metric of its attach."""
        row = connection.execute(
            statement("apps", "find_table"), [self._name.as_string(connection)]
        ).fetchone()
        assert row is not None
        return row[0], row[1]

    def _on_table(self, work: Callable[[Connection], T]) -> T:
        """Run ``work``; if the table was dropped, create it again first."""
        own = self._own.get()
        try:
            with own.connection() as connection:
                return work(connection)
        except pg.UndefinedTable:
            with own.connection() as connection:
                self._open(connection)
                return work(connection)

    def _change(self, name: str, **parameters: object) -> None:
        def change(connection: Connection) -> None:
            with session.transaction(connection):
                connection.execute(
                    self._statement(name), {"collection": self.collection, **parameters}
                )
            self._remember(connection)

        self._on_table(change)

    def _remember(self, connection: Connection) -> None:
        """Keep a token that was taken after the commit.

        A search with this token sees every write that had finished, in any thread. If the table was
        created again since it was opened, it is attached first.
        """
        with session.transaction(connection):
            if self._look(connection)[0] != self._oid:
                self._open(connection)
            row = connection.execute(statement("apps", "token")).fetchone()
        assert row is not None
        with self._own.get().lock:
            new, last = Token.parse(row[0]), Token.parse(self.last_token or "0")
            if new.xid > last.xid or new.history != last.history:
                self.last_token = row[0]

    def _has_vectors(self, connection: Connection) -> bool:
        """Whether the collection has vectors.

        A table that was created again is attached. Raises ``DatabaseError`` if it was detached.
        """
        with session.transaction(connection):
            oid, metric = self._look(connection)
            if oid != self._oid:
                self._open(connection)
            found = connection.execute(
                self._statement("has_vectors"), {"collection": self.collection}
            ).fetchone()
            if found == (True,) and oid == self._oid and metric is None:
                raise DatabaseError(
                    f"table {self.table} has vectors of collection {self.collection!r}, but syncd "
                    "does not follow it",
                    hint=f"attach it: {self._attach_command(connection)}",
                )
            return found == (True,)

    def _lengths(self, connection: Connection, replaced: Sequence[str]) -> list[int]:
        """Lengths of some of the collection's vectors, without those of the replaced documents."""
        found = connection.execute(
            self._statement("vector_lengths"),
            {"collection": self.collection, "replaced": list(replaced)},
        )
        return [row[0] for row in found]

    def _statement(self, name: str) -> sql.Composed:
        return filled("apps", name, table=self._name_in_query)


class _Own:
    """One process's part of a ``Documents``: a pool of database connections, and syncd clients."""

    def __init__(self, dsn: str, address: str | os.PathLike[str] | None, token: str | None) -> None:
        self.lock = threading.Lock()
        self._address, self._token = address, token
        self._clients: list[Client] = []
        self._idle: deque[Client] = deque()
        self._opened: WeakSet[Connection] = WeakSet()
        self._pool = ConnectionPool(
            dsn,
            kwargs=CONNECT,
            min_size=0,
            max_size=MAX_CONNECTIONS,
            open=False,
            configure=self._configure,
            check=ConnectionPool.check_connection,
        )

    def connection(self) -> AbstractContextManager[Connection]:
        """A connection to the database; raises ``psycopg.OperationalError`` after ``close``."""
        self._pool.open()  # does nothing if it is open
        return self._pool.connection()

    def _configure(self, connection: Connection) -> None:
        """Prepare a connection that the pool has opened."""
        self._opened.add(connection)
        session.defaults(connection)

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A client that no other thread uses: a search that waits does not delay other threads."""
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
        """Close the pool and the clients."""
        self._pool.close()
        while self._idle:
            self._idle.pop().close()

    def leave(self) -> None:
        """Close this process's descriptors; the parent process keeps its connections.

        Nothing is sent to the database. The libpq objects are not finished: psycopg finishes only
        those that the same process has created.
        """
        for connection in tuple(self._opened):
            if not connection.closed:
                os.close(connection.fileno())
        for client in self._clients:
            client.close()
