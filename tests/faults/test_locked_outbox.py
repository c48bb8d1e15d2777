"""Another session locks the outbox: a write does not fail, wait or lose its change.

The service goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from tests.daemon import Daemon
from tests.faults.altered import Followed, writers
from tests.faults.following import logged, until
from tests.faults.rotation import rotate, value
from tests.integration.captured import keys, outbox

NO_LONGER_THAN = "10s"
"""Time-out of a statement in these tests: a statement that waits for the lock would reach it.

A thousand of the waits that a writer may make, 20 ms each, take twice as long.
"""
SHORT = "statement_timeout = '50ms'"
ATTEMPTS = 50
"""On a busy machine a statement takes 50 ms now and then; if it waited for the lock, each would."""
SETTINGS: tuple[LiteralString, ...] = ("lock_timeout = 0", "lock_timeout = '1ms'", SHORT)
DOUBTS = "SELECT last_value FROM syncd.doubts"
LOCKS: dict[str, LiteralString] = {
    "ACCESS EXCLUSIVE": "LOCK TABLE syncd.outbox IN ACCESS EXCLUSIVE MODE",  # VACUUM FULL
    "SHARE": "LOCK TABLE syncd.outbox IN SHARE MODE",  # CREATE INDEX
    "one slot": "LOCK TABLE syncd.outbox_0 IN SHARE MODE",
    "REINDEX": "REINDEX TABLE syncd.outbox_0",
    "REINDEX INDEX": "REINDEX INDEX syncd.outbox_0_xid_id_idx",
}
WRITES: tuple[LiteralString, ...] = (
    "INSERT INTO items VALUES (2, '{2}'), (3, '{3}')",
    "UPDATE items SET id = 4 WHERE id = 3",
    "DELETE FROM items WHERE id = 2",
    "TRUNCATE items",
)


@contextmanager
def locked(conninfo: str, lock: LiteralString) -> Iterator[psycopg.Connection]:
    """Another session that holds a lock on the outbox until the block ends."""
    with psycopg.connect(conninfo) as other:
        other.execute(lock)
        yield other
        other.rollback()


@pytest.fixture(params=["statement", "row", "partitioned"])
def items(any_db: psycopg.Connection, request: pytest.FixtureRequest) -> psycopg.Connection:
    """An attached table of one row in each form, and an empty outbox."""
    partitioned = request.param == "partitioned"
    any_db.execute(
        sql.SQL("CREATE TABLE items (id int PRIMARY KEY, embedding real[]) {}").format(
            sql.SQL("PARTITION BY RANGE (id)" if partitioned else "")
        )
    )
    if partitioned:
        any_db.execute("CREATE TABLE leaf PARTITION OF items DEFAULT")
    any_db.execute("INSERT INTO items VALUES (1, '{1}')")
    any_db.execute("SELECT syncd.attach('items')")
    if request.param == "row":
        as_row_form(any_db)
    any_db.execute("TRUNCATE syncd.outbox")
    any_db.execute(sql.SQL("SET statement_timeout = {}").format(NO_LONGER_THAN))
    return any_db


def as_row_form(db: psycopg.Connection) -> None:
    """The triggers that a subscriber's table has."""
    db.execute(
        "UPDATE syncd.attachments SET arguments = arguments || '{\"row_triggers\": true}' "
        "WHERE source = 'items'::regclass"
    )
    db.execute("SELECT syncd.mend('items')")


@pytest.mark.parametrize("lock", LOCKS)
def test_a_write_neither_fails_nor_waits_while_the_outbox_is_locked_and_leaves_a_doubt(
    items: psycopg.Connection, any_database: str, lock: str
) -> None:
    warnings: list[str] = []
    items.add_notice_handler(lambda notice: warnings.append(notice.message_primary or ""))
    for setting in SETTINGS:
        items.execute("TRUNCATE syncd.outbox")
        items.execute(sql.SQL("SET lock_timeout = 0; SET {}").format(sql.SQL(setting)))
        attempts = ATTEMPTS if setting == SHORT else 1
        with locked(any_database, LOCKS[lock]) as other:
            for write in WRITES:
                before = value(other, DOUBTS)
                execute(items, write, attempts)
                assert value(other, DOUBTS) - before in range(1, attempts + 1), setting
        items.execute(sql.SQL("SET statement_timeout = {}").format(NO_LONGER_THAN))
        assert value(items, "SELECT count(*) FROM items") == 0
        assert outbox(items) == []
        items.execute("INSERT INTO items VALUES (5, '{5}')")
        assert outbox(items) == keys(5)
    assert warnings == []


def execute(db: psycopg.Connection, write: LiteralString, attempts: int) -> None:
    """Run a write; its own time-out may end each attempt but the last."""
    for left in reversed(range(attempts)):
        try:
            db.execute(write)
            return
        except psycopg.errors.QueryCanceled:
            if not left:
                raise


