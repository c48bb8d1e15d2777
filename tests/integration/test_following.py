"""The main job: a search finds the committed rows of a table, also after restarts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psycopg
import pytest

from syncd.errors import UnknownDataset
from tests.daemon import Daemon


def test_rows_are_found_changed_and_gone_after_each_commit(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v vector(3))")
    db.execute("INSERT INTO items VALUES (1, '[1,0,0]'), (2, '[0,1,0]'), (3, '[0,0,1]')")
    assert db.execute("SELECT * FROM syncd.attach('items', metric => 'l2')").fetchone() == (3, 3, 1)
    daemon.start()
    with daemon.client() as client:
        assert client.search("items", [1, 0, 0], k=3)[0].key == 1
        db.execute("UPDATE items SET v = '[1,0,0.1]' WHERE id = 2")
        token = str((db.execute("SELECT syncd.token()").fetchone() or [None])[0])
        hits = client.search("items", [1, 0, 0], k=3, after=token)
        assert [hit.key for hit in hits][:2] == [1, 2]
        np.testing.assert_allclose([hit.distance for hit in hits][:2], [0, 0.1], atol=1e-6)
        db.execute("DELETE FROM items WHERE id = 1")
        assert [
            hit.key for hit in client.search("items", [1, 0, 0], k=3, consistency="strong")
        ] == [2, 3]
        db.execute("TRUNCATE items")
        assert client.search("items", [1, 0, 0], k=3, consistency="strong") == []
    daemon.stop()


def test_rows_committed_while_syncd_is_down_are_found_after_a_restart(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items SELECT i, ARRAY[i, i * i, 1] FROM generate_series(1, 1000) i")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    daemon.start()
    daemon.stop()
    assert (Path(daemon.data_dir) / "manifest.json").exists()
    db.execute("DELETE FROM items WHERE id % 2 = 0")
    db.execute("INSERT INTO items VALUES (5000, '{0,0,0}')")
    daemon.start()
    with daemon.client() as client:
        assert sorted(client.keys("items")) == [*range(1, 1000, 2), 5000]
    daemon.kill()
    db.execute("DELETE FROM items WHERE id = 5000")
    daemon.start()
    with daemon.client() as client:
        assert sorted(client.keys("items")) == [*range(1, 1000, 2)]
    assert "there is no checkpoint" in daemon.log.read_text()
    # At the first start two sources are read: embeddings and items.
    assert daemon.log.read_text().count("source_to_be_read") == 2


def test_the_first_row_of_a_new_dataset_is_found_by_a_reader_that_waits_for_it(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, part text, v real[])")
    db.execute("SELECT syncd.attach('items', dataset => 'part')")
    daemon.start()
    with daemon.client() as client:
        for number in range(20):
            (token,) = db.execute(
                "WITH row AS (INSERT INTO items VALUES (%s, %s, '{1,0}')) SELECT syncd.token()",
                [number, f"p{number}"],
            ).fetchone() or [""]
            wait = {"after": token} if number % 2 else {"consistency": "strong"}
            assert [hit.key for hit in client.search(f"p{number}", [1, 0], **wait)] == [number]
        with pytest.raises(UnknownDataset):
            client.search("nowhere", [1, 0], consistency="strong")


def test_a_search_waits_for_a_table_that_was_attached_a_moment_ago(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    daemon.start()
    with daemon.client() as client:
        for number in range(10):
            db.execute(f"CREATE TABLE t{number} (id int PRIMARY KEY, v real[])")
            db.execute(
                f"INSERT INTO t{number} SELECT i, ARRAY[i, 1] FROM generate_series(1, 1000) i"
            )
            db.execute(f"SELECT syncd.attach('t{number}', metric => 'l2')")
            assert client.search(f"t{number}", [7, 1], k=1, consistency="strong")[0].key == 7


def test_a_search_waits_for_a_table_that_takes_the_place_of_a_dropped_one(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    """The dataset belongs to the dropped table first, and to the new table in the answer."""
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    daemon.start()
    with daemon.client() as client:
        for number in range(20):
            (oid,) = db.execute("SELECT 'items'::regclass::oid::text").fetchone() or [""]
            with db.transaction():
                db.execute("DROP TABLE items; CREATE TABLE items (id int PRIMARY KEY, v real[])")
                db.execute("SELECT syncd.detach(%s)", [oid])
                db.execute("SELECT syncd.attach('items', metric => 'l2')")
                db.execute("INSERT INTO items VALUES (%s, '{1,0}')", [number])
            (token,) = db.execute("SELECT syncd.token()").fetchone() or [""]
            assert [hit.key for hit in client.search("items", [1, 0], after=token)] == [number]


def test_a_reader_that_waits_is_answered_under_load_before_the_next_beat(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    """Load never ends here, and the beat is longer than the test."""
    pace = "syncd.sync.consumer.pace"
    daemon.with_constant(f"{pace}.BEAT_SECONDS", (90.0, 90.0))
    daemon.with_constant(f"{pace}.LOADED_PASSES", 0).with_constant(f"{pace}.QUIET_PASSES", 1e9)
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    daemon.start()
    with daemon.client() as client:
        for number in range(12):
            db.execute("INSERT INTO items VALUES (%s, '{1,0}')", [number])
            hits = client.search("items", [1, 0], k=20, consistency="strong")
            assert len(hits) == number + 1
