"""pg_partman makes, detaches and drops the partitions of a source, and moves rows from the default partition to others: the service follows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.daemon import Daemon
from tests.faults.altered import Followed, serving, writers
from tests.tools.following import assert_in_sync

QUERY = "SELECT id, v::real[] FROM parted WHERE v IS NOT NULL"
ROWS = "INSERT INTO parted (id, v) SELECT i, ARRAY[i, i % 7, 1] FROM generate_series({}, {}) AS i"


@pytest.fixture
def parted(db: psycopg.Connection, extension: Callable[[str, str], None], daemon: Daemon) -> Iterator[Followed]:
    """A table in partitions of 100 keys, made by pg_partman, and a service that has caught up with it."""
    db.execute("CREATE TABLE parted (id int PRIMARY KEY, v real[], note text) PARTITION BY RANGE (id)")
    extension("pg_partman", "postgresql-15-partman")
    db.execute("SELECT public.create_parent('public.parted', 'id', 'native', '100', p_premake => 2)")
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
            "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'parted'::regclass ORDER BY length(inhrelid::regclass::text), 1"
        ).fetchall()
    ]


def test_partitions_that_pg_partman_makes_ahead_and_retires_under_writers_are_followed(
    database: str, parted: Followed
) -> None:
    db = parted.db
    with writers(database, "UPDATE parted SET v = ARRAY[{n}, 1, 2], note = 'w' WHERE id = 300 + {n} % 50"):
        for top in (350, 450, 550):
            db.execute(ROWS.format(top - 99, top).encode())
            db.execute("SELECT public.run_maintenance('public.parted')")
        assert partitions(db) == ["0", "100", "200", "300", "400", "500", "600", "700", "parted_default"]
        db.execute("UPDATE public.part_config SET retention = '300', retention_keep_table = false")
        db.execute("SELECT public.run_maintenance('public.parted')")
        assert partitions(db)[0] == "200"
        assert db.execute("SELECT to_regclass('parted_p0'), to_regclass('parted_p100')").fetchone() == (None, None)
        db.execute("UPDATE public.part_config SET retention = '200', retention_keep_table = true")
        db.execute("SELECT public.run_maintenance('public.parted')")
        assert partitions(db)[0] == "300"
    db.execute("UPDATE parted_p200 SET v = '{9,9,9}'")  # it is there, and is not the source's any more
    assert_in_sync(parted, QUERY, "parted")
    assert min(parted.client.keys("parted")) == 300


def test_rows_that_pg_partman_moves_out_of_the_default_partition_are_followed(parted: Followed) -> None:
    db = parted.db
    db.execute(ROWS.format(2001, 2250).encode())
    parted.in_step(QUERY, "parted")
    assert db.execute("SELECT count(*) FROM parted_default").fetchone() == (250,)
    db.execute("CALL public.partition_data_proc('public.parted', p_wait => 0)")
    assert db.execute("SELECT count(*) FROM parted_default").fetchone() == (0,)
    assert {"2000", "2100", "2200"} <= set(partitions(db))
    db.execute("UPDATE parted SET v = '{7,7,7}' WHERE id = 2100")
    assert_in_sync(parted, QUERY, "parted")
