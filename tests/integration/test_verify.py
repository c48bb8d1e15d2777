"""verify finds every difference between an index and its table, and nothing else; repair mends just those."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psycopg
import pytest

from syncd.errors import SyncdError, UnknownDataset
from syncd.rpc.client import Client
from syncd.rpc.messages import DatasetVerified, VerifyResult
from tests.conftest import clone
from tests.daemon import Daemon
from tests.faults.following import until
from tests.servers import PostgresServer

DIM = 8


@pytest.fixture
def followed(db: psycopg.Connection, daemon: Daemon) -> Daemon:
    """A service that follows a thousand rows and never verifies by itself."""
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v vector, gone boolean DEFAULT false, lang text DEFAULT 'en')")
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, i % 7, 1, 2, 3, 4, 5, 6]::real[]::vector FROM generate_series(1, 1000) i"
    )
    db.execute("SELECT syncd.attach('items', metric => 'cosine', live => 'NOT gone', columns => ARRAY['lang'])")
    daemon.settings["verify_seconds"] = 0
    return daemon.start()


def unseen(db: psycopg.Connection, statement: str) -> None:
    """Change the table, and let nobody know."""
    with db.transaction():
        db.execute(statement.encode())
        db.execute("DELETE FROM syncd.outbox WHERE xid = pg_current_xact_id()")


def of(result: VerifyResult, dataset: str = "default/items") -> DatasetVerified:
    """One dataset's part."""
    return next(row for row in result.datasets if row.dataset == dataset)


def counts(row: DatasetVerified) -> tuple[bool, int, int, int]:
    return row.in_sync, row.missing, row.extra, row.stale


def test_an_index_that_equals_its_table_is_in_sync(followed: Daemon) -> None:
    with followed.client() as client:
        for deep in (False, True):
            row = of(client.verify("items", deep=deep))
            assert counts(row) == (True, 0, 0, 0)
            assert (row.rows, row.indexed, row.sample) == (1000, 1000, [])


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("change", "missing", "extra", "stale", "key"),
    [
        ("INSERT INTO items VALUES (5000, '[1,2,3,4,5,6,7,8]')", 1, 0, 0, 5000),
        ("DELETE FROM items WHERE id = 3", 0, 1, 0, 3),
        ("UPDATE items SET gone = true WHERE id = 4", 0, 1, 0, 4),
        ("UPDATE items SET v = NULL WHERE id = 5", 0, 1, 0, 5),
        ("UPDATE items SET v = '[9,9,9,9,9,9,9,1]' WHERE id = 6", 0, 0, 1, 6),
        ("UPDATE items SET v = v * v WHERE id = 1 OR false", 0, 0, 1, 1),
        ("UPDATE items SET lang = 'de' WHERE id = 7", 0, 0, 1, 7),
        ("UPDATE items SET id = 7000 WHERE id = 8", 1, 1, 0, 7000),
    ],
)
def test_every_kind_of_difference_is_found_and_mended(
    db: psycopg.Connection, followed: Daemon, change: str, missing: int, extra: int, stale: int, key: int, deep: bool
) -> None:
    unseen(db, change)
    with followed.client() as client:
        found = of(client.verify("items", deep=deep))
        assert counts(found) == (False, missing, extra, stale)
        assert key in found.sample
        mended = of(client.verify("items", repair=True, deep=deep))
        assert (*counts(mended), mended.repaired) == (True, missing, extra, stale, missing + extra + stale)
        assert counts(of(client.verify("items", deep=True))) == (True, 0, 0, 0)
    assert_equal(db, followed)


