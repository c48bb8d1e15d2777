"""The soak of many datasets: thousands come, are renamed and go, while readers ask.

    python -m tests.faults.soak_datasets --minutes 10 --seed 1

syncd and its server are killed meanwhile, and ``verify --deep`` judges. The seed decides the
faults; their moments depend on the machine. If a check fails, the soak prints the log and ends with
exit status 1. The checks: each index equals its table, each name stays known, and memory does not
grow with the names that have gone.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg

from syncd.client.client import Client
from syncd.errors import (
    DimensionMismatch,
    NotReady,
    RequestError,
    ServiceUnavailable,
    SyncdError,
    TimedOut,
    UnknownDataset,
)
from syncd.postgres import schema
from syncd.protocol.messages import VerifyResult
from tests.daemon import Daemon
from tests.faults.soak import LOST, raise_failure
from tests.faults.soak_command import main
from tests.scrape import get
from tests.servers import PostgresServer, quick_folder

WRITERS = 2
READERS = 2
MOST_CONVERSATIONS = 1500
"""Conversations of one writer that have rows at a time."""
CHANGE_SECONDS, CONVERSATION_SECONDS = 0.05, 0.01
"""A writer's rest per change and per conversation, so that a machine of two cores keeps step."""
START_SECONDS = 15.0
SETTLE_SECONDS = 120.0
KEPT_NAMES = 5000
BYTES_A_NAME = 2000
BASE_BYTES = 450e6
"""The program, its working set for the datasets that have rows, and the allocator's free memory."""

TABLES = """
CREATE TABLE chats (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, team text, chat text,
                    gone boolean NOT NULL DEFAULT false, v real[]);
CREATE TABLE notes (slug text PRIMARY KEY, chat text, v vector);
CREATE INDEX ON chats (chat);
CREATE INDEX ON notes (chat);
"""
ATTACH = (
    "SELECT syncd.attach('chats', project => 'team', dataset => 'chat', live => 'NOT gone', "
    "metric => 'l2')",
    "SELECT syncd.attach('notes', dataset => 'chat')",
)


