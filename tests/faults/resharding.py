"""A reshard that is killed at each of its steps, and what clients see meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from syncd.cluster import operating
from syncd.settings import load_settings
from tests.daemon import CHECKOUT, Daemon
from tests.faults import points

FIRST_KEY = 1_000_000
BATCH = 5
"""Rows of one transaction of the load."""
TIMEOUT_MS = 60_000
LEAST_READS = 20


def kill_at_steps(of: str, folder: str, *names: str) -> None:
    """Reshard, killed at each of the steps, or at those that are named, then once more.

    It runs in a process of its own without threads, and forks for each step, so that the program is
    loaded once.
    """
    settings = load_settings()
    before = operating.read_layout(settings).of
    points.watch(folder, points.RESHARD_POINTS)
    for point in points.RESHARD_POINTS:
        if names and point.name not in names:
            continue
        points.arm(Path(folder), point)
        child = os.fork()
        if not child:
            operating.reshard(settings, int(of), print)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, f"not reached: {point}"
        now = operating.read_layout(settings).of
        assert now == (int(of) if point is points.RESHARD_POINTS[-1] else before), (point, now)
    assert operating.reshard(settings, int(of), print)


def reshard_killed(conninfo: str, of: int, folder: Path, *names: str) -> None:
    """Run ``kill_at_steps``; fails with its output."""
    folder.mkdir(exist_ok=True)
    command = "import sys; from tests.faults.resharding import *; kill_at_steps(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", command, str(of), str(folder), *names],
        env=Daemon(conninfo, folder).environment | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@dataclass
class Load:
    """Writers and readers of the table ``numbers (id bigint, v real[2])``, from ``FIRST_KEY``.

    ``wrong`` has the answers that differ from the table.
    """

    conninfo: str
    router: Daemon
    rate: float
    """Rows per second that a writer writes alongside."""
    seed: int = 0
    reads: int = 0
    rows: int = 0
    seconds: float = 0.0
    """How long the writer has written."""
    wrong: list[str] = field(default_factory=list)
    ending: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Load during the block. An error of a thread is raised at its end."""
        with ThreadPoolExecutor(2) as threads:
            working = [threads.submit(self.write), threads.submit(self.read_own_writes)]
            try:
                yield
            finally:
                self.ending.set()
            for each in working:
                each.result()

    def write(self) -> None:
        """Insert, change and delete rows that nobody reads, at the rate."""
        generator = random.Random(self.seed)
        first = 2 * FIRST_KEY
        begun = time.monotonic()
        with psycopg.connect(self.conninfo, autocommit=True) as db:
            while not self.ending.wait(max(begun + self.rows / self.rate - time.monotonic(), 0)):
                keys = [generator.randrange(first, first + 2000) for _ in range(BATCH)]
                if generator.random() < 0.2:
                    db.execute("DELETE FROM numbers WHERE id = ANY (%s)", [keys])
                else:
                    db.execute(
                        "INSERT INTO numbers SELECT DISTINCT k, ARRAY[%s, 7.5] FROM unnest(%s) k "
                        "ON CONFLICT (id) DO UPDATE SET v = excluded.v",
                        [-generator.randrange(10_000), keys],
                    )
                self.rows += BATCH
                self.seconds = time.monotonic() - begun

    def read_own_writes(self) -> None:
        """Write or delete a row, and search for it with the token of its transaction."""
        generator = random.Random(self.seed + 1)
        places: dict[int, int] = {}
        with psycopg.connect(self.conninfo, autocommit=True) as db, self.router.client() as client:
            while not self.ending.is_set() or self.reads < LEAST_READS:
                key = FIRST_KEY + generator.randrange(500)
                deletes = key in places and generator.random() < 0.3
                place = places.pop(key) if deletes else FIRST_KEY + 10 * self.reads
                with db.transaction():
                    db.execute("DELETE FROM numbers WHERE id = %s", [key])
                    if not deletes:
                        db.execute("INSERT INTO numbers VALUES (%s, ARRAY[%s, 9])", [key, place])
                        places[key] = place  # far from the vectors of all other rows
                    (token,) = db.execute("SELECT syncd.token()").fetchone() or ("",)
                hits = client.search("numbers", [place, 9], k=1, after=token, timeout_ms=TIMEOUT_MS)
                found = [hit.key for hit in hits]
                if (found == [key]) == deletes:
                    self.wrong.append(f"{'deleted' if deletes else 'wrote'} {key}: found {found}")
                self.reads += 1