def assert_equal(db: psycopg.Connection, daemon: Daemon) -> None:
    """The index holds what the table holds."""
    rows: dict[int, list[float]] = dict(
        db.execute("SELECT id, v::real[] FROM items WHERE NOT gone AND v IS NOT NULL").fetchall()
    )
    with daemon.client() as client:
        indexed = {row.key: row.vector for row in client.get("items", [*client.keys("items")], vectors=True)}
    assert indexed.keys() == rows.keys()
    for key, vector in rows.items():
        found = indexed[key]
        assert found is not None
        np.testing.assert_allclose(found, vector, rtol=1e-6)


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
                    "INSERT INTO items VALUES (%s, %s) ON CONFLICT (id) DO UPDATE SET v = excluded.v", [key, vector]
                )
                connection.execute("DELETE FROM items WHERE id = %s", [other])
                writes += 2
        return writes

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write, number) for number in range(3)]
        try:
            with followed.client() as client:
                for round_ in range(15):
                    assert counts(of(client.verify("items", deep=round_ % 3 == 0))) == (True, 0, 0, 0)
        finally:
            stop.set()
        assert sum(writer.result() for writer in writers) > 100


def test_quarantined_rows_are_accounted_for_until_they_change(db: psycopg.Connection, followed: Daemon) -> None:
    db.execute("INSERT INTO items VALUES (2000, '[0,0,0,0,0,0,0,0]'), (2001, '[1,2]')")
    with followed.client() as client:
        found = of(client.verify("items"))
        assert (*counts(found), found.quarantined, found.rows) == (True, 0, 0, 0, 2, 1002)
        unseen(db, "UPDATE items SET v = '[1,2,3,4,5,6,7,8]' WHERE id = 2001")
        found = of(client.verify("items"))
        assert (*counts(found), found.quarantined) == (False, 1, 0, 0, 1)
        assert of(client.verify("items", repair=True)).in_sync
        assert client.get("items", [2001])


def test_quarantined_rows_stay_accounted_for_while_a_table_is_compared(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v vector)")
    db.execute("INSERT INTO items SELECT i, '[1,2]' FROM generate_series(1, 400) i")
    db.execute("INSERT INTO items SELECT i, '[0,0]' FROM generate_series(401, 500) i")
    db.execute("SELECT syncd.attach('items')")
    daemon.settings["verify_seconds"] = 0
    daemon.with_constant("syncd.sync.scan.PAGE_ROWS", (10, 10, 10))
    daemon.start()
    with daemon.client() as client:
        for _ in range(5):
            db.execute("VACUUM FULL items")  # has it compared, page by page
            for _ in range(5):
                found = of(client.verify("items"))
                assert (*counts(found), found.quarantined) == (True, 0, 0, 0, 100)
                assert client.status().quarantined == 100
        unseen(db, "DELETE FROM items WHERE id > 450")
        db.execute("VACUUM FULL items")
        until(lambda: client.status().quarantined == 50, "half of the rows are in quarantine")


def test_a_verify_waits_for_whoever_holds_the_table_for_a_moment(followed: Daemon) -> None:
    with psycopg.connect(followed.conninfo) as holder, followed.client() as client, ThreadPoolExecutor(1) as pool:
        holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        until(lambda: "source_delayed" in followed.log.read_text(), "it waits for the lock")
        found = pool.submit(client.verify, "items")
        time.sleep(0.5)  # not to wait for anything: the lock is held meanwhile
        holder.rollback()
        assert counts(of(found.result(30))) == (True, 0, 0, 0)


def test_a_table_that_is_locked_for_long_is_said_not_to_be_compared(followed: Daemon) -> None:
    with psycopg.connect(followed.conninfo) as holder, followed.client() as client:
        holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
        until(lambda: "source_delayed" in followed.log.read_text(), "it waits for the lock")
        found = client.verify("items")
        (source,) = found.sources
        assert (source.outcome, "lock" in source.reason, of(found).in_sync) == ("failed", True, False)
        holder.rollback()
        assert "drift_found" not in followed.log.read_text()
        until(lambda: of(client.verify("items")).in_sync, "it compares the table again")


def test_a_rebuild_while_the_database_is_gone_says_so(own_server: PostgresServer, tmp_path: Path) -> None:
    for conninfo in clone(own_server):
        with psycopg.connect(conninfo, autocommit=True) as db:
            db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[]); INSERT INTO items VALUES (1, '{1,2}')")
            db.execute("SELECT syncd.attach('items')")
        daemon = Daemon(conninfo, tmp_path / "data", verify_seconds=0).start()
        own_server.stop("immediate")
        with daemon.client() as client:
            with pytest.raises(SyncdError, match="cannot be reached"):
                client.rebuild("items")
            own_server.start()
            until(lambda: client.status().state == "ready", "it is ready again")
            assert client.rebuild("items").rows == 1
        daemon.stop()