class DatasetSoak:
    """One server, one syncd, writers, readers, and the faults."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.server = PostgresServer(18, folder, settings={"autovacuum": "on"}).start()
        self.conninfo = self.server.create_database("soak")
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute("CREATE EXTENSION vector")
            schema.install(self.conninfo)
            for statement in (TABLES, *ATTACH):
                connection.execute(statement.encode())
        self.folder = Path(tempfile.mkdtemp(prefix="syncd-soak-", dir=quick_folder()))
        """In memory if there is enough: a checkpoint of thousands of new datasets syncs ten
        thousand files.
        """
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]  # the same after each start
        self.daemon = Daemon(
            self.conninfo,
            self.folder / "data",
            verify_seconds=5,
            checkpoint_seconds=3,
            http=f"127.0.0.1:{port}",
        ).with_constant("syncd.sync.source.emptied.EMPTY_SECONDS", 1.0)
        self.names: deque[str] = deque(maxlen=KEPT_NAMES)
        """Some of the names so far, with and without rows."""
        self.kept: set[str] = set()
        """Names in a checkpoint: they answer from now on."""
        self.stopping, self.running = threading.Event(), threading.Event()
        self.running.set()

    def run(self, seconds: float) -> None:
        """Break and settle in turn until the time is up; ``AssertionError`` if a check fails."""
        end = time.monotonic() + seconds
        self.start()
        with ThreadPoolExecutor(WRITERS + READERS) as pool:
            workers = [pool.submit(self.write, number) for number in range(WRITERS)]
            workers += [pool.submit(self.read, number) for number in range(READERS)]
            try:
                while time.monotonic() < end:
                    self.break_something()
                    self.settle()
                    for worker in workers:
                        raise_failure(worker)
            finally:
                self.stopping.set()
                self.running.set()
        self.daemon.stop()
        self.start()
        self.settle()
        self.daemon.stop()

    def close(self) -> None:
        """End every process and remove the server."""
        self.stopping.set()
        self.running.set()
        if self.daemon.process is not None:
            self.daemon.kill()
        self.server.remove()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Writers

    def write(self, number: int) -> None:
        """One writer; it runs until the end, and connects again after every crash."""
        generator = random.Random(self.seed * 1000 + number)
        with_rows: deque[str] = deque()
        made = 0
        while not self.stopping.is_set():
            self.running.wait()
            try:
                with psycopg.connect(
                    self.conninfo, autocommit=True, options="-c lock_timeout=5s"
                ) as connection:
                    while self.running.is_set() and not self.stopping.is_set():
                        before, made = (
                            made,
                            self.one_change(connection, generator, f"w{number}", made, with_rows),
                        )
                        self.stopping.wait(CHANGE_SECONDS + (made - before) * CONVERSATION_SECONDS)
            except (*LOST, psycopg.errors.LockNotAvailable):
                self.stopping.wait(0.1)

    def one_change(
        self,
        connection: psycopg.Connection,
        generator: random.Random,
        writer: str,
        made: int,
        with_rows: deque[str],
    ) -> int:
        """A change of an application with one dataset per conversation.

        Returns how many conversations there have been.
        """
        roll = generator.random()
        if roll < 0.35 or len(with_rows) < 10:
            count = generator.choice([1, 1, 5, 50, 400])
            new = [f"{writer}-{made + i}" for i in range(count)]
            self.talk(connection, new, generator.randrange(1, 4))
            with_rows.extend(new)
            self.names.extend(new[:20])
            self.counts["conversations"] += count
            made += count
        elif roll < 0.55:
            self.talk(connection, [generator.choice(with_rows)], generator.randrange(1, 30))
        elif roll < 0.7:  # one or more conversations get another name
            count = generator.choice([1, 1, 10, 10, 300])
            self.stopping.wait(count * CONVERSATION_SECONDS)
            old = [with_rows.popleft() for _ in range(min(count, len(with_rows)))]
            with_rows.extend(f"{name}'" for name in old)
            self.names.extend(f"{name}'" for name in old[:20])
            connection.execute("UPDATE chats SET chat = chat || '''' WHERE chat = ANY (%s)", [old])
            connection.execute("UPDATE notes SET chat = chat || '''' WHERE chat = ANY (%s)", [old])
            self.counts["renamed"] += len(old)
        elif roll < 0.8:
            connection.execute(
                "UPDATE chats SET gone = NOT gone WHERE chat = %s", [generator.choice(with_rows)]
            )
        elif roll < 0.82:  # names without rows get rows again
            self.talk(connection, generator.choices(list(self.names), k=20), 1)
        elif roll < 0.84:
            names = generator.choices(with_rows, k=3)
            connection.execute(
                "UPDATE chats SET v = %s WHERE chat = ANY (%s)",
                [generator.choice([[1.0], None]), names],
            )
        elif roll < 0.845:
            connection.execute(generator.choice([b"TRUNCATE notes", b"DELETE FROM chats"]))
        else:
            self.forget(connection, with_rows, generator.choice([1, 5, 100]))
        if len(with_rows) > MOST_CONVERSATIONS:
            self.forget(connection, with_rows, len(with_rows) // 2)
        self.counts["changes"] += 1
        return made

    def talk(self, connection: psycopg.Connection, names: list[str], rows: int) -> None:
        """Write rows of these conversations into both tables."""
        connection.execute(
            "INSERT INTO chats (team, chat, v) "
            "SELECT 'team ' || length(n) %% 3, n, ARRAY[length(n), i, random()] "
            "FROM unnest(%s::text[]) AS n, generate_series(1, %s) AS i",
            [names, rows],
        )
        connection.execute(
            "INSERT INTO notes SELECT n || clock_timestamp(), n, '[1,2,3]' "
            "FROM unnest(%s::text[]) AS n ON CONFLICT DO NOTHING",
            [names[::3]],
        )

    def forget(self, connection: psycopg.Connection, with_rows: deque[str], count: int) -> None:
        """Delete the oldest conversations."""
        old = [with_rows.popleft() for _ in range(min(count, len(with_rows)))]
        connection.execute("DELETE FROM chats WHERE chat = ANY (%s)", [old])
        connection.execute("DELETE FROM notes WHERE chat = ANY (%s)", [old])
        self.counts["forgotten"] += len(old)

    # Readers

    def read(self, number: int) -> None:
        """One reader: it asks about conversations, with and without rows, until the end."""
        generator = random.Random(self.seed * 2000 + number)
        while not self.stopping.is_set():
            try:
                with self.daemon.client() as client:
                    while not self.stopping.is_set():
                        self.ask(client, generator)
            except (ServiceUnavailable, TimedOut, OSError, http.client.HTTPException):
                self.stopping.wait(0.1)  # the service is down

    def ask(self, client: Client, generator: random.Random) -> None:
        """One question; an unexpected error ends the soak."""
        name = generator.choice(list(self.names) or ["none"])
        name = generator.choice([name, f"team {len(name) % 3}/{name}"])
        questions = (
            lambda: client.search(name, [1.0, 2.0, 3.0], k=5),
            lambda: list(client.keys(name)),
            lambda: client.get(name, [1] if name.startswith("team") else ["a"]),
            lambda: client.why(name),
            client.status,
            client.datasets,
            lambda: get(self.daemon, generator.choice(["/metrics", "/", "/status", "/readyz"])),
        )
        try:
            generator.choices(questions, [40, 10, 10, 5, 5, 2, 2])[0]()
        except (UnknownDataset, NotReady):
            self.counts["not there"] += 1
        except RequestError as error:
            if error.kind not in ("dimension_mismatch", "overloaded"):
                raise
        self.counts["questions"] += 1

    # Faults

    def break_something(self) -> None:
        """One fault, chosen by the seed."""
        faults = [
            self.leave_alone,
            self.leave_alone,
            self.kill_syncd,
            self.stop_syncd,
            self.crash_postgres,
        ]
        faults += [self.cut_connections, self.save, self.attach_again]
        fault = self.random.choice(faults)
        fault()
        self.counts[fault.__name__] += 1

    def start(self) -> None:
        """Start syncd while writers write.

        They stand still if the machine is too busy for a first reading alongside them.
        """
        timer = threading.Timer(START_SECONDS, self.running.clear)
        timer.start()
        try:
            self.daemon.start()
        finally:
            timer.cancel()
            self.running.set()

    def leave_alone(self) -> None:
        """Let writers write for a while."""
        time.sleep(self.random.uniform(1, 5))

    def kill_syncd(self) -> None:
        """Kill syncd and start it again."""
        self.daemon.kill()
        self.start()

    def stop_syncd(self) -> None:
        """Stop syncd in order and start it again."""
        self.daemon.stop()
        time.sleep(self.random.uniform(0, 1))
        self.start()

    def crash_postgres(self) -> None:
        """Crash the server and start it again."""
        self.server.crash()
        time.sleep(self.random.uniform(0, 1))
        self.server.start()

    def cut_connections(self) -> None:
        """Cut all of syncd's connections at once."""
        self.server.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name LIKE 'syncd/%'"
        )

    def save(self) -> None:
        """Ask for a checkpoint."""
        with self.daemon.client() as client:
            client.checkpoint()

    def attach_again(self) -> None:
        """Attach with another metric: then only names that this attachment has seen are known."""
        metric = self.random.choice(["l2", "cosine"])
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute(
                "SELECT syncd.attach('chats', project => 'team', dataset => 'chat', "
                "live => 'NOT gone', metric => %s)",
                [metric],
            )
        self.kept = {name for name in self.kept if not name.startswith("team")}

    # Judgement

    def settle(self) -> None:
        """While writers stand still, every index equals its table and every kept name is known.

        Memory is bounded.
        """
        self.running.clear()
        try:
            result = self.verify()
            wrong = [row for row in result.datasets if not row.in_sync]
            assert not wrong, (wrong[:10], result.sources)
            failed = [
                source for source in result.sources if source.outcome in ("failed", "none_live")
            ]
            assert not [each for each in failed if each.outcome == "failed"], failed
            with self.daemon.client() as client:
                listed = {row.dataset for row in client.datasets()}
                missing = self.kept - listed
                assert not missing, (
                    f"{len(missing)} names are not known any more, such as {sorted(missing)[:5]}"
                )
                assert not client.status().failing_tasks, client.status().failing_tasks
                for name in self.random.sample(sorted(listed), min(20, len(listed))):
                    # A writer may have given all rows of a dataset another length.
                    with contextlib.suppress(DimensionMismatch):
                        # strong: the last write may have created the dataset a moment ago
                        client.search(name, [1.0, 2.0, 3.0], consistency="strong")
                if self.random.random() < 0.3:
                    client.checkpoint()
                    self.kept = listed
            self.counts["most names"] = max(self.counts["most names"], len(listed))
            self.check_memory(len(listed))
            self.counts["verified_rows"] += sum(row.rows for row in result.datasets)
            self.counts["settles"] += 1
        finally:
            self.running.set()

    def check_memory(self, names: int) -> None:
        """Memory grows with the datasets that have rows, and by little with the names of the
        others.
        """
        assert self.daemon.process is not None
        pages = int(Path(f"/proc/{self.daemon.process.pid}/statm").read_text().split()[1])
        held = pages * 4096
        self.counts["most MB"] = max(self.counts["most MB"], held // 1_000_000)
        assert held < BASE_BYTES + names * BYTES_A_NAME, f"{held / 1e6:.0f} MB for {names} names"

    def verify(self) -> VerifyResult:
        """A deep verify; it is tried again while the server or the service starts."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                with self.daemon.client() as client:
                    result = client.verify(deep=True)
                    if client.status().state == "ready":
                        return result
            except SyncdError:
                if time.monotonic() > deadline:
                    raise
            assert time.monotonic() < deadline, "the service does not become ready"
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main(DatasetSoak, __doc__, minutes=10))
