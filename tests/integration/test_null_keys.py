"""Rows whose key is NULL, or a part of it: they are quarantined, and the other rows go on."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from syncd.ops import check
from syncd.settings import load_settings
from tests.daemon import Daemon
from tests.faults.following import until

SINGLE = {
    "integer": ("id int", "1", "2", "9"),
    "text": ("id text", "'a'", "'b'", "'z'"),
    "uuid": ("id uuid", f"'{'1' * 32}'", f"'{'2' * 32}'", f"'{'9' * 32}'"),
}
NULLABLE = (
    "ALTER TABLE a DROP CONSTRAINT a_pkey; ALTER TABLE a ALTER id DROP NOT NULL; "
    "ALTER TABLE a ADD uid bigserial PRIMARY KEY"
)


@pytest.fixture
def daemon(daemon: Daemon) -> Daemon:
    """A syncd that reports its quarantine at once."""
    return daemon.with_constant("syncd.sync.background.reports.REPORT_SECONDS", 0.05)


def quarantined(db: psycopg.Connection) -> list[tuple[str, str, str]]:
    return db.execute("SELECT dataset, key, reason FROM syncd.quarantine ORDER BY key").fetchall()


def labels(
    db: psycopg.Connection, key: str = "'NULL'", where: str = "id IS NULL"
) -> list[tuple[str, str, str]]:
    """The names that rows without a key get, from the table as it is now."""
    query = (
        f"SELECT 'default/a', {key} || ' at ctid ' || ctid, 'null_key' FROM a WHERE ({where}) "
        "ORDER BY 2"
    )
    return db.execute(query.encode()).fetchall()


def agrees(db: psycopg.Connection, daemon: Daemon, keys: int, unkeyed: int, **of: str) -> None:
    """``keys`` rows are indexed, ``unkeyed`` are quarantined, and a deep verify misses no row."""
    with daemon.client() as client:
        until(lambda: client.status().quarantined == unkeyed, f"{unkeyed} rows in quarantine")
        until(lambda: len(list(client.keys("a"))) == keys, f"{keys} rows are indexed")
        result = client.verify(deep=True)
        assert [(row.in_sync, row.rows, row.quarantined) for row in result.datasets] == [
            (True, keys, unkeyed)
        ]
        assert {each.source: each.outcome for each in result.sources}["public.a"] == "compared"
        until(lambda: quarantined(db) == labels(db, **of), "the rows are reported")
        assert client.status().state == "ready"


@pytest.mark.parametrize("kind", SINGLE)
@pytest.mark.parametrize("running", [True, False], ids=["while it runs", "at a start"])
def test_a_row_whose_key_is_null_is_in_quarantine_and_the_others_go_on(
    db: psycopg.Connection, daemon: Daemon, kind: str, running: bool
) -> None:
    column, first, second, last = SINGLE[kind]
    db.execute(f"CREATE TABLE a ({column} PRIMARY KEY, embedding real[])".encode())
    db.execute(f"INSERT INTO a VALUES ({first}, '{{1,0}}')".encode())
    db.execute("SELECT syncd.attach('a', metric => 'l2')")
    daemon.start()
    if not running:
        daemon.kill()
    db.execute(NULLABLE.encode())
    db.execute(
        "INSERT INTO a (id, embedding) VALUES (NULL, '{0,1}'), (NULL, '{0,1}'), (NULL, NULL)"
    )
    db.execute(f"INSERT INTO a (id, embedding) VALUES ({second}, '{{0,2}}')".encode())
    if not running:
        daemon.start()
    unkeyed = "id IS NULL AND embedding IS NOT NULL"
    agrees(db, daemon, 2, 2, where=unkeyed)
    with daemon.client() as client:
        (count,) = client.why("a").quarantine
        assert (count.reason, count.rows) == ("null_key", 2)
        assert all(str(each).startswith("NULL at ctid (") for each in count.sample)
    settings = load_settings(dsn=daemon.conninfo, data_dir=daemon.data_dir)
    found = [each for each in check.examine(settings, daemon.socket) if "null_key" in each.detail]
    assert [each.level for each in found] == ["warn"]
    daemon.stop()
    daemon.start()  # from its checkpoint
    agrees(db, daemon, 2, 2, where=unkeyed)
    # One row gets a key, the other is deleted.
    db.execute(
        f"UPDATE a SET id = {last} WHERE uid = (SELECT min(uid) FROM a WHERE id IS NULL)".encode()
    )
    agrees(db, daemon, 3, 1, where=unkeyed)
    db.execute("DELETE FROM a WHERE id IS NULL")
    agrees(db, daemon, 3, 0)
    db.execute(f"UPDATE a SET id = NULL WHERE id = {last}".encode())  # a row loses its key
    agrees(db, daemon, 2, 1)
    db.execute("TRUNCATE a")
    with daemon.client() as client:
        until(lambda: client.status().quarantined == 0, "the quarantine is empty")
    daemon.stop()


def test_a_composite_key_with_a_null_part_is_in_quarantine_and_pages_go_past_it(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE a (id int, part text, embedding real[], PRIMARY KEY (id, part))")
    db.execute("INSERT INTO a SELECT i / 10, i % 10, '{1,2}' FROM generate_series(0, 49) AS i")
    db.execute("SELECT syncd.attach('a', metric => 'l2')")
    db.execute(
        "ALTER TABLE a DROP CONSTRAINT a_pkey; "
        "ALTER TABLE a ALTER id DROP NOT NULL, ALTER part DROP NOT NULL"
    )
    db.execute("CREATE UNIQUE INDEX ON a (id, part)")
    db.execute(
        "UPDATE a SET part = NULL WHERE part IN ('3', '7'); "
        "UPDATE a SET id = NULL WHERE id = 2 AND part = '1'"
    )
    daemon.with_constant("syncd.sync.source.scan.PAGE_ROWS", (3, 3, 3)).start()
    shown = "json_build_array(id, part)::text"
    where = "id IS NULL OR part IS NULL"
    agrees(db, daemon, 39, 11, key=shown, where=where)
    db.execute(
        "UPDATE a SET part = 'null' WHERE part IS NULL AND id = 0 "
        "AND ctid = (SELECT min(ctid) FROM a WHERE part IS NULL AND id = 0)"
    )
    agrees(db, daemon, 40, 10, key=shown, where=where)
    with daemon.client() as client:
        assert (0, "null") in [hit.key for hit in client.search("a", [1, 2], k=100)]
    db.execute(
        "UPDATE a SET part = ctid::text, id = coalesce(id, 9) WHERE id IS NULL OR part IS NULL"
    )
    agrees(db, daemon, 50, 0, key=shown, where=where)
    daemon.stop()


def test_a_row_that_gets_a_key_is_found_although_row_triggers_do_not_note_it(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    """On a partitioned table a trigger fires for each row, and notes no NULL."""
    db.execute("CREATE TABLE a (id int, kind int, embedding real[]) PARTITION BY LIST (kind)")
    db.execute(
        "CREATE TABLE a1 PARTITION OF a FOR VALUES IN (1); "
        "CREATE TABLE a2 PARTITION OF a FOR VALUES IN (2)"
    )
    db.execute("CREATE UNIQUE INDEX ON a (id, kind)")
    db.execute("ALTER TABLE a ALTER id SET NOT NULL, ALTER kind SET NOT NULL")
    db.execute("INSERT INTO a SELECT i, 1 + i % 2, '{1,2}' FROM generate_series(1, 10) AS i")
    db.execute("SELECT syncd.attach('a', key => ARRAY['id', 'kind'], metric => 'l2')")
    daemon.start()
    db.execute("ALTER TABLE a ALTER id DROP NOT NULL")
    db.execute("INSERT INTO a VALUES (NULL, 1, '{1,2}'), (NULL, 2, '{1,2}')")
    with daemon.client() as client:
        until(lambda: client.status().quarantined == 2, "both are in quarantine")
        keys = [key for _, key, _ in reported(db, 2)]
        assert [key[key.index(" of ") :] for key in keys] == [" of public.a1", " of public.a2"]
        db.execute("UPDATE a SET id = 11 WHERE id IS NULL AND kind = 1")
        until(lambda: client.status().quarantined == 1, "one has a key")
        until(lambda: len(list(client.keys("a"))) == 11, "the row with a key is indexed")
        db.execute("UPDATE a SET id = 12 WHERE id IS NULL")
        until(lambda: client.status().quarantined == 0, "both have")
        assert all(row.in_sync and row.rows == 12 for row in client.verify(deep=True).datasets)
    daemon.stop()


def reported(db: psycopg.Connection, rows: int) -> list[tuple[str, str, str]]:
    until(lambda: len(quarantined(db)) == rows, "the rows are reported")
    return quarantined(db)


def test_an_expression_that_fails_on_a_row_without_a_key_holds_nothing_up(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE a (id int PRIMARY KEY, n int, embedding real[])")
    db.execute("INSERT INTO a VALUES (1, 1, '{1,2}')")
    db.execute("SELECT syncd.attach('a', metric => 'l2', live => '10 / n > 0')")
    daemon.start()
    db.execute(NULLABLE.encode())
    db.execute("INSERT INTO a (id, n, embedding) VALUES (NULL, 0, '{1,2}'), (2, 1, '{1,2}')")
    with daemon.client() as client:
        until(lambda: client.status().quarantined == 1, "the row is in quarantine")
        until(lambda: set(client.keys("a")) == {1, 2}, "the other row is indexed")
        assert reported(db, 1)[0][2] == "null_key"
        db.execute("UPDATE a SET n = 1 WHERE n = 0")
        until(lambda: [row[0] for row in quarantined(db)] == ["default/a"], "its dataset is known")
        db.execute("UPDATE a SET id = 3 WHERE id IS NULL")
        until(lambda: set(client.keys("a")) == {1, 2, 3}, "the row has a key")
    daemon.stop()


def test_keys_that_may_be_null_on_every_version_are_found_by_their_catalogue(
    any_db: psycopg.Connection, any_database: str, tmp_path: Path
) -> None:
    """A NOT NULL constraint that was never validated (18 and later) does not cover older rows."""
    any_db.execute("CREATE TABLE a (id int PRIMARY KEY, embedding real[])")
    any_db.execute("INSERT INTO a VALUES (1, '{1,2}')")
    any_db.execute("SELECT syncd.attach('a', metric => 'l2')")
    daemon = Daemon(any_database, tmp_path / "data")
    daemon.start()
    try:
        any_db.execute(NULLABLE.encode())
        any_db.execute("INSERT INTO a (id, embedding) VALUES (NULL, '{0,1}')")
        if any_db.info.server_version >= 180000:
            any_db.execute("ALTER TABLE a ADD CONSTRAINT never NOT NULL id NOT VALID")
        any_db.execute("INSERT INTO a (id, embedding) VALUES (2, '{0,1}')")
        agrees(any_db, daemon, 2, 1)
    finally:
        daemon.stop()