def test_rows_whose_dataset_another_source_has_are_told_of(db: psycopg.Connection, followed: Daemon) -> None:
    db.execute(
        "CREATE TABLE others (id int PRIMARY KEY, v real[]); INSERT INTO others VALUES (1, '{1,2}'), (2, '{1,2}')"
    )
    db.execute("SELECT syncd.attach('others', dataset => $$'items'$$)")
    with followed.client() as client:
        until(lambda: client.status().quarantined == 2, "both rows are in quarantine")
        said = {each.source: each for each in client.verify().sources}
    assert said["public.others"].reason == "2 live rows are in quarantine, and in none of its datasets"
    assert said["public.items"].reason == ""


def test_rows_of_a_dataset_that_never_formed_are_missing(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute("CREATE TABLE notes (id uuid PRIMARY KEY, lang text, v real[])")
    db.execute("INSERT INTO notes VALUES (gen_random_uuid(), 'en', '{1,2}')")
    db.execute("SELECT syncd.attach('notes', dataset => 'lang')")
    daemon.settings["verify_seconds"] = 0
    daemon.start()
    unseen(db, "INSERT INTO notes VALUES (gen_random_uuid(), 'de', '{1,2}'), (gen_random_uuid(), 'de', '{2,2}')")
    with daemon.client() as client:
        result = client.verify()
        assert counts(of(result, "default/de")) == (False, 2, 0, 0)
        assert counts(of(result, "default/en")) == (True, 0, 0, 0)
        client.verify(repair=True)
        assert counts(of(client.verify(), "default/de")) == (True, 0, 0, 0)
        with pytest.raises(UnknownDataset):
            client.verify("fr")


def test_a_row_that_moved_to_another_dataset_is_extra_in_the_old(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute("CREATE TABLE notes (a int, b text, lang text, v real[], PRIMARY KEY (a, b))")
    db.execute("INSERT INTO notes VALUES (1, 'x', 'en', '{1,2}'), (1, 'y', 'de', '{1,2}'), (2, 'x', 'en', '{1,2}')")
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


def test_rows_that_come_and_go_beside_a_verify_wait_for_nobody(db: psycopg.Connection, followed: Daemon) -> None:
    """An ALTER TABLE behind a verify would make every writer wait behind it."""
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 1, 1, 2, 3, 4, 5, 6]::real[]::vector FROM generate_series(2000, 60000) i"
    )
    followed.stop()
    followed.with_constant("syncd.sync.comparison.ROWS_PER_DEEP_FETCH", 5).start()  # a slow one
    stop = threading.Event()

    def verify(client: Client) -> None:
        while not stop.is_set():
            client.verify("items", deep=True)

    with followed.client() as client, ThreadPoolExecutor(1) as pool:
        verifying = pool.submit(verify, client)
        try:
            db.execute("SET lock_timeout = '1s'")
            until(
                lambda: (
                    db.execute("SELECT 1 FROM pg_stat_activity WHERE query LIKE 'FETCH %syncd_verify%'").fetchone()
                    is not None
                ),
                "a verify reads the table",
            )
            db.execute("ALTER TABLE items ADD COLUMN more int")
        finally:
            stop.set()
        verifying.result()


def test_a_verify_whose_client_has_gone_is_not_under_way_any_more(db: psycopg.Connection, followed: Daemon) -> None:
    followed.stop()
    followed.with_constant("syncd.sync.comparison.ROWS_PER_DEEP_FETCH", 1).start()  # a slow one

    def sessions() -> int:
        return len(db.execute("SELECT FROM pg_stat_activity WHERE application_name = 'syncd/default'").fetchall())

    with followed.client() as client:
        client.verify("items")
        before = sessions()
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(followed.socket))
            other.sendall(
                b'{"jsonrpc": "2.0", "id": 1, "method": "verify", "params": {"dataset": "items", "deep": true}}\n'
            )
            until(lambda: bool(client.status().work), "the verify is under way")
            until(lambda: client.status().work[0].rows > 1, "the verify has compared rows")
        until(lambda: sessions() == before, "the session of the verify is gone")
        assert client.status().work == []


