"""Freeing the outbox: nothing is missed, nobody waits, and it stays small.

The slots' thresholds are made small in these processes, so that a few thousand rows go through many rotations.
"""

from __future__ import annotations

import itertools
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest

from syncd.errors import NotReady, ServiceUnavailable
from syncd.postgres.connection import open_pass_connection
from syncd.postgres.outbox import Cursor, read_changes
from syncd.rpc.client import Client
from syncd.statements import statement
from syncd.sync.passes import Pass
from syncd.sync.progress import NOWHERE
from syncd.types import Position, Snapshot
from tests.conftest import clone
from tests.daemon import Daemon
from tests.servers import PostgresServer

SOURCE = 7
A_MOMENT = "100ms"
A_MOMENT_UNDER_LOAD = "300ms"
WITHIN_SECONDS = 30.0
UPSERT = "INSERT INTO items VALUES (%s, ARRAY[%s, 1]) ON CONFLICT (id) DO UPDATE SET v = excluded.v"


def rotate(db: psycopg.Connection, *, rows: int = 1) -> tuple[int, bool, str | None]:
    """One rotation that switches after so many rows: slots freed, whether one is to be tried later, who was told to rebuild."""
    try:
        row = db.execute("SELECT freed, later, marked FROM syncd.rotate_outbox(%s, 3600)", [rows]).fetchone()
    except (
        psycopg.errors.LockNotAvailable
    ):  # somebody, perhaps a service that was stopped just then, has a consumer's row
        return 0, True, None
    assert row is not None
    return row[0], row[1], row[2]


def write(db: psycopg.Connection, *keys: int, slot: int | None = None) -> None:
    """As a trigger does, into the current slot or the one given."""
    for key in keys:
        db.execute(
            "INSERT INTO syncd.outbox (slot, source, op, key) "
            "SELECT coalesce(%s, s.last_value), 7, 'k', %s FROM syncd.outbox_slot AS s",
            [slot, key],
        )


def value(db: psycopg.Connection, query: str) -> Any:
    row = db.execute(query).fetchone()
    assert row is not None
    return row[0]


def snapshot(db: psycopg.Connection) -> Snapshot:
    return Snapshot.parse(value(db, "SELECT pg_current_snapshot()::text"))


def freed(db: psycopg.Connection) -> Snapshot | None:
    text = value(db, "SELECT freed::text FROM syncd.outbox_limit")
    return None if text is None else Snapshot.parse(text)


def needs(db: psycopg.Connection, consumer: str, needed: Snapshot) -> None:
    """A consumer of which the newest checkpoints stand at a snapshot."""
    db.execute(
        "INSERT INTO syncd.consumers (name, run_id, needs) VALUES (%(name)s, gen_random_uuid(), %(needed)s::pg_snapshot) "
        "ON CONFLICT (name) DO UPDATE SET needs = excluded.needs",
        {"name": consumer, "needed": str(needed)},
    )


def read(db: psycopg.Connection, since: Snapshot) -> tuple[list[int], Snapshot]:
    """The keys that a pass finds, and where it ends."""
    with db.transaction():
        db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        now = snapshot(db)
        changes = read_changes(db, Cursor(Position(since, 0)), [SOURCE], now)
    return sorted(map(int, changes.keys.get(SOURCE, []))), now


def until(happened: Callable[[], bool], what: str, seconds: float = WITHIN_SECONDS) -> None:
    """Ask until something is so."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


# The function, by itself


def test_only_what_every_consumer_has_seen_is_freed(any_db: psycopg.Connection) -> None:
    db = any_db
    start = snapshot(db)
    needs(db, "fast", start)
    needs(db, "slow", start)
    write(db, 1, 2)
    assert rotate(db) == (0, False, None)
    needs(db, "fast", snapshot(db))
    write(db, 3)
    assert rotate(db) == (0, False, None)
    assert read(db, start)[0] == [1, 2, 3]
    needs(db, "slow", snapshot(db))
    assert rotate(db)[0] == 1, "fast still needs the last row"
    assert read(db, start)[0] == [3]
    needs(db, "fast", snapshot(db))
    rotate(db)
    rotate(db)
    assert read(db, start)[0] == []
    assert value(db, "SELECT syncd.outbox_rows()") == 0


def test_a_row_may_land_in_any_slot_at_any_time(db: psycopg.Connection, database: str) -> None:
    """Its writer read the slot's number, was stopped, and went on after rotations."""
    position = snapshot(db)
    needs(db, "it", position)
    keys = iter(range(1, 1000))
    expected: list[int] = []
    found: list[int] = []
    slots = random.Random(1)
    with psycopg.connect(database) as late:
        for round_number in range(40):
            some = [next(keys), next(keys)]
            write(db, some[0])
            write(late, some[1], slot=slots.randrange(3))
            if round_number % 3:
                late.commit()
                expected += some
            else:
                late.rollback()
                expected.append(some[0])
            rotate(db)
            if round_number % 2:
                seen, position = read(db, position)
                found += seen
                needs(db, "it", position)
        found += read(db, position)[0]
    assert sorted(found) == expected
    assert len(found) == len(set(found))


