"""What every fault test ends with: the index equals the table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import psycopg

from syncd.errors import NotReady, ServiceUnavailable, TimedOut
from tests.daemon import Daemon
from tests.oracle.comparison import Comparison
from tests.oracle.tables import DOCS, ITEMS, TOPICS, Table
from tests.oracle.writes import fetch, make_vectors

TABLES = (ITEMS, DOCS)
"""A pgvector column under l2 and an array under cosine, with integer and with uuid keys; each makes several datasets."""

SETTLE_SECONDS = 45.0
"""How long an index may take to be right, restarts of the server and back-off among it."""


def until(condition: Callable[[], bool], what: str, seconds: float = SETTLE_SECONDS) -> None:
    """Ask again until it is so; fails after a while."""
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        pause.wait(0.02)


def attach_tables(conninfo: str, tables: Sequence[Table] = TABLES, rows: int = 60) -> None:
    """Make the tables with some rows, and attach them."""
    with psycopg.connect(conninfo, autocommit=True) as db:
        for table in tables:
            table.create(db)
            upsert(db, table, range(rows), seed=1)


def upsert(db: psycopg.Connection, table: Table, numbers: Iterable[int], seed: int) -> None:
    """Write rows; who has no vector of another seed's yet gets one, and belongs to another dataset."""
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
    """One transaction that inserts, updates, moves and deletes rows of each table; returns its token."""
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
    """Whether it takes requests; its socket is there a moment before."""
    try:
        with daemon.client() as client:
            client.ping()
    except ServiceUnavailable:
        return False
    return True


def applied(daemon: Daemon, token: str) -> None:
    """Return once syncd has applied a transaction."""
    with daemon.client() as client:
        client.wait(token, timeout_ms=int(SETTLE_SECONDS * 1000))


def assert_in_step(conninfo: str, daemon: Daemon, tables: Sequence[Table] = TABLES) -> None:
    """Every index comes to equal its table, by itself: the same keys, vectors and nearest rows; nobody else writes meanwhile."""
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
                    f"it does not catch up within {SETTLE_SECONDS:.0f} s"
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