def test_the_background_verify_mends_what_drifted(db: psycopg.Connection, followed: Daemon) -> None:
    unseen(db, "DELETE FROM items WHERE id <= 10")
    followed.stop()
    followed.settings["verify_seconds"] = 3600
    followed.start()
    with followed.client() as client:
        until(lambda: len([*client.keys("items")]) == 990, "the rows that are gone have left the index")
    assert_equal(db, followed)
    log = followed.log.read_text()
    assert '"drift_found"' in log
    assert '"drift_repaired"' in log


def run(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line."""
    return subprocess.run(
        [sys.executable, "-m", "syncd.cli.main", *arguments],
        env=daemon.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_command_says_what_differs_and_exits_1(db: psycopg.Connection, followed: Daemon) -> None:
    done = run(followed, "verify", "items")
    assert done.returncode == 0
    assert "in sync" in done.stdout
    unseen(db, "DELETE FROM items WHERE id = 3")
    done = run(followed, "verify")
    assert done.returncode == 1
    assert "DIFFERS" in done.stdout
    done = run(followed, "verify", "--repair", "--json")
    assert done.returncode == 0
    assert '"repaired":1' in done.stdout
    assert run(followed, "verify", "--deep").returncode == 0
    assert run(followed, "verify", "nothing").returncode == 1
    assert run(followed, "rebuild", "items").returncode == 0
    followed.stop()
    done = run(followed, "verify")
    assert done.returncode == 1
    assert "syncd serve" in done.stderr


def test_a_verify_that_compared_nothing_says_so(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("SELECT syncd.attach('items', live => 'id < 0')")
    daemon.settings["verify_seconds"] = 0
    daemon.start()
    done = run(daemon, "verify")
    assert done.returncode == 0
    assert "public.items: empty" in done.stderr
    assert "in sync" not in done.stdout
    db.execute("INSERT INTO items VALUES (1, '{1}')")
    done = run(daemon, "verify")
    assert done.returncode == 1
    assert "none of its rows is live" in done.stderr


def test_a_rebuild_never_leaves_a_moment_without_an_answer(
    db: psycopg.Connection, followed: Daemon, database: str
) -> None:
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 1, 1, 2, 3, 4, 5, 6]::real[]::vector FROM generate_series(2000, 30000) i"
    )
    stop = threading.Event()

    def ask() -> set[int]:
        answers, key = set(), 100_000
        with Client(followed.socket) as client, psycopg.connect(database, autocommit=True) as connection:
            while not stop.is_set():
                key += 1
                connection.execute("INSERT INTO items VALUES (%s, '[1,2,3,4,5,6,7,8]')", [key])
                answers.add(len(client.search("items", [1, 2, 3, 4, 5, 6, 7, 8], k=5, consistency="strong")))
                assert client.get("items", [key])
                connection.execute("DELETE FROM items WHERE id = %s", [key - 100_000])  # behind the page that is read
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
        assert {row.state for row in client.datasets() if row.dataset == "default/items"} == {"ready"}
        assert counts(of(client.verify("items", deep=True))) == (True, 0, 0, 0)
        client.rebuild("items")
        assert next(row for row in client.datasets() if row.dataset == "default/items").tombstones == 0
    followed.stop()
    followed.start()
    assert_equal(db, followed)


def test_a_source_that_cannot_be_read_is_not_in_sync(db: psycopg.Connection, followed: Daemon) -> None:
    db.execute("ALTER TABLE items RENAME COLUMN v TO w")
    db.execute("UPDATE items SET w = w WHERE id = 1")
    with followed.client() as client:
        until(lambda: client.status().state == "failed", "it has failed")
        result = client.verify()
        assert not of(result).in_sync
        assert [source.outcome for source in result.sources if source.source == "public.items"] == ["failed"]
    assert run(followed, "verify").returncode == 1
