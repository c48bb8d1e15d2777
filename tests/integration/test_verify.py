"""verify finds exactly the differences between an index and its table; repair removes them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psycopg
import pytest

from syncd.errors import UnknownDataset
from tests.daemon import Daemon
from tests.faults.following import until
from tests.integration.verifying import assert_equal, counts, of, unseen

DIM = 8


def test_an_index_that_equals_its_table_is_in_sync(followed: Daemon) -> None:
    with followed.client() as client:
        for deep in (False, True):
            row = of(client.verify("items", deep=deep))
            assert counts(row) == (True, 0, 0, 0)
            assert (row.rows, row.indexed, row.sample) == (1000, 1000, [])


DIFFERENCES = [
    ("INSERT INTO items VALUES (5000, '[1,2,3,4,5,6,7,8]')", (1, 0, 0), 5000),
    ("DELETE FROM items WHERE id = 3", (0, 1, 0), 3),
    ("UPDATE items SET gone = true WHERE id = 4", (0, 1, 0), 4),
    ("UPDATE items SET v = NULL WHERE id = 5", (0, 1, 0), 5),
    ("UPDATE items SET v = '[9,9,9,9,9,9,9,1]' WHERE id = 6", (0, 0, 1), 6),
    ("UPDATE items SET v = v * v WHERE id = 1 OR false", (0, 0, 1), 1),
    ("UPDATE items SET lang = 'de' WHERE id = 7", (0, 0, 1), 7),
    ("UPDATE items SET id = 7000 WHERE id = 8", (1, 1, 0), 7000),
]
"""Changes, each with the missing, extra and stale rows that it makes, and the key of one."""


@pytest.mark.parametrize("deep", [False, True])
def test_every_kind_of_difference_is_found_and_repaired(
    db: psycopg.Connection, followed: Daemon, deep: bool
) -> None:
    with followed.client() as client:
        for change, differing, key in DIFFERENCES:
            unseen(db, change)
            found = of(client.verify("items", deep=deep))
            assert counts(found) == (False, *differing), change
            assert key in found.sample, change
            fixed = of(client.verify("items", repair=True, deep=deep))
            assert (*counts(fixed), fixed.repaired) == (True, *differing, sum(differing)), change
            assert counts(of(client.verify("items", deep=True))) == (True, 0, 0, 0), change
            assert_equal(db, followed)


def test_verify_has_no_false_alarm_while_writers_write(followed: Daemon, database: str) -> None:
    stop = threading.Event()

    def write(number: int) -> int:
        generator = np.random.default_rng(number)
        writes = 0
        with psycopg.connect(database, autocommit=True) as connection:
            while not stop.is_set():
                key, other = generator.integers(1, 2000, size=2).tolist()
                vector = str(generator.random(DIM).round(3).tolist())
                connection.execute(
                    "INSERT INTO items VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET v = "
                    "excluded.v",
                    [key, vector],
                )
                connection.execute("DELETE FROM items WHERE id = %s", [other])
                writes += 2
        return writes

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, number) for number in range(3)]
        try:
            with followed.client() as client:
                for round_ in range(15):
                    assert counts(of(client.verify("items", deep=round_ % 3 == 0))) == (
                        True,
                        0,
                        0,
                        0,
                    )
        finally:
            stop.set()
        assert sum(writer.result() for writer in writers) > 100


def test_quarantined_rows_are_accounted_for_until_they_change(
    db: psycopg.Connection, followed: Daemon
) -> None:
    db.execute("INSERT INTO items VALUES (2000, '[0,0,0,0,0,0,0,0]'), (2001, '[1,2]')")
    with followed.client() as client:
        found = of(client.verify("items"))
        assert (*counts(found), found.quarantined, found.rows) == (True, 0, 0, 0, 2, 1002)
        unseen(db, "UPDATE items SET v = '[1,2,3,4,5,6,7,8]' WHERE id = 2001")
        found = of(client.verify("items"))
        assert (*counts(found), found.quarantined) == (False, 1, 0, 0, 1)
        assert of(client.verify("items", repair=True)).in_sync
        assert client.get("items", [2001])


def test_quarantined_rows_stay_accounted_for_while_a_table_is_compared(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v vector)")
    db.execute("INSERT INTO items SELECT i, '[1,2]' FROM generate_series(1, 400) i")
    db.execute("INSERT INTO items SELECT i, '[0,0]' FROM generate_series(401, 500) i")
    db.execute("SELECT syncd.attach('items')")
    daemon.settings["verify_seconds"] = 0
    daemon.with_constant("syncd.sync.source.scan.PAGE_ROWS", (10, 10, 10))
    daemon.start()
    with daemon.client() as client:
        for _ in range(5):
            db.execute("VACUUM FULL items")  # the table is compared, page by page
            for _ in range(5):
                found = of(client.verify("items"))
                assert (*counts(found), found.quarantined) == (True, 0, 0, 0, 100)
                assert client.status().quarantined == 100
        unseen(db, "DELETE FROM items WHERE id > 450")
        db.execute("VACUUM FULL items")
        until(lambda: client.status().quarantined == 50, "half of the rows are in quarantine")


def test_rows_whose_dataset_another_source_has_are_reported(
    db: psycopg.Connection, followed: Daemon
) -> None:
    db.execute(
        "CREATE TABLE others (id int PRIMARY KEY, v real[]); INSERT INTO others VALUES (1, "
        "'{1,2}'), (2, '{1,2}')"
    )
    db.execute("SELECT syncd.attach('others', dataset => $$'items'$$)")
    with followed.client() as client:
        until(lambda: client.status().quarantined == 2, "both rows are in quarantine")
        said = {each.source: each for each in client.verify().sources}
    assert (
        said["public.others"].reason == "2 live rows are in quarantine, and in none of its datasets"
    )
    assert said["public.items"].reason == ""


def test_rows_of_a_dataset_that_never_formed_are_missing(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE notes (id uuid PRIMARY KEY, lang text, v real[])")
    db.execute("INSERT INTO notes VALUES (gen_random_uuid(), 'en', '{1,2}')")
    db.execute("SELECT syncd.attach('notes', dataset => 'lang')")
    daemon.settings["verify_seconds"] = 0
    daemon.start()
    unseen(
        db,
        "INSERT INTO notes VALUES (gen_random_uuid(), 'de', '{1,2}'), (gen_random_uuid(), 'de', "
        "'{2,2}')",
    )
    with daemon.client() as client:
        result = client.verify()
        assert counts(of(result, "default/de")) == (False, 2, 0, 0)
        assert counts(of(result, "default/en")) == (True, 0, 0, 0)
        client.verify(repair=True)
        assert counts(of(client.verify(), "default/de")) == (True, 0, 0, 0)
        with pytest.raises(UnknownDataset):
            client.verify("fr")


def test_a_row_that_moved_to_another_dataset_is_extra_in_the_old(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE notes (a int, b text, lang text, v real[], PRIMARY KEY (a, b))")
    db.execute(
        "INSERT INTO notes VALUES (1, 'x', 'en', '{1,2}'), (1, 'y', 'de', '{1,2}'), (2, 'x', 'en', "
        "'{1,2}')"
    )
    db.execute("SELECT syncd.attach('notes', dataset => 'lang')")
    daemon.settings["verify_seconds"] = 0
    daemon.start()
    unseen(db, "UPDATE notes SET lang = 'de' WHERE a = 1 AND b = 'x'")
    with daemon.client() as client:
        result = client.verify()
        assert counts(of(result, "default/en")) == (False, 0, 1, 0)
        assert counts(of(result, "default/de")) == (False, 1, 0, 0)
        assert of(result, "default/en").sample == [[1, "x"]]
        assert all(row.in_sync for row in client.verify(repair=True).datasets)
        assert [*client.keys("en")] == [(2, "x")]