def test_a_slot_that_a_writer_has_open_is_freed_later_and_others_do_not_wait(
    db: psycopg.Connection, database: str
) -> None:
    start = snapshot(db)
    with psycopg.connect(database) as writer:
        write(writer, 1)
        write(db, 2)
        slots = set()
        for key in range(100, 130):
            freed_slots, later, _ = rotate(db)
            assert later, "the slot is open"
            slots.add(value(db, "SELECT last_value FROM syncd.outbox_slot"))
            db.execute(f"SET lock_timeout = '{A_MOMENT}'")
            write(db, key)
            if key > 105:
                assert freed_slots == 1, "the other slots go on being used and freed"
        assert slots == {1, 2}
        writer.commit()
    needs(db, "it", start)
    assert rotate(db)[:2] == (0, False)
    found, now = read(db, start)
    assert set(found) >= {1, 2}, "it was open all the time"
    needs(db, "it", now)
    rotate(db)
    rotate(db)
    assert read(db, start)[0] == []


def test_a_transaction_that_stays_open_elsewhere_holds_nothing_back(db: psycopg.Connection, database: str) -> None:
    with psycopg.connect(database) as idle:
        idle.execute("SELECT pg_current_xact_id()")
        for key in range(1, 20):
            write(db, key)
            needs(db, "it", snapshot(db))
            rotate(db)
        rotate(db)
        assert value(db, "SELECT count(*) FROM syncd.outbox") <= 1
        assert not snapshot(db).lacks(freed(db)), "who stands here has seen all that was freed"
        assert Snapshot(1, 1, frozenset()).lacks(freed(db))


def test_a_transaction_of_which_rows_may_come_holds_back_what_it_wrote(db: psycopg.Connection, database: str) -> None:
    with psycopg.connect(database) as early:
        early.execute("SELECT pg_current_xact_id()")
        write(db, 1)
        start = snapshot(db)
        needs(db, "it", start)
        write(early, 2)
        early.commit()
        rotate(db)
        rotate(db)
        assert read(db, start)[0] == [2], "its id is lower than what the checkpoint has seen"


def test_a_reader_of_the_outbox_delays_rotation_and_nobody_else(db: psycopg.Connection, database: str) -> None:
    """As pg_dump does, for hours. Writers of any slot go on, the one to be freed too."""
    write(db, 1)
    tried: list[tuple[int, bool, str | None]] = []
    stopped = threading.Event()

    def rotate_all_the_time() -> None:
        with psycopg.connect(database, autocommit=True) as other:
            while not stopped.is_set():
                tried.append(rotate(other))

    with psycopg.connect(database) as dump, ThreadPoolExecutor(1) as threads:
        dump.execute("LOCK TABLE syncd.outbox IN ACCESS SHARE MODE")
        rotating = threads.submit(rotate_all_the_time)
        try:
            db.execute("SET lock_timeout = '50ms'")
            for key in itertools.count(2):
                write(db, key, slot=key % 3)
                if key > 300 and len(tried) > 10:
                    break
        finally:
            stopped.set()
        rotating.result(timeout=30)
    assert sum(freed_slots for freed_slots, _, _ in tried) == 0
    for _ in range(2):
        rotate(db)
    db.execute("INSERT INTO syncd.outbox (slot, source, op, key) SELECT last_value, 7, 'k', 0 FROM syncd.outbox_slot")
    for _ in range(2):
        rotate(db)
    assert value(db, "SELECT count(*) FROM syncd.outbox") == 0


