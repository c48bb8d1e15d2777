"""Freeing the outbox under a running syncd: no change is missed, no writer waits, it stays small.

The thresholds of the slots are small in these processes, so that a few thousand rows go through
many rotations.
"""

from __future__ import annotations

import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest

from syncd.statements import statement
from tests.conftest import clone
from tests.faults.following import until
from tests.faults.rotation import (
    A_MOMENT,
    UPSERT,
    WITHIN_SECONDS,
    assert_in_step,
    fill,
    following,
    freed,
    make_items,
    outbox_rows,
    snapshot,
    value,
)
from tests.servers import PostgresServer

LOCK_TIMEOUT = "30s"
"""Longer than a busy machine needs; shorter waits for a table are found in the server's log."""


class Writers:
    """Threads that write until they are stopped, and fail if a lock keeps them waiting."""

    def __init__(self, conninfo: str, number: int) -> None:
        self.conninfo = conninfo
        self.stopped = threading.Event()
        self.threads = ThreadPoolExecutor(number)
        self.running = [self.threads.submit(self.write, seed) for seed in range(number)]

    def write(self, seed: int) -> int:
        chosen, statements = random.Random(seed), 0
        with psycopg.connect(self.conninfo, autocommit=True) as db:
            db.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
            while not self.stopped.is_set():
                with db.transaction(force_rollback=chosen.random() < 0.1):
                    for _ in range(chosen.randint(1, 3)):
                        # No two writers share a row.
                        key = seed * 100_000 + chosen.randrange(1, 2000)
                        if chosen.random() < 0.2:
                            db.execute("DELETE FROM items WHERE id = %s", [key])
                        else:
                            db.execute(UPSERT, [key, chosen.randrange(1000)])
                        statements += 1
        return statements

    def stop(self) -> int:
        """End them; returns the number of statements. Raises the error of one that ended early."""
        self.stopped.set()
        done = sum(future.result(timeout=60) for future in self.running)
        self.threads.shutdown()
        return done


