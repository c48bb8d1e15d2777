"""The picture of the status page in the docs: ``python -m tests.picture`` makes it.

It shows a service that follows and searches, and takes two minutes. The page's clock runs sixty
times as fast, so that the charts show an hour. Counts, rates and latencies are measured.
"""

from __future__ import annotations

import base64
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import sin
from pathlib import Path
from threading import Event, Thread
from types import SimpleNamespace
from typing import LiteralString
from unittest.mock import patch

import numpy as np
import psycopg
from numpy.typing import NDArray
from PIL import Image

from syncd.client.client import Client
from syncd.postgres import schema
from tests.browser import browser
from tests.daemon import CHECKOUT, Daemon
from tests.scrape import url_of
from tests.servers import PostgresServer

PICTURE = CHECKOUT / "syncd" / "docs" / "status-page.png"
WIDTH, HEIGHT = 1200, 900
PAUSES = ((0.35, 1.0), (0.3, 0.4), (0.4, 0.0))
TENANTS = ("initech", "acme")
HOUR_SECONDS = 60.0
FASTER = 3600 / HOUR_SECONDS
COLOURS = 256
DIMENSIONS = 128
SETUP = """
CREATE TABLE papers (id int PRIMARY KEY, embedding vector(128), lang text DEFAULT 'en');
CREATE TABLE products
    (sku text PRIMARY KEY, embedding halfvec(64), discontinued boolean DEFAULT false);
CREATE TABLE notes (tenant text, id int, embedding real[], PRIMARY KEY (tenant, id));
SELECT syncd.attach('papers', columns => ARRAY['lang']);
SELECT syncd.attach('products', live => 'NOT discontinued', metric => 'ip');
SELECT syncd.attach('notes', project => $$'notes'$$, dataset => 'tenant', metric => 'l2');
"""
CHANGE = """
UPDATE papers SET embedding =
    (SELECT array_agg(x * 1.01) FROM unnest(embedding::real[]) AS x)::vector
WHERE id >= %s AND id < %s
"""
RETIRE = "UPDATE products SET discontinued = true WHERE sku = format('B-%%s', %s::int)"


class Quick(Daemon):
    """A service whose status page counts a minute as an hour."""

    @property
    def program(self) -> list[str]:
        """Arguments of Python."""
        path = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})"
        return ["-c", f"{path}; from tests import picture; picture.serve()"]


def serve() -> None:
    """``syncd serve`` with the page's clock."""
    from syncd.cli.main import main as command

    clock = SimpleNamespace(time=lambda: time.time() * FASTER, monotonic=time.monotonic)
    started = time.monotonic()
    begun = property(
        lambda _: time.monotonic() - (time.monotonic() - started) * FASTER, lambda _, __: None
    )
    with (
        patch("syncd.ops.history.SAMPLE_SECONDS", 10 / FASTER),
        patch("syncd.ops.history.time", clock),
        patch("syncd.sync.background.status.Status.begun", begun, create=True),
    ):
        command()


def fill(conninfo: str, numbers: np.random.Generator) -> None:
    """Fill three tables; one is large enough for codes."""
    schema.install(conninfo)
    with psycopg.connect(conninfo, autocommit=True) as db:
        db.execute("CREATE EXTENSION vector")
        db.execute(SETUP)

        def load(
            target: LiteralString, count: int, row: Callable[[int], tuple[object, ...]]
        ) -> None:
            with db.cursor().copy(f"COPY {target} FROM STDIN") as copy:
                for number in range(count):
                    copy.write_row(row(number))

        centres = numbers.standard_normal((200, DIMENSIONS))
        load("papers (id, embedding)", 40_000, lambda i: (i, str(near(centres[i % 200], numbers))))
        load(
            "products (sku, embedding)",
            4_000,
            lambda i: (f"B-{i}", str(near(centres[i % 9, :64], numbers))),
        )
        load("notes", 1_500, lambda i: (TENANTS[i % 3 == 0], i, near(centres[i % 9, :32], numbers)))


def near(centre: NDArray[np.float64], numbers: np.random.Generator) -> list[float]:
    """A vector near a centre."""
    return [round(float(value), 4) for value in centre + 0.6 * numbers.standard_normal(len(centre))]


def repeat(done: Event, step: Callable[[float], None]) -> Thread:
    """Start a thread that repeats ``step`` with the seconds since its start, until ``done``."""
    begun = time.monotonic()

    def run() -> None:
        while not done.wait(0.03):
            step(time.monotonic() - begun)

    thread = Thread(target=run)
    thread.start()
    return thread


@contextmanager
def work(daemon: Daemon, numbers: np.random.Generator) -> Iterator[None]:
    """Write and search for an hour of the page's clock, then run the block."""
    with psycopg.connect(daemon.conninfo, autocommit=True) as db, Client(daemon.socket) as client:

        def write(seconds: float) -> None:
            start = int(numbers.integers(0, 39_000))
            db.execute(
                CHANGE, [start, start + int(9 + 7 * sin(seconds / 9) + numbers.integers(0, 6))]
            )
            if numbers.random() < 0.05:
                db.execute(RETIRE, [int(numbers.integers(1, 4000))])

        def search(seconds: float) -> None:
            for _ in range(int(6 + 4 * sin(seconds / 14) + 2 * numbers.random())):
                client.search("papers", key=int(seconds * 500) % 40_000)

        done = Event()
        threads = [repeat(done, write), repeat(done, search)]
        try:
            for share, locked_seconds in PAUSES:
                done.wait(share * HOUR_SECONDS)
                with psycopg.connect(daemon.conninfo) as other:  # the charts show the lag of a lock
                    other.execute("LOCK TABLE papers IN ACCESS EXCLUSIVE MODE")
                    done.wait(locked_seconds)
            with daemon.client() as another:
                another.checkpoint()
                another.verify()
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()


def take(daemon: Daemon, folder: Path) -> bytes:
    """A screenshot of the page in a browser."""
    with browser(folder) as page:
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=WIDTH,
            height=HEIGHT,
            deviceScaleFactor=1,
            mobile=False,
        )
        page.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "light"}],
        )  # regardless of the machine's preference
        page.call("Emulation.setScrollbarsHidden", hidden=True)
        page.open(url_of(daemon, "/"))
        assert str(daemon.data_dir.parent) not in page.html
        return base64.b64decode(page.call("Page.captureScreenshot")["data"])


def main() -> None:
    """Make the picture again."""
    numbers = np.random.default_rng(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(PostgresServer(18, folder))
        conninfo = server.create_database("library")
        fill(conninfo, numbers)
        daemon = Quick(conninfo, folder / "data", http="127.0.0.1:0").start()
        stack.callback(daemon.stop)
        with work(daemon, numbers):
            taken = Image.open(io.BytesIO(take(daemon, folder / "browser"))).convert("RGB")
    taken.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
