"""PREPARE TRANSACTION works with attached tables: changes arrive once they are committed.

No notification is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from syncd.client.client import Client
from tests.daemon import Daemon
from tests.integration.captured import keys, listening, outbox
from tests.servers import PostgresServer


@pytest.fixture
def two_phase_database(two_phase: PostgresServer) -> Iterator[str]:
    yield two_phase.create_database("app", "syncd_template")
    two_phase.drop_database("app")


def test_if_transactions_can_be_prepared_no_writer_notifies_and_preparing_works(
    two_phase_database: str,
) -> None:
    with (
        psycopg.connect(two_phase_database, autocommit=True) as db,
        listening(two_phase_database) as heard,
    ):
        db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
        db.execute("SELECT syncd.attach('items')")
        db.execute("TRUNCATE syncd.outbox")
        db.execute("BEGIN; INSERT INTO items VALUES (1); PREPARE TRANSACTION 'one'")
        assert outbox(db) == []
        db.execute("COMMIT PREPARED 'one'")
        assert outbox(db) == keys(1)
        assert heard() == 0
        db.execute("SELECT setval('syncd.notify_mode', 2)")
        db.execute("INSERT INTO items VALUES (2)")
        assert heard() == 1
        db.execute("BEGIN; INSERT INTO items VALUES (3)")
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="NOTIFY"):
            db.execute("PREPARE TRANSACTION 'two'")


def test_a_service_follows_without_notifications_if_transactions_can_be_prepared(
    two_phase_database: str, tmp_path: Path
) -> None:
    with psycopg.connect(two_phase_database, autocommit=True) as db:
        db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
        db.execute("INSERT INTO items VALUES (0, '{9}')")
        db.execute("SELECT syncd.attach('items', metric => 'l2')")
        daemon = Daemon(two_phase_database, tmp_path / "data").start()
        try:
            with daemon.client() as client:
                db.execute("BEGIN; INSERT INTO items VALUES (1, '{1}'); PREPARE TRANSACTION 'one'")
                assert list(client.keys("items")) == [0]
                db.execute("COMMIT PREPARED 'one'")
                assert [hit.key for hit in client.search("items", [1], consistency="strong")] == [
                    1,
                    0,
                ]
                assert not client.status().listener_connected
            daemon.stop()
        finally:
            if daemon.process is not None:
                daemon.kill()


def test_prepared_writes_to_a_partitioned_table_arrive_once_they_are_committed(
    two_phase_database: str, tmp_path: Path
) -> None:
    daemon = Daemon(two_phase_database, tmp_path / "data")
    with psycopg.connect(two_phase_database, autocommit=True) as db:
        db.execute(
            "CREATE TABLE parted (part text, id int, v real[], PRIMARY KEY (part, id)) PARTITION "
            "BY LIST (part)"
        )
        db.execute(
            "CREATE TABLE a PARTITION OF parted FOR VALUES IN ('a'); CREATE TABLE b PARTITION OF "
            "parted DEFAULT"
        )
        db.execute("INSERT INTO parted VALUES ('a', 1, '{1}'), ('b', 2, '{2}'), ('b', 3, '{3}')")
        db.execute("SELECT syncd.attach('parted', metric => 'l2')")
        try:
            daemon.start()
            with daemon.client() as client:
                db.execute(
                    "BEGIN; INSERT INTO a VALUES ('a', 4, '{4}');"
                    "UPDATE parted SET part = 'c', id = 5 WHERE id = 1; TRUNCATE b;"
                    "PREPARE TRANSACTION 'one'"
                )
                assert len(list(client.keys("parted"))) == 3
                db.execute("COMMIT PREPARED 'one'")
                assert [hit.key for hit in client.search("parted", [0], consistency="strong")] == [
                    ("a", 4)
                ]
                db.execute("BEGIN; DELETE FROM parted; PREPARE TRANSACTION 'two'")
                db.execute("ROLLBACK PREPARED 'two'")
                assert [hit.key for hit in client.search("parted", [0], consistency="strong")] == [
                    ("a", 4)
                ]
            daemon.stop()
        finally:
            if daemon.process is not None:
                daemon.kill()


def test_a_doubted_writer_is_found_while_a_prepared_one_stays_open(
    two_phase_database: str, tmp_path: Path
) -> None:
    """Another session has locked the outbox, so neither could write to it."""
    daemon = Daemon(two_phase_database, tmp_path / "data", verify_seconds=0)
    with psycopg.connect(two_phase_database, autocommit=True) as db:
        db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
        db.execute("INSERT INTO items VALUES (1, '{1}'), (2, '{2}'), (3, '{3}')")
        db.execute("SELECT syncd.attach('items', metric => 'l2')")

        def found(client: Client) -> list[object]:
            return [
                hit.key
                for hit in client.search("items", [0], consistency="strong", timeout_ms=60_000)
            ]

        try:
            daemon.start()
            with daemon.client() as client, psycopg.connect(two_phase_database) as writer:
                with psycopg.connect(two_phase_database) as lock:
                    lock.execute("LOCK TABLE syncd.outbox IN ACCESS EXCLUSIVE MODE")
                    writer.execute("DELETE FROM items WHERE id = 1")
                    db.execute("BEGIN; DELETE FROM items WHERE id = 2; PREPARE TRANSACTION 'one'")
                    assert db.execute("SELECT last_value FROM syncd.doubts").fetchone() == (2,)
                assert found(client) == [1, 2, 3]
                writer.commit()
                assert found(client) == [2, 3]
                daemon.kill()
                daemon.start()
            with daemon.client() as client:
                assert found(client) == [2, 3]
                db.execute("COMMIT PREPARED 'one'")
                assert found(client) == [3]
            daemon.stop()
        finally:
            if daemon.process is not None:
                daemon.kill()