@pytest.mark.parametrize("partitioned", [False, True], ids=["plain", "partitioned"])
def test_a_writer_has_only_the_slot_open_that_it_writes_to(
    db: psycopg.Connection, database: str, partitioned: bool
) -> None:
    if partitioned:
        db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[]) PARTITION BY RANGE (id)")
        db.execute("CREATE TABLE leaf PARTITION OF items FOR VALUES FROM (0) TO (100)")
        db.execute("SELECT syncd.attach('items', vector => 'v')")
    else:
        make_items(db)
    for slot in range(3):
        db.execute("SELECT setval('syncd.outbox_slot', %s)", [slot])
        with psycopg.connect(database) as writer:
            for change in (
                "INSERT INTO items VALUES (1, '{1,1}')",
                "UPDATE items SET v = '{2,1}'",
                "DELETE FROM items",
                "TRUNCATE leaf" if partitioned else "TRUNCATE items",
            ):
                writer.execute(change.encode())
            locked = writer.execute(
                "SELECT relation::regclass::text FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'relation' "
                "AND relation IN ('syncd.outbox_0'::regclass, 'syncd.outbox_1'::regclass, "
                "'syncd.outbox_2'::regclass) GROUP BY 1"
            ).fetchall()
            assert locked == [(f"syncd.outbox_{slot}",)]
            writer.rollback()


def test_a_pass_under_way_keeps_the_slots_that_its_snapshot_sees(db: psycopg.Connection, database: str) -> None:
    """A table that is truncated looks empty to every snapshot, also to an older one."""
    write(db, 1)
    connection = open_pass_connection(database, "it")
    this = Pass(connection, "it", "", NOWHERE, pooled=False)
    this.begin([])
    assert rotate(db)[:2] == (0, True)
    this.rollback()
    connection.close()
    assert rotate(db)[0] == 1


def test_the_rotation_refuses_to_work_on_an_old_snapshot(db: psycopg.Connection) -> None:
    db.execute("SET default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.errors.InvalidTransactionState):
        rotate(db)


def test_over_the_cap_the_slowest_is_told_to_rebuild_and_the_others_are_kept(any_db: psycopg.Connection) -> None:
    db = any_db
    db.execute("UPDATE syncd.outbox_limit SET max_rows = 100")
    start = snapshot(db)
    needs(db, "dead", start)
    write(db, *range(1, 300))
    middle = snapshot(db)
    needs(db, "alive", middle)
    db.execute(
        "INSERT INTO syncd.checkpoints (nonce, consumer, snapshot) VALUES (gen_random_uuid(), 'dead', pg_current_snapshot())"
    )
    marked = [rotate(db)[2]]
    write(db, 1000)
    marked += [rotate(db)[2] for _ in range(3)]
    rows = db.execute("SELECT consumer, state FROM syncd.status ORDER BY consumer").fetchall()
    assert rows == [("alive", "catching_up"), ("dead", "must_rebuild")], marked
    assert value(db, "SELECT count(*) FROM syncd.checkpoints") == 0
    assert read(db, middle)[0] == [1000], "what alive needs"
    assert value(db, "SELECT syncd.outbox_rows()") <= 100
    assert start.lacks(freed(db))
    assert not middle.lacks(freed(db))


def test_over_the_cap_with_one_consumer_what_it_has_seen_meanwhile_is_not_lost(any_db: psycopg.Connection) -> None:
    db = any_db
    db.execute("UPDATE syncd.outbox_limit SET max_rows = 100")
    start = snapshot(db)
    needs(db, "it", start)
    write(db, *range(1, 300))
    pass_snapshot = snapshot(db)
    rotate(db)
    rotate(db)
    assert value(db, "SELECT must_rebuild FROM syncd.consumers")
    assert value(db, "SELECT count(*) FROM syncd.outbox") == 0
    assert start.lacks(freed(db))
    assert not pass_snapshot.lacks(freed(db))


def test_over_the_cap_one_consumer_after_the_other_is_told(db: psycopg.Connection) -> None:
    """The live ones are given the time to save a checkpoint."""
    db.execute("UPDATE syncd.outbox_limit SET max_rows = 100")
    needs(db, "dead", snapshot(db))
    write(db, 1)
    needs(db, "alive", snapshot(db))
    write(db, *range(2, 300))
    assert [rotate(db)[2] for _ in range(5)] == ["dead", None, None, None, None]
    db.execute("UPDATE syncd.outbox_limit SET marked_at = now() - interval '1 minute'")
    assert rotate(db)[2] == "alive"
    assert value(db, "SELECT count(*) FROM syncd.outbox") == 0


def test_a_role_that_does_not_own_the_schema_may_rotate(db: psycopg.Connection) -> None:
    role = f"{value(db, 'SELECT current_database()')}_server"
    db.execute(f"CREATE ROLE {role}")
    try:
        db.execute(f"GRANT USAGE ON SCHEMA syncd TO {role}")
        write(db, 1)
        db.execute(f"SET ROLE {role}")
        assert rotate(db)[0] == 1
        assert value(db, "SELECT syncd.outbox_rows()") == 0
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            db.execute("TRUNCATE syncd.outbox")
    finally:
        db.execute("RESET ROLE")
        db.execute(f"DROP OWNED BY {role}")
        db.execute(f"DROP ROLE {role}")


def test_a_snapshot_that_sees_what_either_sees(scratch: psycopg.Connection) -> None:
    chosen = random.Random(5)

    def some_snapshot() -> Snapshot:
        xmax = chosen.randrange(10, 30)
        hidden = frozenset(xid for xid in range(5, xmax) if chosen.random() < 0.3)
        return Snapshot(min(hidden, default=xmax), xmax, hidden)

    for _ in range(100):
        a, b = some_snapshot(), some_snapshot()
        row = scratch.execute("SELECT syncd.seen_by_either(%s, %s)::text", [str(a), str(b)]).fetchone()
        assert row is not None
        either = Snapshot.parse(row[0])
        for xid in range(1, 40):
            assert either.sees(xid) == (a.sees(xid) or b.sees(xid)), (a, b, either, xid)


# With a running syncd


def make_items(db: psycopg.Connection) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items VALUES (0, '{0,1}')")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")