def test_a_writer_waits_once_in_a_transaction(items: psycopg.Connection, any_database: str) -> None:
    """A thousand waits of a moment each would add up to 20 s."""
    items.execute(
        sql.SQL(
            "SET transaction_timeout = {0}"
            if items.info.server_version >= 170000
            else "SET statement_timeout = {0}"
        ).format(NO_LONGER_THAN)
    )
    with locked(any_database, LOCKS["SHARE"]):
        items.execute(
            "DO $$ BEGIN FOR n IN 10..1010 LOOP INSERT INTO items VALUES (n, '{1}'); "
            "END LOOP; END $$",
        )
    assert value(items, DOUBTS) == 1


def test_a_lock_that_is_waited_for_holds_no_writer_up(
    items: psycopg.Connection, any_database: str
) -> None:
    """A VACUUM FULL behind a long transaction: each later session would wait as well."""
    items.execute(sql.SQL("SET statement_timeout = {}").format(NO_LONGER_THAN))
    with (
        psycopg.connect(any_database) as long,
        psycopg.connect(any_database) as waiting,
        ThreadPoolExecutor() as threads,
    ):
        long.execute("INSERT INTO items VALUES (7, '{7}')")
        lock = threads.submit(waiting.execute, "LOCK TABLE syncd.outbox_0 IN ACCESS EXCLUSIVE MODE")
        waits = (
            f"SELECT count(*) FROM pg_locks WHERE pid = {waiting.info.backend_pid} AND NOT granted"
        )
        until(lambda: bool(value(items, waits)), "the other session waits for the lock")
        items.execute("INSERT INTO items VALUES (8, '{8}')")
        assert value(items, DOUBTS) == 1
        long.commit()
        lock.result()


def test_a_doubt_that_was_rolled_back_to_a_savepoint_is_noted_again(
    items: psycopg.Connection, any_database: str
) -> None:
    with locked(any_database, LOCKS["SHARE"]), items.transaction():
        with items.transaction(force_rollback=True):
            items.execute("INSERT INTO items VALUES (8, '{8}')")
        items.execute("INSERT INTO items VALUES (9, '{9}')")
        assert value(items, DOUBTS) == 2


def test_if_neither_the_outbox_nor_the_sequence_can_be_written_a_warning_says_so(
    items: psycopg.Connection,
) -> None:
    warnings: list[str] = []
    items.add_notice_handler(lambda notice: warnings.append(notice.message_primary or ""))
    items.execute("DROP SEQUENCE syncd.doubts")
    with psycopg.connect(items.info.dsn) as other:
        other.execute(LOCKS["SHARE"])
        items.execute("INSERT INTO items VALUES (2, '{2}')")
    [warning] = warnings
    assert warning.startswith("syncd could not note a change of public.")


def test_a_writer_that_meets_a_slot_that_is_being_freed_has_the_source_read_again(
    items: psycopg.Connection,
) -> None:
    """The writer has read the slot's number just before the switch; then the next slot is open."""
    items.execute("SELECT setval('syncd.outbox_slot', 0)")
    with psycopg.connect(items.info.dsn) as other:
        other.execute("LOCK TABLE syncd.outbox_1 IN ACCESS EXCLUSIVE MODE")
        other.execute("LOCK TABLE syncd.outbox_2 IN ACCESS EXCLUSIVE MODE")
        items.execute("INSERT INTO items VALUES (2, '{2}')")
    assert outbox(items) == keys(2)
    assert value(items, DOUBTS) == 0


# The service


@pytest.fixture
def daemon(daemon: Daemon) -> Daemon:
    """A syncd that never verifies by itself: a verify would repair a missed change."""
    daemon.settings["verify_seconds"] = 0
    return daemon


def test_changes_made_while_the_outbox_was_locked_are_found(
    followed: Followed, database: str
) -> None:
    with locked(database, LOCKS["ACCESS EXCLUSIVE"]):
        followed.db.execute(
            "UPDATE items SET v = '[1,2,3]' WHERE id < 10; DELETE FROM items WHERE id = 21"
        )
    followed.in_step()


def test_a_service_names_the_process_that_has_locked_the_outbox_and_goes_on(
    followed: Followed, database: str
) -> None:
    with locked(database, LOCKS["ACCESS EXCLUSIVE"]) as other:
        reason = f"table syncd.outbox is locked by process {other.info.backend_pid}"
        until(
            lambda: reason in (followed.client.status().database_error or ""),
            "status names the process",
        )
        until(lambda: followed.client.status().lag_seconds > 0, "the lag grows")
        followed.db.execute("DELETE FROM items WHERE id = 21")
        assert followed.client.search("items", [1, 1, 1])
    followed.in_step()
    until(lambda: followed.client.status().database_error is None, "all is well")
    assert logged(followed.daemon, "database_lost") == 0
    assert logged(followed.daemon, "passes_put_off") == 1


