"""The soak: writers write while syncd, its server and its files are killed and damaged at random.

    python -m tests.faults.soak --minutes 30 --seed 1

``verify --deep`` judges. The seed decides the faults; their moments depend on the machine. If an
index differs, the soak prints the log and ends with exit status 1.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import psycopg

from syncd.client.client import Client
from syncd.errors import SyncdError
from syncd.postgres import schema
from syncd.protocol.messages import VerifyResult
from tests.daemon import Daemon
from tests.faults.soak_command import main
from tests.servers import PostgresServer

Answer = TypeVar("Answer")

DIMENSION = 16
KEYS = 3000
WRITERS = 4
READERS = 2
FROZEN_SECONDS = 5.0
SETTLE_SECONDS = 120.0
TOPICS = ["a", "b", "c", None]
LOST = (psycopg.OperationalError, psycopg.errors.DeadlockDetected)
"""Errors of a writer whose server has gone away."""

TABLES = """
CREATE TABLE items (id integer PRIMARY KEY, topic text, gone boolean NOT NULL DEFAULT false,
                    lang text DEFAULT 'en', v vector);
CREATE TABLE notes (slug text, part integer, topic text, gone boolean NOT NULL DEFAULT false,
                    v real[], PRIMARY KEY (slug, part));
SELECT syncd.attach('items', dataset => 'topic', live => 'NOT gone', metric => 'l2',
                    columns => ARRAY['lang']);