@pytest.fixture
def items(db: psycopg.Connection) -> psycopg.Connection:
    make_items(db)
    return db


@contextmanager
def following(conninfo: str, data_dir: Path, **settings: object) -> Iterator[Daemon]:
    """A syncd, not started, that is gone afterwards."""
    daemon = Daemon(conninfo, data_dir, **{"checkpoint_seconds": 0.2} | settings).with_small_slots()
    try:
        yield daemon
    finally:
        if daemon.process is not None:
            daemon.kill()


def assert_in_step(client: Client, db: psycopg.Connection, seconds: float = WITHIN_SECONDS) -> None:
    """The index holds the table's rows, once it includes all that was committed before this call."""
    with db.transaction():
        token = value(db, "SELECT syncd.token()")
    client.wait(token, timeout_ms=int(seconds * 1000))
    expected: dict[object, float] = dict(db.execute("SELECT id, v[1] FROM items").fetchall())
    keys = list(client.keys("items"))
    assert len(keys) == len(expected)
    assert set(keys) == set(expected)
    for start in range(0, len(keys), 1000):
        for row in client.get("items", keys[start : start + 1000], vectors=True):
            assert row.vector is not None
            assert row.vector[0] == expected[row.key], row.key


def outbox_rows(db: psycopg.Connection) -> int:
    return int(value(db, "SELECT syncd.outbox_rows()"))


