"""The SQL function that frees the outbox: rows that a consumer needs stay, and no session waits."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from syncd.postgres.connection import open_pass_connection
from syncd.postgres.outbox import PAGE_ROWS, Asked, Cursor, read_changes
from syncd.sync.consumer.passes import Pass
from syncd.sync.consumer.progress import NOWHERE
from syncd.types import Position, Snapshot
from tests.faults.rotation import A_MOMENT, freed, make_items, rotate, snapshot, value

SOURCE = 7


def write(db: psycopg.Connection, *keys: int, slot: int | None = None) -> None:
    """Write outbox rows as a trigger does, into the current slot or the given one."""
    for key in keys:
        db.execute(
            "INSERT INTO syncd.outbox (slot, source, op, key) "
            "SELECT coalesce(%s, s.last_value), 7, 'k', %s FROM syncd.outbox_slot AS s",
            [slot, key],
        )


def needs(db: psycopg.Connection, consumer: str, needed: Snapshot) -> None:
    """Add a consumer whose newest checkpoints stand at a snapshot, or move it there."""
    db.execute(
        "INSERT INTO syncd.consumers (name, run_id, needs) "
        "VALUES (%(name)s, gen_random_uuid(), %(needed)s::pg_snapshot) "
        "ON CONFLICT (name) DO UPDATE SET needs = excluded.needs",
        {"name": consumer, "needed": str(needed)},
    )


def read(db: psycopg.Connection, since: Snapshot) -> tuple[list[int], Snapshot]:
    """The keys that a pass finds, and its snapshot."""
    with db.transaction():
        db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        now = snapshot(db)
        changes = read_changes(db, Asked(Cursor(Position(since, 0)), [SOURCE], PAGE_ROWS), now)
    return sorted(map(int, changes.keys.get(SOURCE, []))), now


def test_only_rows_that_every_consumer_has_seen_are_freed(any_db: psycopg.Connection) -> None:
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
    """The writer read the slot's number, was frozen, and went on after rotations."""
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
                assert freed_slots == 1, "the other slots are used and freed"
        assert slots == {1, 2}
        writer.commit()
    needs(db, "it", start)
    assert rotate(db)[:2] == (0, False)
    found, now = read(db, start)
    assert set(found) >= {1, 2}, "its slot was open all the time"
    needs(db, "it", now)
    rotate(db)
    rotate(db)
    assert read(db, start)[0] == []


def test_a_transaction_that_stays_open_elsewhere_holds_nothing_back(
    db: psycopg.Connection, database: str
) -> None:
    with psycopg.connect(database) as idle:
        idle.execute("SELECT pg_current_xact_id()")
        for key in range(1, 20):
            write(db, key)
            needs(db, "it", snapshot(db))
            rotate(db)
        rotate(db)
        assert value(db, "SELECT count(*) FROM syncd.outbox") <= 1
        assert not snapshot(db).lacks(freed(db)), (
            "a consumer at this snapshot has seen every freed change"
        )
        assert Snapshot(1, 1, frozenset()).lacks(freed(db))


def test_an_open_transaction_that_has_written_holds_its_rows_back(
    db: psycopg.Connection, database: str
) -> None:
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


def test_a_reader_of_the_outbox_delays_rotation_and_no_writer(
    db: psycopg.Connection, database: str
) -> None:
    """pg_dump reads for hours. Writers of any slot go on, also of the slot to be freed."""
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
    db.execute(
        "INSERT INTO syncd.outbox (slot, source, op, key) "
        "SELECT last_value, 7, 'k', 0 FROM syncd.outbox_slot"
    )
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
                "SELECT relation::regclass::text FROM pg_locks "
                "WHERE pid = pg_backend_pid() AND locktype = 'relation' "
                "AND relation IN ('syncd.outbox_0'::regclass, 'syncd.outbox_1'::regclass, "
                "'syncd.outbox_2'::regclass) GROUP BY 1"
            ).fetchall()
            assert locked == [(f"syncd.outbox_{slot}",)]
            writer.rollback()


@pytest.mark.parametrize("pooled", [True, False], ids=["one by one", "in a batch"])
def test_a_pass_under_way_keeps_the_slots_that_its_snapshot_sees(
    db: psycopg.Connection, database: str, pooled: bool
) -> None:
    """A truncated table is empty in every snapshot, also in an older one."""
    write(db, 1)
    connection = open_pass_connection(database, "it")
    this = Pass(connection, "it", "", "", NOWHERE, pooled=pooled)
    this.begin([], [], [])
    assert rotate(db)[:2] == (0, True)
    this.transaction.rollback()
    connection.close()
    assert rotate(db)[0] == 1


def test_the_rotation_refuses_to_work_on_an_old_snapshot(db: psycopg.Connection) -> None:
    db.execute("SET default_transaction_isolation = 'repeatable read'")
    with pytest.raises(psycopg.errors.InvalidTransactionState):
        rotate(db)


def test_over_the_cap_the_slowest_is_told_to_rebuild_and_the_others_are_kept(
    any_db: psycopg.Connection,
) -> None:
    db = any_db
    db.execute("UPDATE syncd.outbox_limit SET max_rows = 100")
    start = snapshot(db)
    needs(db, "dead", start)
    write(db, *range(1, 300))
    middle = snapshot(db)
    needs(db, "alive", middle)
    db.execute(
        "INSERT INTO syncd.checkpoints (nonce, consumer, snapshot) "
        "VALUES (gen_random_uuid(), 'dead', pg_current_snapshot())"
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


def test_over_the_cap_one_consumer_does_not_lose_changes_that_it_has_seen_meanwhile(
    any_db: psycopg.Connection,
) -> None:
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
    """The live consumers get the time to save a checkpoint."""
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


def test_a_snapshot_that_sees_all_transactions_of_two(scratch: psycopg.Connection) -> None:
    chosen = random.Random(5)

    def some_snapshot() -> Snapshot:
        xmax = chosen.randrange(10, 30)
        hidden = frozenset(xid for xid in range(5, xmax) if chosen.random() < 0.3)
        return Snapshot(min(hidden, default=xmax), xmax, hidden)

    for _ in range(100):
        a, b = some_snapshot(), some_snapshot()
        row = scratch.execute(
            "SELECT syncd.seen_by_either(%s, %s)::text", [str(a), str(b)]
        ).fetchone()
        assert row is not None
        either = Snapshot.parse(row[0])
        for xid in range(1, 40):
            assert either.sees(xid) == (a.sees(xid) or b.sees(xid)), (a, b, either, xid)
