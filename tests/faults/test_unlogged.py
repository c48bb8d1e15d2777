"""A source that becomes UNLOGGED after attach: a crash empties it, and the index follows."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from tests.conftest import TEMPLATE
from tests.daemon import Daemon
from tests.faults.altered import eventually, read_index, serving
from tests.servers import PostgresServer


@pytest.mark.parametrize("part", ["items", "items_1"])
@pytest.mark.parametrize("running", [True, False])
def test_a_table_that_a_crash_has_emptied_has_an_empty_index_soon_after_the_reconnect(
    own_server: PostgresServer, tmp_path: Path, part: str, running: bool
) -> None:
    conninfo = own_server.create_database("unlogged", TEMPLATE)
    split = " PARTITION BY RANGE (id)" if part != "items" else ""
    with psycopg.connect(conninfo, autocommit=True) as db:
        db.execute(f"CREATE TABLE items (id int PRIMARY KEY, v real[]){split}".encode())
        if split:
            db.execute("CREATE TABLE items_1 PARTITION OF items FOR VALUES FROM (0) TO (100)")
            db.execute("CREATE TABLE items_2 PARTITION OF items FOR VALUES FROM (100) TO (200)")
        db.execute("INSERT INTO items SELECT i, ARRAY[i, 1] FROM generate_series(1, 99) AS i")
        db.execute("SELECT syncd.attach('items', metric => 'l2')")
        if split:
            db.execute("INSERT INTO items VALUES (150, '{1,2}')")
        db.execute(f"ALTER TABLE {part} SET UNLOGGED; CHECKPOINT".encode())
    daemon = Daemon(conninfo, tmp_path / "data")
    left = {150} if split else set()
    try:
        with psycopg.connect(conninfo, autocommit=True) as db, serving(db, daemon) as followed:
            assert len(read_index(followed.client, "items")) == 99 + len(left)
            followed.client.checkpoint()
            if not running:
                daemon.stop()
            own_server.crash()
            own_server.start()
            if not running:
                daemon.start()

            def emptied() -> None:
                assert set(read_index(followed.client, "items")) == left
                assert followed.state() == "ready"

            eventually(emptied)
            followed.logged("it is unlogged, and the server may have crashed")
    finally:
        if daemon.process is not None:
            daemon.kill()
