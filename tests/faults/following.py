"""The end of every fault test: the index equals the table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import psycopg

from syncd.client.calls import Key
from syncd.client.client import Client
from syncd.errors import NotReady, RequestError, ServiceUnavailable, TimedOut, UnknownDataset
from tests.daemon import Daemon
from tests.oracle.comparison import Comparison
from tests.oracle.tables import DOCS, ITEMS, TOPICS, Table
from tests.oracle.writes import fetch, make_vectors

TABLES = (ITEMS, DOCS)
"""A pgvector column under l2 with integer keys, and an array under cosine with uuid keys.

Each table makes several datasets.
"""

SETTLE_SECONDS = 45.0
"""The longest time until an index is right, restarts of the server and back-off included."""


def until(condition: Callable[[], bool], what: str, seconds: float = SETTLE_SECONDS) -> None:
    """Ask until ``condition`` holds; fails after ``seconds``. ``what`` says what holds then."""
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        pause.wait(0.02)


def despite_locks(change: Callable[[], object]) -> None:
    """Make a change of the schema, again while a running service's locks end it.

    The service locks syncd's tables for moments, in another order than the statement.
    """
    until(lambda: is_made(change), "no lock of the service ends the change")


def is_made(change: Callable[[], object]) -> bool:
    """Whether no lock of another session has ended the change."""
    try:
        change()
    except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
        return False
    return True


def attach_tables(conninfo: str, tables: Sequence[Table] = TABLES, rows: int = 60) -> None:
    """Make the tables with some rows, and attach them."""
    with psycopg.connect(conninfo, autocommit=True) as db:
        for table in tables:
            table.create(db)
            upsert(db, table, range(rows), seed=1)


def upsert(db: psycopg.Connection, table: Table, numbers: Iterable[int], seed: int) -> None:
    """Write the rows of these numbers; each seed gives a row another vector and another dataset."""
    some = list(numbers)
    vectors = make_vectors(seed, len(some)).tolist()
    rows = [
        (n, TOPICS[(n + seed) % 5], table.literal(vector))
        for n, vector in zip(some, vectors, strict=True)
    ]
    conflict = (
        f"ON CONFLICT ({table.key_columns}) DO UPDATE SET v = excluded.v, topic = excluded.topic"
    )
    table.insert(db, rows, conflict)


def change(conninfo: str, seed: int, tables: Sequence[Table] = TABLES) -> str:
    """One transaction that inserts, updates, moves and deletes rows of each table.

    Returns its token.
    """
    chosen = np.random.default_rng(seed).permutation(90)
    with psycopg.connect(conninfo) as db:
        for table in tables:
            upsert(db, table, chosen[:20].tolist(), seed)
            db.execute(
                f"DELETE FROM {table.name} WHERE n = ANY (%s)".encode(), [chosen[20:25].tolist()]
            )
        return fetch(db, "SELECT syncd.token()")


def change_one(conninfo: str, seed: int, tables: Sequence[Table] = TABLES) -> str:
    """One transaction that updates one row of each table; returns its token."""
    with psycopg.connect(conninfo) as db:
        for table in tables:
            upsert(
                db, table, [int(fetch(db, f"SELECT n FROM {table.name} ORDER BY n LIMIT 1"))], seed
            )
        return fetch(db, "SELECT syncd.token()")


def takes_requests(daemon: Daemon) -> bool:
    """Whether the service takes requests; its socket is there a moment earlier."""
    try:
        with daemon.client() as client:
            client.ping()
    except ServiceUnavailable:
        return False
    return True


def keys_of(client: Client, dataset: str) -> list[Key] | None:
    """The keys of a dataset, sorted; None while it does not answer. For use in ``until``.

    While a source is being read, a request is refused with ``NotReady``. A name that no source has
    brought yet is unknown.
    """
    try:
        return sorted(client.keys(dataset))
    except (NotReady, UnknownDataset):
        return None


def is_unknown(client: Client, name: str) -> bool:
    """Whether no dataset has this name. While a source is being read, it may still appear."""
    try:
        client.search(name, [1.0, 1.0, 1.0])
    except UnknownDataset:
        return True
    except RequestError:
        return False
    return False


def applied(daemon: Daemon, token: str) -> None:
    """Return once syncd has applied a transaction."""
    with daemon.client() as client:
        client.wait(token, timeout_ms=int(SETTLE_SECONDS * 1000))


def assert_in_step(conninfo: str, daemon: Daemon, tables: Sequence[Table] = TABLES) -> None:
    """Wait until every index equals its table: the same keys, vectors and nearest rows.

    No other session may write meanwhile.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    pause = threading.Event()
    try:
        while True:
            try:
                with daemon.client() as client, psycopg.connect(conninfo, autocommit=True) as db:
                    token = fetch(db, "SELECT syncd.token()")
                    client.wait(token, timeout_ms=5000)
                    seen = {each.dataset for each in client.datasets()}
                    for table in tables:
                        Comparison(db, client, table, table.read(db), token, seed=7).run(seen)
                    return
            except (NotReady, TimedOut, ServiceUnavailable):
                assert daemon.process is not None
                assert daemon.process.poll() is None, "syncd has ended"
                assert time.monotonic() < deadline, (
                    f"syncd does not catch up within {SETTLE_SECONDS:.0f} s"
                )
                pause.wait(0.05)
    except AssertionError as error:
        error.add_note(
            "the end of syncd's log:\n"
            + "".join(daemon.log.read_text().splitlines(keepends=True)[-40:])
        )
        raise


def logged(daemon: Daemon, event: str) -> int:
    """How often syncd has logged an event."""
    return sum(event in line for line in daemon.log.read_text().splitlines())