@pytest.mark.timeout(240)
def test_every_key_arrives_and_no_writer_waits_through_rotations_and_kills(
    server: PostgresServer, database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    name = value(items, "SELECT current_database()")
    for setting in ("log_lock_waits = on", f"deadlock_timeout = '{A_MOMENT}'"):
        items.execute(f"ALTER DATABASE {name} SET {setting}")
    logged = server.log.stat().st_size
    with following(database, tmp_path / "data") as daemon:
        daemon.start()
        writers = Writers(database, 8)
        rotations, slot = 0, 0  # so far, and the slot at the last look

        def rotated_often() -> bool:
            nonlocal rotations, slot
            now = int(value(items, "SELECT last_value FROM syncd.outbox_slot"))
            rotations, slot = rotations + (now != slot), now
            return rotations >= 5

        try:
            for seconds in (1.5, 0.4, 1.2, 0.8):
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    rotated_often()
                    time.sleep(0.005)
                daemon.kill()
                daemon.start()
            until(rotated_often, "the slot changes while writers write")
            until(
                lambda: (
                    value(items, "SELECT last_value FROM syncd.outbox_id") > 3 * outbox_rows(items)
                ),
                "the outbox is freed while writers write",
            )
        finally:
            statements = writers.stop()
        with daemon.client() as client:
            assert_in_step(client, items)
        until(lambda: outbox_rows(items) == 0, "the outbox is emptied when all writers have ended")
        daemon.stop()
    print(f"{statements} statements, {rotations} rotations")
    # Writers of one table extend its file in turn, with or without syncd. Only the rotation could
    # keep a lock on a whole table from them.
    waits = re.findall(r".*still waiting for \w+ on relation .*", server.log.read_text()[logged:])
    assert not waits, waits[:3]


def test_a_writer_open_through_many_rotations_arrives(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    with following(database, tmp_path / "data") as daemon, psycopg.connect(database) as early:
        daemon.start()
        early.execute("INSERT INTO items VALUES (-1, '{7,7}')")
        slots: list[int] = []
        key = 1
        while sum(a != b for a, b in pairwise(slots)) < 5:
            with items.transaction():
                for _ in range(150):
                    items.execute(UPSERT, [key % 500, key])
                    key += 1
            slots.append(value(items, "SELECT last_value FROM syncd.outbox_slot"))
            assert key < 200_000, slots
        with daemon.client() as client:
            assert_in_step(client, items)
            assert list(client.get("items", [-1])) == []
            early.execute("UPDATE items SET v = '{8,8}' WHERE id = -1")
            early.commit()
            assert_in_step(client, items)
        until(lambda: outbox_rows(items) == 0, "the outbox is emptied after it")


def test_two_consumers_at_different_positions_are_right_through_rotations(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    with (
        following(database, tmp_path / "a", consumer="a") as first,
        following(database, tmp_path / "b", consumer="b") as second,
    ):
        first.start()
        second.start()
        second.stop()
        writers = Writers(database, 2)
        try:
            until(lambda: outbox_rows(items) > 1000, "the consumer that is away needs them")
        finally:
            writers.stop()
        with first.client() as client:
            assert_in_step(client, items)
        second.start()
        assert "reconciling" not in second.log.read_text()
        with second.client() as client:
            assert_in_step(client, items)
        until(lambda: outbox_rows(items) == 0, "no consumer needs them any more")
        writers = Writers(database, 4)
        try:
            before = value(items, "SELECT last_value FROM syncd.outbox_id")
            until(
                lambda: value(items, "SELECT last_value FROM syncd.outbox_id") > before + 5000,
                "writers write",
            )
        finally:
            writers.stop()
        for daemon in (first, second):
            with daemon.client() as client:
                assert_in_step(client, items)
            assert "must_rebuild" not in daemon.log.read_text()


@pytest.mark.parametrize(
    "begin", ["report_limits", "durable_limits", "start_limits", "lock_identity", "limits"]
)
def test_a_service_that_is_frozen_in_a_transaction_keeps_no_lock_for_long(
    begin: str, database: str, db: psycopg.Connection
) -> None:
    with closing(psycopg.connect(database, autocommit=True)) as frozen:
        limits = statement("check" if begin == "limits" else "consumer", begin).replace(
            "idle_in_transaction_session_timeout = '30s'",
            "idle_in_transaction_session_timeout = '300ms'",
        )
        frozen.execute("BEGIN")
        # In one message: between two of them the session would be idle already.
        frozen.execute(f"{limits}; LOCK TABLE syncd.consumers IN ACCESS EXCLUSIVE MODE".encode())
        held = (
            f"SELECT count(*) FROM pg_locks WHERE pid = {frozen.info.backend_pid} "
            "AND mode = 'AccessExclusiveLock'"
        )
        until(lambda: value(db, held) == 0, "the server ends it", WITHIN_SECONDS)
        with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
            frozen.execute("SELECT 1")


@pytest.mark.parametrize("step", ["locked", "truncated", "committed", "switched"])
def test_a_crash_of_the_server_at_any_step_of_a_rotation_loses_nothing(
    own_server: PostgresServer, tmp_path: Path, step: str
) -> None:
    for database in clone(own_server):
        with psycopg.connect(database, autocommit=True) as db:
            make_items(db)
        with following(database, tmp_path / "data") as daemon:
            daemon.start()
            daemon.stop()
            with psycopg.connect(database, autocommit=True) as db:
                fill(db, 1000)
                position, freed_before = snapshot(db), freed(db)
            rotating = psycopg.connect(database)
            if step == "switched":
                rotating.execute("SELECT setval('syncd.outbox_slot', 1)")
            else:
                rotating.execute("SELECT syncd.rotate_outbox(1, 1)")  # switched; no slot is freed
                rotating.commit()
                if step != "locked":
                    rotating.execute("DELETE FROM syncd.consumers")  # so that no slot is needed
                rotating.execute("SELECT syncd.rotate_outbox(1, 1)")
                if step == "committed":
                    rotating.commit()
            own_server.crash()
            rotating.close()
            own_server.start()
            with psycopg.connect(database, autocommit=True) as db:
                rows = value(db, "SELECT count(*) FROM syncd.outbox")
                assert (rows == 0) == (step == "committed")
                assert (freed(db) == freed_before) == (step != "committed")
                assert not position.lacks(freed(db))
                daemon.start()
                with daemon.client() as client:
                    assert_in_step(client, db)
                    fill(db, 500, 800)
                    assert_in_step(client, db)
