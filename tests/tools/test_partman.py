"""pg_partman makes, detaches and drops partitions of a source.

It also moves rows from the default partition to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime

import psycopg
import pytest

from syncd.client.calls import Row
from tests.daemon import Daemon
from tests.faults.altered import Followed, eventually, serving, writers
from tests.tools.following import assert_in_sync, assert_triggers

QUERY = "SELECT id, v::real[] FROM parted WHERE v IS NOT NULL"
ROWS = "INSERT INTO parted (id, v) SELECT i, ARRAY[i, i % 7, 1] FROM generate_series({}, {}) AS i"


@pytest.fixture
def parted(
    db: psycopg.Connection, extension: Callable[[str, str], None], daemon: Daemon
) -> Iterator[Followed]:
    """A table in partitions of 100 keys, made by pg_partman, and a service in step with it."""
    db.execute(
        "CREATE TABLE parted (id int PRIMARY KEY, v real[], note text) PARTITION BY RANGE (id)"
    )
    extension("pg_partman", "postgresql-15-partman")
    db.execute(
        "SELECT public.create_parent('public.parted', 'id', 'native', '100', p_premake => 2)"
    )
    db.execute(ROWS.format(1, 250).encode())
    db.execute("SELECT public.run_maintenance('public.parted')")
    db.execute("SELECT syncd.attach('parted', metric => 'l2')")
    with serving(db, daemon) as it:
        it.in_step(QUERY, "parted")
        yield it
        daemon.stop()


def partitions(db: psycopg.Connection) -> list[str]:
    return [
        name.removeprefix("parted_p")
        for (name,) in db.execute(
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'parted'::regclass "
            "ORDER BY length(inhrelid::regclass::text), 1"
        ).fetchall()
    ]


def test_partitions_that_pg_partman_makes_ahead_and_retires_under_writers_are_followed(
    database: str, parted: Followed
) -> None:
    db = parted.db
    with writers(
        database, "UPDATE parted SET v = ARRAY[{n}, 1, 2], note = 'w' WHERE id = 300 + {n} % 50"
    ):
        for top in (350, 450, 550):
            db.execute(ROWS.format(top - 99, top).encode())
            db.execute("SELECT public.run_maintenance('public.parted')")
        assert partitions(db) == [
            "0",
            "100",
            "200",
            "300",
            "400",
            "500",
            "600",
            "700",
            "parted_default",
        ]
        db.execute("UPDATE public.part_config SET retention = '300', retention_keep_table = false")
        db.execute("SELECT public.run_maintenance('public.parted')")
        assert partitions(db)[0] == "200"
        assert db.execute(
            "SELECT to_regclass('parted_p0'), to_regclass('parted_p100')"
        ).fetchone() == (None, None)
        db.execute("UPDATE public.part_config SET retention = '200', retention_keep_table = true")
        db.execute("SELECT public.run_maintenance('public.parted')")
        assert partitions(db)[0] == "300"
    db.execute(
        "UPDATE parted_p200 SET v = '{9,9,9}'"
    )  # it exists, and is no longer a part of the source
    assert_in_sync(parted, QUERY, "parted")
    assert min(parted.client.keys("parted")) == 300


def test_rows_that_pg_partman_moves_out_of_the_default_partition_are_followed(
    parted: Followed,
) -> None:
    db = parted.db
    db.execute(ROWS.format(2001, 2250).encode())
    parted.in_step(QUERY, "parted")
    assert db.execute("SELECT count(*) FROM parted_default").fetchone() == (250,)
    db.execute("CALL public.partition_data_proc('public.parted', p_wait => 0)")
    assert db.execute("SELECT count(*) FROM parted_default").fetchone() == (0,)
    assert {"2000", "2100", "2200"} <= set(partitions(db))
    db.execute("UPDATE parted SET v = '{7,7,7}' WHERE id = 2100")
    assert_in_sync(parted, QUERY, "parted")


def test_a_table_in_partitions_by_day_with_the_time_in_its_key_is_followed(
    db: psycopg.Connection, database: str, extension: Callable[[str, str], None], daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE events (id bigint, created_at timestamptz, v real[], PRIMARY KEY (id, "
        "created_at)) PARTITION BY RANGE (created_at)"
    )
    extension("pg_partman", "postgresql-15-partman")
    start = "p_start_partition => (now() - interval '6 days')::text, p_premake => 2"
    db.execute(
        "SELECT public.create_parent('public.events', 'created_at', 'native', 'daily', "
        f"{start})".encode()
    )
    write = (
        "INSERT INTO events SELECT i, now() - i * interval '7 hours', ARRAY[i, 1, 1] FROM "
        "generate_series({}, {}) AS i"
    )
    db.execute(write.format(1, 15).encode())
    db.execute("SELECT syncd.attach('events', metric => 'l2')")
    with serving(db, daemon) as followed:
        assert_events(followed)
        elsewhere = "SET TimeZone = 'Asia/Kathmandu'; SET DateStyle = 'SQL, DMY';"
        with writers(
            database, elsewhere + "UPDATE events SET v = ARRAY[{n}, 2, 2] WHERE id = {n} % 20"
        ):
            db.execute(write.format(16, 40).encode())  # the oldest go to the default partition
            db.execute("CALL public.partition_data_proc('public.events', p_wait => 0)")
            assert db.execute("SELECT count(*) FROM events_default").fetchone() == (0,)
            db.execute(
                "UPDATE public.part_config SET retention = '4 days', retention_keep_table = false"
            )
            db.execute("SELECT public.run_maintenance('public.events')")
            assert db.execute("SELECT count(*) < 40 FROM events").fetchone() == (True,)
        db.execute(
            "SET TimeZone = 'America/Caracas'; UPDATE events SET created_at = created_at + "
            "interval '1 hour' WHERE id = 3"
        )
        assert_events(followed)
        daemon.stop()


def assert_events(followed: Followed) -> None:
    """Wait until the index equals the table, and check that verify finds it in sync."""

    def check() -> None:
        rows = followed.db.execute("SELECT id, created_at, v FROM events").fetchall()
        found = followed.client.get("events", list(followed.client.keys("events")), vectors=True)
        assert {read(row) for row in found} == {
            (number, at, tuple(vector)) for number, at, vector in rows
        }

    eventually(check)
    eventually(lambda: assert_triggers(followed))
    assert [each for each in followed.client.verify().datasets if not each.in_sync] == []


def read(row: Row) -> tuple[int, datetime, tuple[float, ...]]:
    """Both columns of a key, and the vector."""
    assert isinstance(row.key, tuple)
    assert row.vector is not None
    number, at = row.key
    return int(str(number)), datetime.fromisoformat(str(at)), tuple(row.vector)
