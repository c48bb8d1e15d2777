"""Partitioned tables as sources: attaching them, the locks of a pass, and following them."""

from __future__ import annotations

from typing import cast

import psycopg
import pytest

from syncd.postgres import source as sources
from syncd.postgres.batch import ask
from syncd.postgres.layout import read_sources
from syncd.postgres.source import Source
from tests.daemon import Daemon
from tests.integration.partitions import PARTED
from tests.integration.sources import attach, refused

# Which tables can be attached


def test_a_partition_is_refused_with_its_root(scratch: psycopg.Connection) -> None:
    scratch.execute(PARTED)
    for table in ("low", "deep", "deepest"):
        with refused(scratch, f"{table} is a partition of", "syncd.attach('public.parted')"):
            attach(scratch, table)


def test_a_partition_that_cannot_be_followed_is_refused(
    scratch: psycopg.Connection,
) -> None:
    scratch.execute(PARTED)
    with scratch.transaction(force_rollback=True):
        scratch.execute(
            "CREATE UNLOGGED TABLE quick PARTITION OF parted FOR VALUES FROM (20) TO (30)"
        )
        with refused(scratch, "unlogged", "SET LOGGED"):
            attach(scratch, "parted")
    scratch.execute(
        "CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER other FOREIGN DATA WRAPPER nowhere"
    )
    scratch.execute("CREATE TABLE far (id int, embedding real[]) PARTITION BY RANGE (id)")
    scratch.execute(
        "CREATE FOREIGN TABLE away PARTITION OF far FOR VALUES FROM (0) TO (10) SERVER other"
    )
    with refused(
        scratch, "away of table public.far is a foreign table", "server where it is written"
    ):
        attach(scratch, "far")


def test_more_partitions_than_the_server_has_locks_for_are_refused_before_any_is_locked(
    scratch: psycopg.Connection,
) -> None:
    scratch.execute(
        "CREATE TABLE many (id int PRIMARY KEY, embedding real[]) PARTITION BY RANGE (id)"
    )
    scratch.execute("CREATE TABLE many_0 PARTITION OF many FOR VALUES FROM (0) TO (1)")
    # A catalogue with more partitions than the server has locks for, without making them.
    scratch.execute(
        "CREATE OR REPLACE FUNCTION syncd.tables_of(source regclass, OUT relation regclass, OUT "
        'is_root boolean, OUT kind "char")'
        " RETURNS SETOF record LANGUAGE sql STABLE AS $$ SELECT source, i = 0, 'r'::\"char\" FROM "
        "generate_series(0, 9000) i $$"
    )
    with refused(
        scratch,
        "9000 partitions of table public.many takes 18002 locks",
        "max_locks_per_transaction = 361",
    ):
        attach(scratch, "many")


# Reading


def locks(db: psycopg.Connection) -> set[str]:
    return {
        row[0]
        for row in db.execute(
            "SELECT relation::regclass::text FROM pg_locks WHERE pid = pg_backend_pid() AND "
            "relation IN"
            " (SELECT oid FROM pg_class WHERE relkind IN ('r', 'p') AND relnamespace = "
            "'public'::regnamespace)"
        ).fetchall()
    }