class Writers:
    """Threads that write until they are stopped, and fail where a lock keeps them waiting."""

    def __init__(self, conninfo: str, number: int) -> None:
        self.conninfo = conninfo
        self.stopped = threading.Event()
        self.threads = ThreadPoolExecutor(number)
        self.running = [self.threads.submit(self.write, seed) for seed in range(number)]

    def write(self, seed: int) -> int:
        chosen, statements = random.Random(seed), 0
        with psycopg.connect(self.conninfo, autocommit=True) as db:
            db.execute(f"SET lock_timeout = '{A_MOMENT_UNDER_LOAD}'")
            while not self.stopped.is_set():
                with db.transaction(force_rollback=chosen.random() < 0.1):
                    for _ in range(chosen.randint(1, 3)):
                        key = seed * 100_000 + chosen.randrange(1, 2000)  # no two writers share a row
                        if chosen.random() < 0.2:
                            db.execute("DELETE FROM items WHERE id = %s", [key])
                        else:
                            db.execute(UPSERT, [key, chosen.randrange(1000)])
                        statements += 1
        return statements

    def stop(self) -> int:
        """End them; the number of statements. Raises what stopped one of them before."""
        self.stopped.set()
        done = sum(future.result(timeout=30) for future in self.running)
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
        rotations, slot = 0, 0
        try:
            for seconds in (1.5, 0.4, 1.2, 0.8):
                end = time.monotonic() + seconds
                while time.monotonic() < end:
                    now = value(items, "SELECT last_value FROM syncd.outbox_slot")
                    rotations, slot = rotations + (now != slot), now
                    time.sleep(0.005)
                daemon.kill()
                daemon.start()
        finally:
            statements = writers.stop()
        with daemon.client() as client:
            assert_in_step(client, items)
        left = outbox_rows(items)
        until(lambda: outbox_rows(items) == 0, "the outbox is emptied when nobody writes")
        daemon.stop()
    print(f"{statements} statements, {rotations} rotations, {left} rows left in the outbox at the end")
    assert rotations >= 5
    assert value(items, "SELECT last_value FROM syncd.outbox_id") > 3 * left, "the outbox shrank meanwhile"
    # Writers of one table extend its file in turn, syncd or not; a lock on a whole table is what only the rotation could keep from them.
    waits = re.findall(r".*still waiting for \w+ on relation .*", server.log.read_text()[logged:])
    assert not waits, waits[:3]


def test_a_writer_open_through_many_rotations_arrives(database: str, items: psycopg.Connection, tmp_path: Path) -> None:
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
            until(lambda: outbox_rows(items) > 1000, "the one that is away needs them")
        finally:
            writers.stop()
        with first.client() as client:
            assert_in_step(client, items)
        second.start()
        assert "reconciling" not in second.log.read_text()
        with second.client() as client:
            assert_in_step(client, items)
        until(lambda: outbox_rows(items) == 0, "nobody needs them any more")
        writers = Writers(database, 4)
        try:
            before = value(items, "SELECT last_value FROM syncd.outbox_id")
            until(lambda: value(items, "SELECT last_value FROM syncd.outbox_id") > before + 5000, "writers write")
        finally:
            writers.stop()
        for daemon in (first, second):
            with daemon.client() as client:
                assert_in_step(client, items)
            assert "must_rebuild" not in daemon.log.read_text()


def fill(db: psycopg.Connection, rows: int, start: int = 1) -> None:
    """Change many rows, in some transactions."""
    for first in range(start, start + rows, 500):
        db.execute(
            "INSERT INTO items SELECT i, ARRAY[i, 1] FROM generate_series(%s::int, %s::int) AS i "
            "ON CONFLICT (id) DO UPDATE SET v = excluded.v",
            [first, first + 499],
        )


