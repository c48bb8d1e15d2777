"""Many datasets that come, change and go, each by itself."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from syncd.errors import RequestError, SyncdError
from tests.daemon import Daemon
from tests.faults.following import (
    assert_in_step,
    attach_tables,
    change,
    keys_of,
    logged,
    takes_requests,
    until,
)
from tests.oracle.writes import fetch

PAGE_ROWS = "syncd.sync.source.scan.PAGE_ROWS"


def test_datasets_that_come_and_go_while_they_are_read_changed_and_saved(
    database: str, daemon: Daemon
) -> None:
    attach_tables(database)
    daemon.with_constant(PAGE_ROWS, (5, 5, 5)).start()
    stopped = threading.Event()

    def save() -> None:
        with daemon.client() as client:
            while not stopped.is_set():
                client.checkpoint()

    with ThreadPoolExecutor(1) as threads, psycopg.connect(database, autocommit=True) as db:
        saving = threads.submit(save)
        try:
            until_at, seed = time.monotonic() + 3, 2
            while time.monotonic() < until_at:
                change(database, seed=seed)
                db.execute(
                    "DELETE FROM items WHERE topic = 'b'; DELETE FROM docs WHERE topic = 'a'"
                )
                if seed % 5 == 0:
                    db.execute("TRUNCATE items")
                if seed % 7 == 0:  # read again as a whole, under another name as well
                    db.execute("SELECT syncd.detach('items')")
                    db.execute(
                        "SELECT syncd.attach('items', vector => 'v', project => $$'items'$$, "
                        "dataset => 'topic', live => 'deleted_at IS NULL', metric => 'l2')"
                    )
                seed += 1
        finally:
            stopped.set()
        saving.result()
    assert_in_step(database, daemon)
    daemon.kill()
    change(database, seed=3)
    daemon.start()
    assert_in_step(database, daemon)


@pytest.mark.parametrize(
    "count", [300, pytest.param(2000, marks=[pytest.mark.long, pytest.mark.timeout(300)])]
)
def test_many_small_datasets_are_made_changed_saved_and_loaded_in_little_time(
    db: psycopg.Connection, daemon: Daemon, count: int
) -> None:
    """A first checkpoint took 15 ms per dataset before files were saved in parallel.

    The limit is far above what an idle machine needs.
    """
    db.execute("CREATE TABLE items (id int PRIMARY KEY, topic text, v real[])")
    db.execute(
        "INSERT INTO items SELECT i, i %% %s, ARRAY[i, 1, 2] "
        "FROM generate_series(0, 5 * %s - 1) AS i",
        [count, count],
    )
    db.execute("SELECT syncd.attach('items', dataset => 'topic', metric => 'l2')")
    took: dict[str, float] = {}

    def timed(what: str, begun: float) -> None:
        took[what] = time.monotonic() - begun

    begun = time.monotonic()
    daemon.start()
    timed("first start", begun)
    with daemon.client() as client:
        begun = time.monotonic()
        client.checkpoint()
        timed("first checkpoint", begun)
        db.execute(
            "UPDATE items SET topic = (topic::int + 1) %% %s, v = ARRAY[id, 2, 2] "
            "WHERE id %% 3 = 0",
            [count],
        )
        begun = time.monotonic()
        client.wait(fetch(db, "SELECT syncd.token()"), timeout_ms=60_000)
        timed("changes", begun)
        begun = time.monotonic()
        client.checkpoint()
        timed("checkpoint", begun)
    daemon.kill()
    begun = time.monotonic()
    daemon.start()
    timed("start", begun)
    print({what: round(seconds, 2) for what, seconds in took.items()})
    rows: dict[str, set[int]] = {}
    for topic, key in db.execute("SELECT topic, id FROM items").fetchall():
        rows.setdefault(topic, set()).add(key)
    with daemon.client() as client:
        for topic, keys in rows.items():
            assert set(client.keys(topic)) == keys
        assert len(client.datasets()) == count
    assert max(took.values()) < 20 + 0.03 * count


def test_a_dataset_whose_directory_cannot_be_written_fails_checkpoints_and_no_dataset(
    database: str, daemon: Daemon
) -> None:
    attach_tables(database)
    daemon.start()
    with daemon.client() as client, psycopg.connect(database, autocommit=True) as db:
        client.checkpoint()
        obstacle = daemon.data_dir / "items" / "new"
        obstacle.write_text("another program's")
        db.execute("UPDATE items SET topic = 'new' WHERE n < 5")
        change(database, seed=2)
        assert_in_step(database, daemon)
        with pytest.raises(RequestError, match="items/new"):
            client.checkpoint()
        daemon.kill()
        change(database, seed=3)
        daemon.start()
        assert_in_step(database, daemon)
        assert obstacle.read_text() == "another program's"
        obstacle.unlink()
        client.checkpoint()
    daemon.kill()
    daemon.start()
    assert_in_step(database, daemon)
    assert logged(daemon, "reconciling") == 0


def test_a_small_table_answers_before_a_large_one_has_been_read(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE large (id int PRIMARY KEY, v real[]); "
        "CREATE TABLE small (LIKE large INCLUDING ALL)"
    )
    db.execute("INSERT INTO large SELECT i, ARRAY[i, 1] FROM generate_series(1, 20000) AS i")
    db.execute("INSERT INTO small SELECT i, ARRAY[i, 1] FROM generate_series(1, 100) AS i")
    db.execute(
        "SELECT syncd.attach('large', metric => 'l2'), syncd.attach('small', metric => 'l2')"
    )
    daemon.with_constant(PAGE_ROWS, (10, 10, 10))
    daemon.spawn()
    until(lambda: takes_requests(daemon), "syncd serves")
    with daemon.client() as client:
        until(lambda: len(keys_of(client, "small") or ()) == 100, "the small table answers")
        states = {each.dataset: each.state for each in client.datasets()}
        assert states.get("default/large", "backfilling") == "backfilling"
        assert client.status().state == "backfilling"


def test_a_name_that_another_source_has_is_free_when_that_one_is_detached(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE first (id int PRIMARY KEY, v real[]); "
        "CREATE TABLE second (LIKE first INCLUDING ALL)"
    )
    db.execute(
        "INSERT INTO first VALUES (1, '{1,1}'); "
        "INSERT INTO second VALUES (2, '{1,1}'), (3, '{2,1}')"
    )
    db.execute("SELECT syncd.attach('first', dataset => $$'same'$$)")
    daemon.start()
    db.execute("SELECT syncd.attach('second', dataset => $$'same'$$)")
    with daemon.client() as client:
        until(lambda: client.status().quarantined == 2, "the second table's rows have no place")
        assert list(client.keys("same")) == [1]
        client.checkpoint()
    daemon.kill()
    daemon.start()  # the first source keeps the name
    with daemon.client() as client:
        assert list(client.keys("same")) == [1]
        assert client.status().quarantined == 2
        db.execute("SELECT syncd.detach('first')")
        until(lambda: keys_of(client, "same") == [2, 3], "the name is free")
        until(lambda: client.status().quarantined == 0, "the rows have left the quarantine")
        db.execute("SELECT syncd.attach('first', dataset => $$'same'$$)")
        until(lambda: client.status().quarantined == 1, "now the first table comes late")
        assert sorted(client.keys("same")) == [2, 3]
    daemon.stop()


@pytest.mark.parametrize(
    "change", ["SELECT syncd.detach('items')", "SELECT syncd.attach('items', metric => 'l2')"]
)
def test_a_rebuild_ends_although_its_source_is_detached_or_attached_again_meanwhile(
    db: psycopg.Connection, daemon: Daemon, change: str
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items SELECT i, ARRAY[i, 1] FROM generate_series(1, 20000) AS i")
    db.execute("SELECT syncd.attach('items')")
    daemon.start()
    daemon.stop()
    daemon.with_constant(PAGE_ROWS, (10, 10, 100)).start()

    def rebuild() -> int | str:
        try:
            with daemon.client() as client:
                return client.rebuild("items").rows
        except RequestError as error:
            return error.kind

    with ThreadPoolExecutor(1) as threads, daemon.client() as client:
        rebuilding = threads.submit(rebuild)
        try:
            until(
                lambda: any(work.what == "rebuilding" for work in client.status().work),
                "the dataset is being rebuilt",
            )
            db.execute(change.encode())
            until(rebuilding.done, "the rebuild has ended")
        finally:
            daemon.stop()
    assert rebuilding.result() == ("unknown_dataset" if "detach" in change else 20000)


def test_a_rebuild_says_why_if_the_new_attachment_of_its_table_cannot_be_read(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items VALUES (1, '{1,1}')")
    db.execute("SELECT syncd.attach('items')")
    daemon.start()
    with db.transaction():
        db.execute("SELECT syncd.attach('items', metric => 'l2')")
        db.execute("ALTER TABLE items RENAME COLUMN v TO w")
    with ThreadPoolExecutor(1) as threads, daemon.client() as client, daemon.client() as other:
        until(lambda: client.status().state == "failed", "the table cannot be read")
        assert list(client.keys("items")) == [1]
        rebuilding = threads.submit(other.rebuild, "items")
        try:
            until(rebuilding.done, "the rebuild has ended")
        finally:
            daemon.stop()
    with pytest.raises(SyncdError, match="cannot be read"):
        rebuilding.result()