SELECT syncd.attach('notes', live => 'NOT gone', metric => 'cosine');
"""


class Soak:
    """One server, one syncd, several writers, and the faults."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.server = PostgresServer(18, folder, settings={"autovacuum": "on"}).start()
        self.conninfo = self.server.create_database("soak")
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
            schema.install(self.conninfo)
            connection.execute(TABLES.encode())
        self.daemon = Daemon(
            self.conninfo, folder / "data", verify_seconds=0, checkpoint_seconds=3, readers=READERS
        )
        self.stopping = threading.Event()
        self.running = threading.Event()
        self.running.set()
        self.busy = [threading.Lock() for _ in range(WRITERS)]
        """Each is held while its writer may have a transaction open."""

    def run(self, seconds: float) -> None:
        """Break and settle in turn until the time is up; ``AssertionError`` if an index differs."""
        end = time.monotonic() + seconds
        self.daemon.start()
        with ThreadPoolExecutor(WRITERS) as pool:
            writers = [pool.submit(self.write, number) for number in range(WRITERS)]
            try:
                while time.monotonic() < end:
                    self.break_something()
                    if self.random.random() < 0.4:
                        self.settle()
                    for writer in writers:
                        raise_failure(writer)
                self.settle(still=True)
            finally:
                self.stopping.set()
                self.running.set()
        self.daemon.stop()
        self.daemon.start()
        self.settle(still=True)
        self.daemon.stop()

    def close(self) -> None:
        """End every process and remove the server."""
        self.stopping.set()
        self.running.set()
        if self.daemon.process is not None:
            self.daemon.kill()
        self.server.remove()

    # Writers

    def write(self, number: int) -> None:
        """One writer; it runs until the end, and connects again after every crash."""
        generator = random.Random(self.seed * 1000 + number)
        vectors = np.random.default_rng(self.seed * 1000 + number)
        while not self.stopping.is_set():
            self.running.wait()
            try:
                with (
                    self.busy[number],
                    psycopg.connect(self.conninfo, options="-c lock_timeout=2s") as connection,
                ):
                    if generator.random() < 0.3:
                        connection.execute("SET synchronous_commit = off")
                    while self.running.is_set() and not self.stopping.is_set():
                        self.one_transaction(connection, generator, vectors)
            except LOST:
                self.stopping.wait(0.1)

    def one_transaction(
        self, connection: psycopg.Connection, generator: random.Random, vectors: np.random.Generator
    ) -> None:
        """A few statements. One transaction in five is rolled back, and so are some savepoints."""
        try:
            for _ in range(generator.choice([1, 1, 1, 2, 5])):
                if generator.random() < 0.1:
                    with connection.transaction(force_rollback=generator.random() < 0.5):
                        self.one_statement(connection, generator, vectors)
                else:
                    self.one_statement(connection, generator, vectors)
            if generator.random() < 0.1:
                self.stopping.wait(generator.random() * 0.5)  # stay open over some passes
        except (psycopg.errors.UniqueViolation, psycopg.errors.LockNotAvailable):
            connection.rollback()
            return
        if generator.random() < 0.2:
            connection.rollback()
        else:
            connection.commit()
        self.counts["transactions"] += 1

    def one_statement(
        self, connection: psycopg.Connection, generator: random.Random, vectors: np.random.Generator
    ) -> None:
        """A statement that an application may run on its rows."""
        key, topic = generator.randrange(KEYS), generator.choice(TOPICS)
        vector = vectors.integers(
            -9, 10, size=DIMENSION if generator.random() < 0.99 else 3
        ).tolist()
        slug, part = f"é'{key % 300}", key % 7
        roll = generator.random()
        if roll < 0.35:
            connection.execute(
                "INSERT INTO items (id, topic, v) VALUES (%s, %s, %s::real[]::vector) "
                "ON CONFLICT (id) DO UPDATE "
                "SET v = excluded.v, topic = excluded.topic, gone = false",
                [key, topic, vector],
            )
        elif roll < 0.6:
            connection.execute(
                "INSERT INTO notes (slug, part, v) VALUES (%s, %s, %s) "
                "ON CONFLICT (slug, part) DO UPDATE SET v = excluded.v, gone = false",
                [slug, part, vector],
            )
        elif roll < 0.7:
            connection.execute(
                "DELETE FROM items WHERE id BETWEEN %s AND %s", [key, key + generator.randrange(5)]
            )
        elif roll < 0.76:
            connection.execute("DELETE FROM notes WHERE slug = %s", [slug])
        elif roll < 0.84:
            connection.execute("UPDATE items SET gone = NOT gone WHERE id = %s", [key])
        elif roll < 0.88:
            connection.execute(
                "UPDATE items SET topic = %s WHERE id BETWEEN %s AND %s", [topic, key, key + 20]
            )
        elif roll < 0.92:
            connection.execute(
                "UPDATE notes SET part = part + 7 WHERE slug = %s AND part < 7", [slug]
            )
        elif roll < 0.95:
            connection.execute(
                "UPDATE items SET lang = %s WHERE id = %s", [generator.choice(["de", "en"]), key]
            )
        elif roll < 0.995:
            connection.execute(
                "INSERT INTO items (id, topic, v) SELECT i, 'a', "
                "(SELECT array_agg((i + j)::real) FROM generate_series(1, %s::integer) j)::vector "
                "FROM generate_series(%s::integer, %s::integer) i "
                "ON CONFLICT (id) DO UPDATE SET v = excluded.v",
                [DIMENSION, key, key + 200],
            )
        elif roll < 0.998:
            connection.execute("TRUNCATE notes")
        else:
            connection.execute("TRUNCATE items")
        self.counts["statements"] += 1

    # Faults

    def break_something(self) -> None:
        """Let the writers write for a while, then break one thing."""
        time.sleep(self.random.uniform(0.5, 3.0))
        faults: list[Callable[[], None]] = [
            self.kill_syncd,
            self.kill_reader,
            self.freeze_reader,
            self.freeze_syncd,
            self.stop_syncd,
            self.crash_postgres,
            self.cut_connections,
            self.kill_backend,
            self.damage_checkpoint,
            self.forget_checkpoint,
            self.drift,
            self.ask_for_checkpoint,
        ]
        fault = self.random.choice(faults)
        fault()
        self.counts[fault.__name__] += 1

    def kill_syncd(self) -> None:
        self.daemon.kill()
        self.daemon.start()

    def kill_reader(self) -> None:
        for reader in self.readers():
            if self.random.random() < 0.7:
                with suppress(ProcessLookupError):
                    os.kill(reader, signal.SIGKILL)

    def freeze_reader(self) -> None:
        """It is ended after some seconds."""
        for reader in self.readers()[:1]:
            with suppress(ProcessLookupError):
                os.kill(reader, signal.SIGSTOP)

    def freeze_syncd(self) -> None:
        """The main process does not run for some seconds; its readers do."""
        assert self.daemon.process is not None
        self.daemon.process.send_signal(signal.SIGSTOP)
        time.sleep(self.random.uniform(0, FROZEN_SECONDS))
        self.daemon.process.send_signal(signal.SIGCONT)

    def readers(self) -> list[int]:
        with suppress(SyncdError), self.daemon.client() as client:
            return [reader.pid for reader in client.status().readers]
        return []

    def stop_syncd(self) -> None:
        self.daemon.stop()
        time.sleep(self.random.uniform(0, 1))
        self.daemon.start()

    def crash_postgres(self) -> None:
        self.server.crash()
        time.sleep(self.random.uniform(0, 1))
        self.server.start()

    def cut_connections(self) -> None:
        self.server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name LIKE 'syncd/%'"
        )

    def kill_backend(self) -> None:
        """The postmaster restarts every process then."""
        (pid,) = self.random.choice(
            self.server.execute(
                "SELECT pid FROM pg_stat_activity WHERE datname = 'soak' ORDER BY pid"
            )
        )
        self.server.execute(f"SELECT pg_terminate_backend({pid})")

    def damage_checkpoint(self) -> None:
        """While syncd is down, flip a byte of a file or cut the file short."""
        self.daemon.kill()
        files = sorted(
            path
            for path in self.daemon.data_dir.rglob("*")
            if path.is_file() and path.stat().st_size
        )
        if files:
            path = self.random.choice(files)
            content = bytearray(path.read_bytes())
            place = self.random.randrange(len(content))
            if self.random.random() < 0.5:
                content[place] ^= 0xFF
            else:
                del content[place:]
            path.write_bytes(content)
        self.daemon.start()

    def forget_checkpoint(self) -> None:
        """Lose the manifest."""
        self.daemon.kill()
        (self.daemon.data_dir / "manifest.json").unlink(missing_ok=True)
        self.daemon.start()

    def drift(self) -> None:
        """Change rows without an outbox row, and let verify find and repair them."""
        key = self.random.randrange(KEYS)
        with psycopg.connect(self.conninfo) as connection:
            connection.execute(
                "UPDATE items SET gone = NOT gone WHERE id BETWEEN %s AND %s", [key, key + 10]
            )
            connection.execute("DELETE FROM syncd.outbox WHERE xid = pg_current_xact_id()")
        self.counts["repaired_keys"] += sum(
            row.repaired for row in self.verify(repair=True).datasets
        )

    def ask_for_checkpoint(self) -> None:
        self.insist(Client.checkpoint)

    # Judgement

    def settle(self, *, still: bool | None = None) -> None:
        """Every index equals its table at one snapshot; ``still``: while no writer writes."""
        if still is None:
            still = self.random.random() < 0.5
        if still:
            self.running.clear()
            for writer in self.busy:
                with writer:
                    pass  # its last transaction is over
        result = self.verify()
        wrong = [row for row in result.datasets if not row.in_sync]
        failed = [source for source in result.sources if source.outcome in ("failed", "none_live")]
        assert not wrong, (wrong, result.sources)
        assert not failed, failed
        self.counts["verified_rows"] += sum(row.rows for row in result.datasets)
        self.counts["settles"] += 1
        if still:
            for _ in range(2 * READERS):
                self.insist(self.compare_answers)
        self.running.set()

    def compare_answers(self, client: Client) -> None:
        """Answers of the process that a connection meets, while no writer writes."""
        for dataset in client.datasets():
            name = dataset.dataset
            keys = list(client.keys(name))
            assert len(set(keys)) == len(keys) == dataset.count, (name, len(keys), dataset)
            some = self.random.sample(keys, min(len(keys), 5))
            for row in client.get(name, some, vectors=True):
                assert row.vector is not None
                (near,) = client.search(name, row.vector, k=1, exact=True)
                assert abs(near.distance) < 1e-3, (name, row.key, near)
            self.counts["compared_keys"] += len(keys)

    def verify(self, *, repair: bool = False) -> VerifyResult:
        """A deep verify."""
        return self.insist(lambda client: client.verify(deep=True, repair=repair))

    def insist(self, request: Callable[[Client], Answer]) -> Answer:
        """Send a request again until it succeeds: the server or the service may be starting."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                with self.daemon.client() as client:
                    return request(client)
            except SyncdError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def raise_failure(writer: Future[None]) -> None:
    """Raise the error that ended a writer."""
    if writer.done():
        writer.result()


if __name__ == "__main__":
    sys.exit(main(Soak, __doc__, minutes=30))
