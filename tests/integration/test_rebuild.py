"""A rebuild makes an index again alongside the answering one, or says why it cannot."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from syncd.client.client import Client
from syncd.errors import SyncdError
from tests.conftest import clone
from tests.daemon import Daemon
from tests.faults.following import until
from tests.integration.verifying import assert_equal, counts, of
from tests.servers import PostgresServer


def test_a_rebuild_while_the_database_is_gone_says_so(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    for conninfo in clone(own_server):
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute(
                "CREATE TABLE items (id int PRIMARY KEY, v real[]);"
                "INSERT INTO items VALUES (1, '{1,2}')"
            )
            db.execute("SELECT syncd.attach('items')")
        daemon = Daemon(conninfo, tmp_path / "data", verify_seconds=0).start()
        own_server.stop("immediate")
        with daemon.client() as client:
            with pytest.raises(SyncdError, match="cannot be reached"):
                client.rebuild("items")
            own_server.start()
            until(lambda: client.status().database_error is None, "the database is back")
            assert client.rebuild("items").rows == 1
        daemon.stop()


def test_a_rebuild_never_leaves_a_moment_without_an_answer(
    db: psycopg.Connection, followed: Daemon, database: str
) -> None:
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 1, 1, 2, 3, 4, 5, 6]::real[]::vector "
        "FROM generate_series(2000, 30000) i"
    )
    stop = threading.Event()

    def ask() -> set[int]:
        answers, key = set(), 100_000
        with (
            Client(followed.socket) as client,
            psycopg.connect(database, autocommit=True) as connection,
        ):
            while not stop.is_set():
                key += 1
                connection.execute("INSERT INTO items VALUES (%s, '[1,2,3,4,5,6,7,8]')", [key])
                answers.add(
                    len(client.search("items", [1, 2, 3, 4, 5, 6, 7, 8], k=5, consistency="strong"))
                )
                assert client.get("items", [key])
                # Behind the page that is being read:
                connection.execute("DELETE FROM items WHERE id = %s", [key - 100_000])
        return answers

    with followed.client() as client, ThreadPoolExecutor(1) as pool:
        client.wait(str((db.execute("SELECT syncd.token()").fetchone() or [0])[0]))
        asking = pool.submit(ask)
        try:
            for _ in range(3):
                done = client.rebuild("items")
                assert done.rows >= 29_001
        finally:
            stop.set()
        assert asking.result() == {5}
        assert {row.state for row in client.datasets() if row.dataset == "default/items"} == {
            "ready"
        }
        assert counts(of(client.verify("items", deep=True))) == (True, 0, 0, 0)
        client.rebuild("items")
        assert (
            next(row for row in client.datasets() if row.dataset == "default/items").tombstones == 0
        )
    followed.stop()
    followed.start()
    assert_equal(db, followed)
