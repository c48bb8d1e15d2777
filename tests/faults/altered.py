"""Table ``items`` under a service that follows it, for tests that alter the table.

Readers and writers run meanwhile, and in the end the index equals the table.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import psycopg

from syncd.client.client import Client
from syncd.errors import NotReady, RequestError
from tests.daemon import Daemon

NOTICED_WITHIN_SECONDS = 30.0
"""Half of the minute that is promised; a change is noticed in about a second."""
STRONG_READ_MS = 60_000
"""A strong read waits until a comparison is over; on a busy machine that takes many seconds."""

LIVE = "deleted_at IS NULL"
ROWS = 300
UPSERT = (
    "INSERT INTO items (id, v) VALUES (1000 + {n} % 200, ARRAY[{n}, 1, 1]::real[]::vector) "
    "ON CONFLICT (id) DO UPDATE SET v = excluded.v"
)

Vectors = dict[int, list[float]]


@dataclass
class Followed:
    """Table ``items``, with live and other rows, and a running service that follows it."""

    db: psycopg.Connection
    daemon: Daemon
    client: Client
    query: str = f"SELECT id, v::real[] FROM items WHERE {LIVE} AND v IS NOT NULL"

    def in_step(self, query: str = "", dataset: str = "items") -> None:
        """Wait until the index equals the table and the dataset is ready."""

        def check() -> None:
            expected = read_table(self.db, query or self.query)
            found = read_index(self.client, dataset)
            different = {
                key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)
            }
            assert not different, (
                f"{len(different)} of {len(expected)} rows differ, such as {sorted(different)[:5]}"
            )
            assert self.state(dataset) == "ready"

        try:
            eventually(check)
        except Exception as error:
            raise AssertionError(f"{error}\n{self.log[-3000:]}") from error

    def state(self, dataset: str = "items") -> str:
        """State of the dataset; ``unknown`` while the service does not list it."""
        states: dict[str, str] = {status.dataset: status.state for status in self.client.datasets()}
        return states.get(f"default/{dataset}", "unknown")

    def failed(self, reason: str, dataset: str = "items") -> str:
        """Wait until the dataset fails for this reason; returns the whole message."""
        said = ""

        def check() -> None:
            nonlocal said
            assert self.state(dataset) == "failed"
            said = refusal(self.client, dataset)
            assert reason in said

        eventually(check)
        return said

    @property
    def log(self) -> str:
        """The service's log."""
        return self.daemon.log.read_text()

    def logged(self, what: str) -> None:
        """Wait until the log holds some words."""

        def check() -> None:
            assert what in self.log, self.log[-3000:]

        eventually(check)


def refusal(client: Client, dataset: str) -> str:
    """Message of the error that refuses a search; empty if the dataset answers."""
    try:
        client.search(dataset, [1, 0, 0])
    except NotReady as error:
        return str(error)
    return ""


def make_items(db: psycopg.Connection, vector: str = "vector(3)", attach: str = "") -> None:
    """Make the table, and attach it."""
    db.execute(
        f"CREATE TABLE items (id int PRIMARY KEY, v {vector}, note text, part text DEFAULT 'a', "
        "deleted_at date)".encode()
    )
    db.execute(
        f"INSERT INTO items SELECT i, ARRAY[i, i % 7, 1]::real[]::{vector}, 'n', 'a', "
        f"CASE WHEN i % 10 = 0 THEN now() END FROM generate_series(1, {ROWS}) AS i".encode()
    )
    db.execute(f"SELECT syncd.attach('items', live => '{LIVE}', metric => 'l2'{attach})".encode())


def other_source(db: psycopg.Connection) -> None:
    """Another attached table, which goes on whatever happens to the first."""
    db.execute("CREATE TABLE others (id int PRIMARY KEY, v vector(3), deleted_at date)")
    db.execute("INSERT INTO others VALUES (1, '[1,2,3]')")
    db.execute("SELECT syncd.attach('others', metric => 'l2')")


@contextmanager
def serving(db: psycopg.Connection, daemon: Daemon) -> Iterator[Followed]:
    """A running service that has caught up."""
    daemon.start()
    with daemon.client() as client:
        it = Followed(db, daemon, client)
        yield it


def read_table(db: psycopg.Connection, query: str) -> Vectors:
    """Key and vector of each row that a query returns."""
    return {
        int(key): [float(value) for value in vector]
        for key, vector in db.execute(query.encode()).fetchall()
    }


def read_index(client: Client, dataset: str) -> Vectors:
    """Key and vector of each row in a dataset."""
    keys = list(client.keys(dataset))
    found: Vectors = {}
    for start in range(0, len(keys), 500):
        for row in client.get(dataset, keys[start : start + 500], vectors=True):
            assert row.vector is not None
            found[int(str(row.key))] = [float(value) for value in row.vector]
    return found


def eventually(check: Callable[[], None], seconds: float = NOTICED_WITHIN_SECONDS) -> None:
    """Repeat a check until it passes; fails after ``seconds``."""
    pause, deadline = threading.Event(), time.monotonic() + seconds
    while True:
        try:
            return check()
        except (AssertionError, RequestError):
            if time.monotonic() > deadline:
                raise
        pause.wait(0.02)


@dataclass
class Readers:
    """Two threads that search all the time, one eventually and one strongly consistent.

    They note the dataset's states and the errors. ``with`` returns when both have got an answer.
    """

    daemon: Daemon
    dataset: str = "items"
    states: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    answers: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    begun: threading.Barrier = field(default_factory=lambda: threading.Barrier(3))

    def ask(self, consistency: Literal["eventual", "strong"]) -> None:
        with self.daemon.client() as client:
            waits = True
            while not self.stopped.is_set():
                try:
                    assert client.search(
                        self.dataset,
                        [1, 0, 0],
                        k=1,
                        consistency=consistency,
                        timeout_ms=STRONG_READ_MS,
                    ), "no row"
                    # The strong reader waits for comparisons, so it would see few states.
                    if consistency == "eventual":
                        self.states |= {
                            s.state
                            for s in client.datasets()
                            if s.dataset == f"default/{self.dataset}"
                        }
                    self.answers += 1
                except (RequestError, AssertionError) as error:
                    self.errors.append(repr(error))
                if waits:
                    waits = False
                    self.begun.wait(STRONG_READ_MS / 1000)

    def __enter__(self) -> Readers:
        self.threads = [
            threading.Thread(target=self.ask, args=[how]) for how in ("eventual", "strong")
        ]
        for thread in self.threads:
            thread.start()
        self.begun.wait(STRONG_READ_MS / 1000)
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(STRONG_READ_MS / 1000)


@contextmanager
def writers(conninfo: str, statement: str) -> Iterator[None]:
    """Two writers that run meanwhile; ``{n}`` in the statement is another number each time."""
    stopped = threading.Event()
    errors: list[str] = []

    def write(first: int) -> None:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            for number in itertools.count(first, 2):
                if stopped.is_set():
                    return
                try:
                    connection.execute(statement.replace("{n}", str(number)).encode())
                except psycopg.Error as error:
                    errors.append(str(error))

    threads = [threading.Thread(target=write, args=[first]) for first in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join(30)
    assert not errors, errors[0]