def test_over_the_cap_one_that_is_away_must_rebuild_and_is_right_again(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    with (
        following(database, tmp_path / "a", consumer="a", outbox_max_rows=2000) as alive,
        following(database, tmp_path / "b", consumer="b") as away,
    ):
        away.start()
        away.stop()
        items.execute("DELETE FROM items WHERE id = 0")
        alive.start()

        def away_state() -> Any:
            return value(items, "SELECT min(state) FROM syncd.status WHERE consumer = 'b'")

        for number in range(100):
            fill(items, 500, 1 + 500 * number)
            if away_state() == "must_rebuild":
                break
        until(lambda: away_state() == "must_rebuild", "it is said of the one that is away")
        until(lambda: outbox_rows(items) < 2000, "the outbox is freed for the other")
        with alive.client() as client:
            assert_in_step(client, items)
        with psycopg.connect(database) as holder:
            holder.execute("LOCK TABLE items IN ACCESS EXCLUSIVE MODE")
            away.spawn()
            assert seen_state(away) == "must_rebuild", "until it has"
        assert away.process is not None
        away.wait_for_line(away.process)
        with away.client() as client:
            assert_in_step(client, items)
            until(lambda: client.status().state == "ready", "it has rebuilt")
            until(lambda: away_state() == "ready", "and says so in SQL")
        assert not value(items, "SELECT bool_or(must_rebuild) FROM syncd.consumers")


def seen_state(daemon: Daemon) -> str:
    """What a starting service says of its dataset, once it knows it."""
    found: list[str] = []

    def known() -> bool:
        try:
            with daemon.client() as client:
                found[:] = [each.state for each in client.datasets() if each.dataset == "default/items"]
        except (ServiceUnavailable, NotReady, ConnectionError):
            return False
        return bool(found)

    until(known, "the dataset is known")
    return found[0]


def test_where_nothing_ran_the_next_to_start_applies_the_cap(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    with following(database, tmp_path / "data", outbox_max_rows=1000) as daemon:
        fill(items, 3000)
        daemon.start()
        daemon.stop()
        items.execute("DELETE FROM items WHERE id % 3 = 0")
        fill(items, 5000, 2000)
        assert outbox_rows(items) > 5000
        daemon.start()
        assert "outbox_full" in daemon.log.read_text()
        assert outbox_rows(items) < 1000
        with daemon.client() as client:
            assert_in_step(client, items)
            assert client.status().state == "ready"


@pytest.mark.parametrize("begin", ["begin_report", "begin_durable", "begin_start", "lock_identity", "local_settings"])
def test_a_service_that_is_frozen_in_a_transaction_keeps_no_lock_for_long(
    begin: str, database: str, db: psycopg.Connection
) -> None:
    with closing(psycopg.connect(database, autocommit=True)) as frozen:
        if not begin.startswith("begin"):  # its transaction is psycopg's
            frozen.execute("BEGIN")
        frozen.execute(
            statement("check" if begin == "local_settings" else "consumer", begin).replace(
                "idle_in_transaction_session_timeout = '30s'", "idle_in_transaction_session_timeout = '300ms'"
            )
        )
        frozen.execute("LOCK TABLE syncd.consumers IN ACCESS EXCLUSIVE MODE")
        held = f"SELECT count(*) FROM pg_locks WHERE pid = {frozen.info.backend_pid} AND mode = 'AccessExclusiveLock'"
        assert value(db, held) > 0
        until(lambda: value(db, held) == 0, "the server ends it")


def test_a_live_consumer_that_falls_too_far_behind_rebuilds(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    with following(database, tmp_path / "data", outbox_max_rows=2000) as daemon:
        daemon.start()
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            fill(items, 4000)
            items.execute("DELETE FROM items WHERE id % 3 = 0")
            until(
                lambda: rotate(items)[2] == "default", "it holds the outbox back", seconds=60
            )  # or it was stopped in a pass: for as long as that may be idle
            until(lambda: rotate(items)[0] == 0 and outbox_rows(items) < 2000, "which is freed without it")
            fill(items, 500, 5000)
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        with daemon.client() as client:
            # Where it was stopped in a pass the server has cut its connection, and it compares every row for that reason.
            until(
                lambda: any(word in daemon.log.read_text() for word in ("must_rebuild", "reconciling")),
                "it notices",
                seconds=60,
            )
            assert_in_step(client, items)
            until(lambda: client.status().state == "ready", "it has rebuilt")
            until(
                lambda: not value(items, "SELECT bool_or(must_rebuild) FROM syncd.consumers"),
                "the outbox keeps what it needs again",
            )
            fill(items, 1000, 100)
            assert_in_step(client, items)
        daemon.stop()
        before = len(daemon.log.read_text())
        daemon.start()
        assert "reconciling" not in daemon.log.read_text()[before:]


def test_a_consumer_whose_row_was_deleted_is_right_when_it_comes_back(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    with following(database, tmp_path / "data") as daemon:
        daemon.start()
        daemon.stop()
        fill(items, 500)
        items.execute("DELETE FROM items WHERE id < 100")
        items.execute("DELETE FROM syncd.consumers")
        rotate(items)
        rotate(items)
        assert outbox_rows(items) == 0
        daemon.start()
        with daemon.client() as client:
            assert_in_step(client, items)


def test_what_another_cluster_freed_is_forgotten_in_a_restored_copy(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    fill(items, 500)
    with following(database, tmp_path / "data") as daemon:
        daemon.start()
        daemon.stop()
        items.execute("UPDATE syncd.meta SET xid = '5000000000'")  # as the row of a dump
        items.execute("UPDATE syncd.outbox_limit SET freed = '5000000000:5000000000:'")
        items.execute("UPDATE syncd.consumers SET needs = '5000000000:5000000000:'")
        daemon.start()
        with daemon.client() as client:
            assert_in_step(client, items)
            fill(items, 500, 300)
            assert_in_step(client, items)
        until(lambda: outbox_rows(items) == 0, "the outbox is freed")
        daemon.stop()
        assert "must_rebuild" not in daemon.log.read_text()
        assert freed(items) != Snapshot(5_000_000_000, 5_000_000_000, frozenset())


def test_an_older_data_directory_reconciles_after_a_rotation(
    database: str, items: psycopg.Connection, tmp_path: Path
) -> None:
    fill(items, 500)
    with following(database, tmp_path / "data", checkpoint_seconds=3600) as daemon:
        daemon.start()
        daemon.stop()
        shutil.copytree(tmp_path / "data", tmp_path / "older")
        daemon.start()
        items.execute("DELETE FROM items WHERE id < 100")
        with daemon.client() as client:
            assert_in_step(client, items)
            for _ in range(2):  # both that are kept are newer now, and the copy's nonce is still known
                client.checkpoint()
        until(lambda: outbox_rows(items) == 0, "the outbox is freed")
        daemon.kill()
        shutil.rmtree(tmp_path / "data")
        shutil.copytree(tmp_path / "older", tmp_path / "data")
        before = len(daemon.log.read_text())
        daemon.start()
        log = daemon.log.read_text()[before:]
        assert "the outbox no longer holds the changes" in log
        with daemon.client() as client:
            assert_in_step(client, items)


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
                rotating.execute("SELECT syncd.rotate_outbox(1, 1)")  # switched; nothing is freed
                rotating.commit()
                if step != "locked":
                    rotating.execute("DELETE FROM syncd.consumers")  # so that nobody needs anything
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


# One large transaction


def peak_bytes(daemon: Daemon) -> int:
    """The most memory that the process ever had."""
    assert daemon.process is not None
    lines = Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def count(client: Client) -> int:
    return sum(each.count for each in client.datasets() if each.dataset == "default/items")


@pytest.mark.parametrize("rows", [100_000, pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_one_large_transaction_goes_on_where_a_kill_left_it(
    server: PostgresServer, database: str, items: psycopg.Connection, tmp_path: Path, rows: int
) -> None:
    with following(database, tmp_path / "data", checkpoint_seconds=3600) as daemon:
        daemon.with_constant("syncd.postgres.outbox.PAGE_ROWS", 1000)
        daemon.start()
        items.execute("INSERT INTO items SELECT i, ARRAY[i, 1] FROM generate_series(1, %s::int) AS i", [rows])
        with daemon.client() as client:
            until(lambda: count(client) > rows / 4, "it has read some", seconds=300)
            client.checkpoint()
            waiting = client.status().lag_rows
            assert waiting is not None
            assert 0 < waiting < rows, "in its middle"
        daemon.kill()
        first = value(
            items, "SELECT min(id) FROM syncd.outbox WHERE xid = (SELECT max(xid) FROM syncd.outbox WHERE op = 'k')"
        )
        items.execute(f"ALTER DATABASE {value(items, 'SELECT current_database()')} SET log_statement = 'all'")
        logged = server.log.stat().st_size
        daemon.start()
        pages = re.findall(r"SELECT o\.xid::text::bigint.*?LIMIT", server.log.read_text()[logged:], re.DOTALL)
        after = re.search(r"\(o\.xid, o\.id\) > \('\d+'::xid8, (\d+)\)", pages[0])
        assert after is not None, "it begins where the checkpoint was"
        assert int(after[1]) > first + rows / 5
        with daemon.client() as client:
            assert_in_step(client, items)
        daemon.stop()


@pytest.mark.parametrize("rows", [100_000, pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_one_large_transaction_takes_no_more_memory_than_many_small_ones(
    server: PostgresServer, tmp_path: Path, rows: int
) -> None:
    peaks = []
    for transactions in (rows // 1000, 1):
        for database in clone(server):
            with psycopg.connect(database, autocommit=True) as db:
                make_items(db)
                with following(database, tmp_path / f"data{transactions}", checkpoint_seconds=3600) as daemon:
                    daemon.start()
                    each = rows // transactions
                    for first in range(1, rows, each):
                        db.execute(
                            "INSERT INTO items SELECT i, ARRAY[i, 1] FROM generate_series(%s::int, %s::int) AS i",
                            [first, first + each - 1],
                        )
                    with daemon.client() as client:
                        assert_in_step(client, db, seconds=300)
                    peaks.append(peak_bytes(daemon))
    print(f"many small transactions: {peaks[0] >> 20} MiB at most, one large: {peaks[1] >> 20} MiB")
    assert peaks[1] < peaks[0] * 1.2
