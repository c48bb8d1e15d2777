"""Stores that a program opens before it forks, as in ``gunicorn --preload`` and Celery."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from functools import partial

import psycopg
import pytest

from syncd.apps.contents import Document
from syncd.apps.documents import Documents
from syncd.testing import Throwaway
from tests.faults.following import until
from tests.forks import Child

STRICT_PYTHON = (sys.executable, "-X", "dev", "-W", "error", "-W", "ignore::DeprecationWarning")
"""Python with its warnings as errors; from 3.12 on, a fork while threads run is deprecated."""
CHILDREN = 3
WRITES = 20
EXITS = """
import os, sys
from syncd.apps.contents import Document
from syncd.apps.documents import Documents
dsn, address, collection = sys.argv[1:]
documents = Documents(dsn, table="forked", collection=collection, address=address)
documents.write([Document("p", "parent")], [[1, 0]])
child = os.fork()
if child == 0:
    print([each.document.id for each in documents.search([1, 0], 5)], flush=True)
    documents.close()
    sys.exit()  # the interpreter's own end, with every finalizer
_, status = os.waitpid(child, 0)
print(status, [each.document.id for each in documents.search([1, 0], 5)])
documents.close()
"""


@pytest.fixture
def documents(running: Throwaway) -> Iterator[Documents]:
    with Documents(
        running.dsn, table="forked", collection=uuid.uuid4().hex, address=running.socket
    ) as opened:
        yield opened


def write_and_search(documents: Documents, name: str) -> list[str]:
    """Write and search: the ids that the search right after a write did not find."""
    missed = []
    for number in range(WRITES):
        written = f"{name} {number}"
        documents.write([Document(written, name)], [[1.0, float(number)]])
        if written not in {
            each.document.id for each in documents.search([1.0, float(number)], 1000)
        }:
            missed.append(written)
    return missed


def backend(documents: Documents) -> int:
    with documents._own.get().connection() as connection:
        return connection.info.backend_pid


def backends(running: Throwaway) -> set[int]:
    with psycopg.connect(running.dsn) as connection:
        rows = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
        )
        return {pid for (pid,) in rows}


def test_a_store_opened_before_a_fork_writes_and_finds_in_each_process(
    documents: Documents,
) -> None:
    documents.write([Document("before", "parent")], [[0.0, 1.0]])
    children = [
        Child(partial(write_and_search, documents, f"child {number}")) for number in range(CHILDREN)
    ]
    assert write_and_search(documents, "parent") == []
    assert [child.result() for child in children] == [[]] * CHILDREN
    found = {each.document.content for each in documents.search([0.0, 1.0], 1000)}
    assert found == {"parent", *(f"child {number}" for number in range(CHILDREN))}


@pytest.mark.parametrize("ends", ["closes it", "forgets it"])
def test_a_child_that_is_done_with_a_store_leaves_the_parents_connections_open(
    running: Throwaway, documents: Documents, ends: str
) -> None:
    stores = [documents]
    mine = backend(documents)

    def finish() -> int:
        own = backend(stores[0])
        if ends == "closes it":
            stores[0].close()
        stores.clear()
        gc.collect()
        return own

    child = Child(finish)
    assert child.result() != mine
    assert mine in backends(running)
    assert backend(documents) == mine


def test_a_fork_while_another_thread_writes_neither_blocks_the_child_nor_breaks_the_write(
    running: Throwaway, documents: Documents
) -> None:
    documents.write([Document("x", "before")], [[1.0, 0.0]])
    with psycopg.connect(running.dsn) as holder:
        holder.execute(
            "SELECT FROM forked WHERE id = 'x' AND collection = %s FOR UPDATE",
            [documents.collection],
        )
        thread = threading.Thread(
            target=documents.write, args=[[Document("x", "after")], [[1.0, 0.0]]]
        )
        thread.start()
        waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"
        with psycopg.connect(running.dsn, autocommit=True) as watcher:
            until(lambda: watcher.execute(waits).fetchone() == (True,), "the write waits")
        child = Child(lambda: write_and_search(documents, "child"))
        assert child.result() == []
        assert thread.is_alive()
    thread.join()
    assert [each.content for each in documents.read(["x"])] == ["after"]


def test_a_child_that_exits_as_programs_do_says_nothing_and_leaves_the_parents_store_working(
    running: Throwaway,
) -> None:
    done = subprocess.run(
        [*STRICT_PYTHON, "-c", EXITS, running.dsn, str(running.socket), uuid.uuid4().hex],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("['p']\n0 ['p']\n", "")