def test_an_index_of_the_outbox_that_is_being_made_again_puts_passes_off(
    followed: Followed, database: str
) -> None:
    with locked(database, LOCKS["REINDEX"]):
        until(
            lambda: followed.client.status().database_error is not None,
            "status says that it is locked",
        )
        followed.db.execute("DELETE FROM items WHERE id = 21")
    followed.in_step()
    assert logged(followed.daemon, "database_lost") == 0


def test_an_index_of_a_source_that_is_being_made_again_delays_that_source_alone(
    followed: Followed, database: str
) -> None:
    with psycopg.connect(database) as other:
        other.execute("REINDEX TABLE items")
        with psycopg.connect(database) as writer:
            writer.execute("SET lock_timeout = '100ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                writer.execute("DELETE FROM items WHERE id = 21")
        followed.db.execute(
            "INSERT INTO syncd.outbox (source, op, key) "
            "SELECT id, 'k', '21' FROM syncd.sources WHERE source = 'items'::regclass"
        )
        until(lambda: logged(followed.daemon, "source_delayed") > 0, "the source waits")
        other.rollback()
    followed.in_step()
    assert logged(followed.daemon, "database_lost") == 0


def test_a_doubted_writer_that_commits_late_is_not_missed(
    followed: Followed, database: str
) -> None:
    """The sequence moves at once, the rows come with the commit.

    A comparison between the two cannot find the rows.
    """
    with psycopg.connect(database) as writer:
        with locked(database, LOCKS["SHARE"]):
            writer.execute("DELETE FROM items WHERE id = 21")
        compared = logged(followed.daemon, "source_doubted")
        until(
            lambda: logged(followed.daemon, "source_doubted") > 0 or compared > 0,
            "the doubt is seen",
        )
        followed.in_step()  # with the committed rows
        writer.commit()
    followed.in_step()


def test_a_doubted_writer_is_found_while_another_one_stays_open(
    followed: Followed, database: str
) -> None:
    with psycopg.connect(database) as writer, psycopg.connect(database) as other:
        with locked(database, LOCKS["ACCESS EXCLUSIVE"]):
            writer.execute("DELETE FROM items WHERE id = 21")
            other.execute("DELETE FROM items WHERE id = 22")
        until(lambda: logged(followed.daemon, "source_doubted") > 0, "the doubt is seen")
        followed.in_step()  # with the committed rows
        writer.commit()
        found = followed.client.search(
            "items", [1, 1, 1], k=1000, consistency="strong", timeout_ms=60_000
        )
        assert 21 not in [hit.key for hit in found]
        followed.in_step()
        other.commit()
    followed.in_step()


def test_comparisons_end_while_writers_keep_on_moving_the_sequence(
    followed: Followed, database: str
) -> None:
    with (
        locked(database, LOCKS["SHARE"]),
        writers(database, "UPDATE items SET note = '{n}' WHERE id = 101 + {n} % 100"),
    ):
        until(lambda: logged(followed.daemon, "source_doubted") > 0, "the doubts are seen")
        for key in (21, 22):
            followed.db.execute("DELETE FROM items WHERE id = %s", [key])
            until(partial(lacks, followed, key), "a comparison is over")
    followed.in_step()


def lacks(followed: Followed, key: int) -> bool:
    return key not in followed.client.keys("items")


def test_a_reader_with_a_token_sees_a_doubted_write(followed: Followed, database: str) -> None:
    with psycopg.connect(database) as writer:
        with locked(database, LOCKS["SHARE"]):
            writer.execute("DELETE FROM items WHERE id = 21")
        row = writer.execute("SELECT syncd.token()").fetchone()
        assert row is not None
        writer.commit()
    found = followed.client.search("items", [1, 1, 1], k=1000, after=row[0], timeout_ms=60_000)
    assert 21 not in [hit.key for hit in found]


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_a_doubt_noted_while_no_service_ran_is_settled_at_the_next_start(
    followed: Followed, database: str, how: str
) -> None:
    followed.client.checkpoint()
    getattr(followed.daemon, how)()
    with locked(database, LOCKS["ACCESS EXCLUSIVE"]):
        followed.db.execute("DELETE FROM items WHERE id = 21")
    for _ in range(2):
        rotate(followed.db)
    followed.daemon.start()
    followed.in_step()


def test_a_doubt_that_was_not_settled_at_the_last_checkpoint_is_settled_after_the_start(
    followed: Followed, database: str
) -> None:
    with psycopg.connect(database) as writer:
        with locked(database, LOCKS["SHARE"]):
            writer.execute("DELETE FROM items WHERE id = 21")
        until(lambda: logged(followed.daemon, "source_doubted") > 0, "the doubt is seen")
        followed.in_step()
        followed.daemon.stop()
        writer.commit()
    followed.daemon.start()
    followed.in_step()