def test_a_pass_locks_the_partitions_and_past_a_bound_only_those_with_changed_keys(
    any_db: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    any_db.execute(PARTED)
    any_db.execute(
        "CREATE TABLE pairs (lang text, id bigint, embedding real[], PRIMARY KEY (lang, id)) "
        "PARTITION BY LIST (lang);"
        "CREATE TABLE pairs_de PARTITION OF pairs FOR VALUES IN ('de'); CREATE TABLE pairs_en "
        "PARTITION OF pairs FOR VALUES IN ('en');"
        "INSERT INTO pairs VALUES ('de', 1, '{1}'), ('en', 1, '{2}')"
    )
    attach(any_db, "parted")
    attach(any_db, "pairs")
    cases = (
        (
            "parted",
            {"parted", "low", "high", "deep", "deepest"},
            ["1", "11", "101"],
            {"parted", "low"},
        ),
        (
            "pairs",
            {"pairs", "pairs_de", "pairs_en"},
            ['["de", 1]', '["en", 1]'],
            {"pairs", "pairs_de"},
        ),
    )
    for table, everything_of_it, asked, needed in cases:
        (source,) = [each for each in read_sources(any_db) if each.table == table]
        assert source.partitions == len(everything_of_it) - 1

        def read(keys: list[str], source: Source = source) -> int:
            (rows,) = ask(any_db, source.read(keys))
            return len(rows)

        for _ in range(12):  # a prepared statement may use a generic plan now
            assert read(asked) == len(asked)
        for bound, expected, then in (
            (100, everything_of_it, everything_of_it),
            (1, {table}, needed),
        ):
            monkeypatch.setattr(sources, "LOCK_PARTITIONS_UP_TO", bound)
            with any_db.transaction():
                any_db.execute(source.lock())
                assert locks(any_db) == expected
                assert read(asked[:1]) == 1
                assert locks(any_db) == then


def test_a_service_follows_a_partitioned_table(db: psycopg.Connection, daemon: Daemon) -> None:
    db.execute(PARTED)
    attach(db, "parted", metric="l2")
    daemon.start()
    with daemon.client() as client:

        def found() -> list[int]:
            return sorted(
                cast(int, hit.key)
                for hit in client.search("parted", [0], k=100, consistency="strong")
            )

        assert found() == [1, 2, 11, 101]
        db.execute(
            "UPDATE parted SET id = id + 10 WHERE id = 2; INSERT INTO deepest VALUES (102, 'en', "
            "'{102}')"
        )
        assert found() == [1, 11, 12, 101, 102]
        db.execute("TRUNCATE deep; INSERT INTO parted VALUES (103, 'en', '{103}')")
        assert found() == [1, 11, 12, 103]
        db.execute("BEGIN; TRUNCATE parted; INSERT INTO low VALUES (5, 'en', '{5}'); COMMIT")
        assert found() == [5]
        db.execute("INSERT INTO parted SELECT i, 'en', ARRAY[i] FROM generate_series(100, 149) i")
        assert found() == [5, *range(100, 150)]
    daemon.stop()
    db.execute("DELETE FROM deepest WHERE id > 100; TRUNCATE low")
    daemon.start()
    with daemon.client() as client:
        assert list(client.keys("parted")) == [100]
    daemon.stop()


def test_a_service_follows_composite_keys_across_partitions(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE pairs (lang text, id bigint, part uuid DEFAULT gen_random_uuid(), v real[], "
        "PRIMARY KEY (lang, id))"
        " PARTITION BY LIST (lang);"
        "CREATE TABLE pairs_de PARTITION OF pairs FOR VALUES IN ('de') PARTITION BY HASH (id);"
        "CREATE TABLE pairs_de_0 PARTITION OF pairs_de FOR VALUES WITH (MODULUS 2, REMAINDER 0);"
        "CREATE TABLE pairs_de_1 PARTITION OF pairs_de FOR VALUES WITH (MODULUS 2, REMAINDER 1);"
        "CREATE TABLE pairs_rest PARTITION OF pairs DEFAULT"
    )
    db.execute(
        "INSERT INTO pairs (lang, id, v) SELECT l, i, ARRAY[i] FROM generate_series(1, 50) i, "
        "unnest('{de,en}'::text[]) l"
    )
    attach(db, "pairs", metric="l2")
    daemon.start()
    with daemon.client() as client:
        assert len(list(client.keys("pairs"))) == 100
        db.execute("UPDATE pairs SET lang = 'de', id = id + 100 WHERE lang = 'en' AND id <= 2")
        db.execute("DELETE FROM pairs_rest")
        db.execute("DELETE FROM pairs WHERE id BETWEEN 3 AND 50")
        db.execute(
            "INSERT INTO pairs (lang, id, v) VALUES ('de', 1, '{7}') ON CONFLICT (lang, id) DO "
            "UPDATE SET v = excluded.v"
        )
        hits = client.search("pairs", [1], consistency="strong")
        assert [hit.key for hit in hits] == [("de", 101), ("de", 2), ("de", 102), ("de", 1)]
    daemon.stop()
