"""A Hypothesis machine that writes, breaks and compares.

It writes to four tables at once, and kills syncd and PostgreSQL. ``settle`` compares every index
with its table, at a position that includes all previous commits.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from syncd.errors import RequestError
from tests.conftest import TEMPLATE
from tests.daemon import Daemon
from tests.oracle.comparison import SETTLE_MS, Comparison
from tests.oracle.tables import BY_NAME, TABLES
from tests.oracle.writes import (
    LONG_SESSIONS,
    REFUSED,
    Writes,
    fetch,
    numbers,
    run,
    seeds,
    tables,
    topics,
)
from tests.servers import PostgresServer

ALWAYS_THERE = "docs/a"
"""A dataset that always keeps some rows."""

databases = itertools.count(1)


class Oracle(Writes):
    """The machine. A subclass sets the attributes when the server is known."""

    server: PostgresServer
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        number = next(databases)
        self.name = f"oracle_{number}"
        self.conninfo = self.server.create_database(self.name, TEMPLATE)
        self.daemon = self.make_daemon(number)
        self.seen: set[str] = set()
        self.settled = 0
        for table in TABLES:
            table.create(self.db)
        self.counts["examples"] += 1

    def make_daemon(self, number: int) -> Daemon:
        """The syncd of an example, not yet started."""
        return prepared(Daemon(self.conninfo, self.folder / self.name), number)

    @property
    def is_up(self) -> bool:
        """Whether nothing has to be started before the next comparison."""
        return self.daemon.process is not None

    @precondition(lambda self: self.is_up)
    @rule(
        where=st.sampled_from(LONG_SESSIONS),
        name=tables,
        other=tables,
        some=numbers,
        topic=topics,
        seed=seeds,
    )
    def overtake(
        self, where: int, name: str, other: str, some: list[int], topic: str | None, seed: int
    ) -> None:
        """Apply a short transaction with higher outbox ids before a long one ends."""
        self.upsert(where, name, some, topic, seed)
        self.upsert(0, other, some, topic, seed + 1)
        with self.explained(), self.daemon.client() as client:
            client.wait(fetch(self.db, "SELECT syncd.token()"), timeout_ms=SETTLE_MS)
        self.counts["overtaken"] += 1

    # Rules that break something. Hypothesis starts with rules without arguments, as the simplest,
    # so these have one.

    @rule(how=st.sampled_from(("checkpoint", "cut", "kill", "stop")))
    def break_syncd(self, how: str) -> None:
        """Break the process or its connections. If syncd is down, start it instead."""
        if not self.is_up:
            self.start_syncd()
        elif how == "checkpoint":
            self.checkpoint()
        elif how == "cut":
            self.db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name LIKE 'syncd/%'"
            )
            self.counts["cuts"] += 1
        else:
            with self.explained():
                self.end_syncd(how)
            self.counts[f"{how}s"] += 1

    def end_syncd(self, how: str) -> None:
        """Kill or stop the process."""
        getattr(self.daemon, how)()
        self.seen.clear()

    @rule(lose=st.booleans(), name=tables, some=numbers, topic=topics, seed=seeds)
    def crash_postgres(
        self, lose: bool, name: str, some: list[int], topic: str | None, seed: int
    ) -> None:
        """Crash PostgreSQL while syncd runs on.

        With ``lose``, the crash loses an asynchronous commit that syncd has already applied.
        """
        table = BY_NAME[name]
        rows = self.rows(table, 0, some, topic, seed)
        if lose and self.is_up:
            try:
                with self.db.transaction():
                    self.db.execute("SET LOCAL synchronous_commit = off")
                    run(self.db, f"DELETE FROM {name} WHERE n = ANY (%s)", [some])
                    table.insert(self.db, rows)
                    token = fetch(self.db, "SELECT syncd.token()")
            except REFUSED:
                self.counts["refused"] += 1
            else:
                with self.explained(), self.daemon.client() as client:
                    client.wait(token, timeout_ms=SETTLE_MS)
                self.crash()
                kept = int(fetch(self.db, "SELECT pg_snapshot_xmax(pg_current_snapshot())")) > int(
                    token.partition(".")[0]
                )
                self.counts["commits_kept" if kept else "commits_lost"] += 1
                return
        self.crash()

    def checkpoint(self) -> None:
        """Ask for a checkpoint as an operator does, with the connections in any state."""
        with self.explained(), self.daemon.client() as client:
            client.checkpoint()
        self.counts["checkpoints"] += 1

    def start_syncd(self) -> None:
        """Start syncd as its operator does."""
        with self.explained():
            self.daemon.start()
        self.counts["starts"] += 1

    def crash(self) -> None:
        """Crash and start PostgreSQL; open transactions are gone."""
        self.server.crash()
        self.close_connections()
        self.server.start()
        self.counts["crashes"] += 1

    # Comparison

    @rule()
    def settle(self) -> None:
        """Compare every index with its table."""
        with self.explained():
            if not self.is_up:
                self.start_syncd()
            with self.daemon.client() as client:
                token = fetch(self.db, "SELECT syncd.token()")
                begun = time.monotonic()
                client.wait(token, timeout_ms=SETTLE_MS)
                self.counts["longest_wait_ms"] = max(
                    self.counts["longest_wait_ms"], int((time.monotonic() - begun) * 1000)
                )
                read = {table: table.read(self.db) for table in TABLES}
                for table, expected in read.items():
                    Comparison(self.db, client, table, expected, token, self.settled).run(self.seen)
                bad = {table.name: expected.quarantined for table, expected in read.items()}
                found = client.status().quarantined
                assert found == sum(map(len, bad.values())), (
                    f"{found} in quarantine, expected: {bad}"
                )
                differing = [row for row in client.verify(deep=True).datasets if not row.in_sync]
                assert not differing, f"verify differs from the comparison: {differing}"
        self.settled += 1
        self.counts["comparisons"] += 1

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Add the end of syncd's log to an error."""
        try:
            yield
        except (AssertionError, RequestError) as error:
            for log in self.logs():
                lines = log.read_text().splitlines(keepends=True) if log.exists() else []
                error.add_note(f"{self.name}: the end of {log.name}:\n" + "".join(lines[-30:]))
            raise

    def logs(self) -> Sequence[Path]:
        """Logs to show with an error."""
        return [self.daemon.log]

    def teardown(self) -> None:
        """Compare, and leave nothing behind. If a step failed, nothing is compared."""
        try:
            if sys.exception() is None:
                for where in sorted(self.sessions):
                    self.sessions[where].commit()
                self.finish()
        finally:
            self.close_connections()
            self.clean_up()
            self.server.drop_database(self.name)

    def finish(self) -> None:
        """Compare, break syncd in one of four ways and compare again."""
        self.settle()
        self.break_syncd(how=("stop", "kill", "cut", "checkpoint")[self.counts["examples"] % 4])
        self.settle()

    def clean_up(self) -> None:
        """Leave no process behind."""
        if self.daemon.process is not None:
            self.daemon.kill()


def prepared(daemon: Daemon, number: int) -> Daemon:
    """A syncd that frees slots all the time; in some examples it has a reader."""
    daemon.settings.setdefault("readers", int(number % 4 == 0))
    daemon.with_constant("syncd.sync.background.turns.FIRST_PAUSE_SECONDS", 0.05)
    return daemon.with_small_slots().with_constant(
        "syncd.sync.background.rotation.ROTATION_SECONDS", 0.3
    )
