"""Many rows that cannot be indexed. tests/integration/test_bad_input.py tests single ones."""

from __future__ import annotations

import psycopg
import pytest

from tests.daemon import Daemon
from tests.faults.following import until
from tests.oracle.writes import fetch

REPORTED = 20


def reported(db: psycopg.Connection) -> int:
    return int(fetch(db, "SELECT count(*) FROM syncd.quarantine"))


def test_many_bad_rows_are_counted_all_and_listed_up_to_a_bound(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items SELECT i, ARRAY[i, 1] FROM generate_series(1, 50) AS i")
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 'NaN'::real] FROM generate_series(1001, 1200) AS i"
    )
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    daemon.with_constant("syncd.sync.background.reports.MAX_REPORTED_ROWS", REPORTED)
    daemon.with_constant("syncd.sync.background.reports.REPORT_SECONDS", 0.05)
    daemon.start()
    with daemon.client() as client:
        assert client.status().quarantined == 200
        assert len(list(client.keys("items"))) == 50
        until(lambda: reported(db) == REPORTED, "the list is full")
        client.checkpoint()
        daemon.kill()
        daemon.start()
        assert client.status().quarantined == 200
        db.execute("UPDATE items SET v = ARRAY[id, 1] WHERE id BETWEEN 1001 AND 1150")
        until(lambda: client.status().quarantined == 50, "the repaired rows leave")
        until(
            lambda: (
                reported(db) == REPORTED
                and int(fetch(db, "SELECT min(key::int) FROM syncd.quarantine")) > 1150
            ),
            "others come into the list",
        )
        db.execute("UPDATE items SET v = ARRAY[id, 1] WHERE id > 1150")
        until(
            lambda: client.status().quarantined == 0 and reported(db) == 0,
            "the quarantine is empty",
        )
        assert len(list(client.keys("items"))) == 250
    daemon.stop()


def test_every_reason_in_every_source_is_listed_and_counted_however_many_rows_another_one_has(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    for name in ("items", "others"):
        db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, v real[])".encode())
        db.execute(f"INSERT INTO {name} VALUES (1, '{{1,1}}'), (2, '{{2,1}}')".encode())
        db.execute(f"SELECT syncd.attach('{name}', metric => 'l2')".encode())
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 'NaN'::real] FROM generate_series(1001, 1200) AS i"
    )
    db.execute("INSERT INTO items VALUES (3, '{}'), (4, '{1,2,3}'), (5, '{1,2,3}')")
    db.execute("INSERT INTO others VALUES (3, '{NaN,1}')")
    daemon.with_constant("syncd.sync.background.reports.MAX_REPORTED_ROWS", REPORTED)
    daemon.with_constant("syncd.sync.background.reports.REPORT_SECONDS", 0.05)
    daemon.start()
    counted = (
        "SELECT array_agg(ARRAY[c.dataset, c.reason, c.rows] ORDER BY c.dataset, c.reason)"
        " FROM (SELECT dataset, reason, count(*)::text AS rows FROM syncd.quarantine"
        " GROUP BY 1, 2) AS c"
    )
    wanted = [
        ["default/items", "dimension_mismatch", "2"],
        ["default/items", "empty", "1"],
        ["default/items", "nan", str(REPORTED - 4)],
        ["default/others", "nan", "1"],
    ]
    until(
        lambda: db.execute(counted.encode()).fetchone() == (wanted,), "each reason is in the list"
    )
    with daemon.client() as client:
        found = [(each.source, each.reason, each.rows) for each in client.status().quarantine]
    assert sorted(found) == [
        ("public.items", "dimension_mismatch", 2),
        ("public.items", "empty", 1),
        ("public.items", "nan", 200),
        ("public.others", "nan", 1),
    ]
    daemon.stop()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_million_bad_rows_take_little_memory_and_the_others_go_on(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items SELECT i, ARRAY[i, 1] FROM generate_series(1, 50) AS i")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    daemon.start()
    assert daemon.process is not None
    with daemon.client() as client:
        before = resident_megabytes(daemon.process.pid)
        db.execute(
            "INSERT INTO items SELECT i, ARRAY[i, 'NaN'::real] "
            "FROM generate_series(1001, 1001000) AS i"
        )
        until(lambda: client.status().quarantined == 1_000_000, "all are noticed", seconds=300)
        client.checkpoint()
        db.execute("INSERT INTO items VALUES (51, '{51,1}')")
        client.wait(fetch(db, "SELECT syncd.token()"), timeout_ms=60_000)
        assert len(list(client.keys("items"))) == 51
        used = resident_megabytes(daemon.process.pid) - before
        print(f"{used} MB")
        assert used < 800
        until(lambda: reported(db) == 10_000, "the list is bounded", seconds=60)
    daemon.kill()
    daemon.start()
    with daemon.client() as client:
        assert client.status().quarantined == 1_000_000
    daemon.kill()


def resident_megabytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as numbers:  # noqa: PTH123
        return int(numbers.read().split()[1]) * 4096 // 1_000_000
