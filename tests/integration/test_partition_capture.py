"""A write to a partitioned table notes its keys and never fails; the triggers for it."""

from __future__ import annotations

from typing import LiteralString

import psycopg
import pytest
from psycopg import sql

from tests.integration.captured import Entry, execute, keys, listening, outbox
from tests.integration.partitions import PARTED, mend, source_id, wrong
from tests.integration.sources import attach, connected_as, everything, refused, role
from tests.servers import PostgresServer


@pytest.fixture
def parted(scratch: psycopg.Connection) -> psycopg.Connection:
    """An attached partitioned table with rows in each leaf, and an empty outbox; rolled back."""
    scratch.execute(PARTED)
    assert attach(scratch, "parted") == (4, 4, 1)
    scratch.execute("TRUNCATE syncd.outbox")
    return scratch


# Noted keys


@pytest.mark.parametrize(
    ("write", "noted"),
    [
        ("INSERT INTO parted VALUES (3), (12), (102)", keys(102, 12, 3)),
        ("INSERT INTO low VALUES (3), (4)", keys(3, 4)),
        ("INSERT INTO deep VALUES (103)", keys(103)),
        ("INSERT INTO deepest VALUES (103)", keys(103)),
        ("INSERT INTO high (id) VALUES (13)", keys(13)),
        ("INSERT INTO parted VALUES (1), (3) ON CONFLICT DO NOTHING", keys(3)),
        (
            "INSERT INTO parted VALUES (1), (3) ON CONFLICT (id) DO UPDATE SET lang = 'de'",
            keys(1, 3),
        ),
        ("INSERT INTO low VALUES (1), (3) ON CONFLICT (id) DO UPDATE SET lang = 'de'", keys(1, 3)),
        ("UPDATE parted SET lang = 'de'", keys(1, 101, 11, 2)),
        ("UPDATE deep SET lang = 'de'", keys(101)),
        ("UPDATE low SET id = id + 2", keys(1, 2, 3, 4)),
        ("UPDATE parted SET id = id + 100 WHERE id = 2", keys(102, 2)),
        ("DELETE FROM parted WHERE id > 1", keys(101, 11, 2)),
        ("DELETE FROM high", keys(11)),
        (
            "MERGE INTO parted USING (VALUES (1, 'd'), (2, 'u'), (8, 'i')) AS s (id, what) "
            "ON parted.id = s.id "
            "WHEN MATCHED AND what = 'd' THEN DELETE "
            "WHEN MATCHED THEN UPDATE SET id = 18 "
            "WHEN NOT MATCHED THEN INSERT VALUES (s.id)",
            keys(1, 18, 2, 8),
        ),
        ("UPDATE parted SET lang = 'de' WHERE id > 1000", []),
        ("TRUNCATE parted", [("t", None)]),
        ("TRUNCATE low", [("r", None)]),
        ("TRUNCATE deep", [("r", None)]),
        ("TRUNCATE deepest", [("r", None)]),
        ("TRUNCATE low, high, deepest", [("r", None)]),
    ],
)
def test_a_write_to_the_table_or_to_a_partition_notes_each_key(
    parted: psycopg.Connection, write: LiteralString, noted: list[Entry]
) -> None:
    execute(parted, write)
    assert outbox(parted) == noted


def test_copy_into_the_table_and_into_a_partition_notes_its_rows(
    parted: psycopg.Connection,
) -> None:
    for table, start in (("parted", 3), ("low", 5)):
        statement = sql.SQL("COPY {} (id) FROM STDIN").format(sql.Identifier(table))
        with parted.cursor().copy(statement) as copy:
            copy.write_row((start,))
            copy.write_row((start + 1,))
    assert outbox(parted) == keys(3, 4, 5, 6)


def test_partitions_made_or_attached_later_are_captured_at_once(parted: psycopg.Connection) -> None:
    parted.execute("CREATE TABLE later PARTITION OF parted FOR VALUES FROM (20) TO (30)")
    parted.execute("CREATE TABLE came (LIKE parted INCLUDING ALL); INSERT INTO came VALUES (31)")
    parted.execute("ALTER TABLE parted ATTACH PARTITION came FOR VALUES FROM (30) TO (40)")
    # The copies of the trigger are ALWAYS too.
    parted.execute("SET session_replication_role = replica")
    parted.execute(
        "INSERT INTO later VALUES (21); UPDATE came SET lang = 'de'; INSERT INTO parted VALUES (32)"
    )
    assert outbox(parted) == keys(21, 31, 32)


def test_every_partition_is_captured_under_the_replica_role(parted: psycopg.Connection) -> None:
    parted.execute("SET session_replication_role = replica")
    parted.execute("INSERT INTO parted VALUES (3), (12), (102)")
    parted.execute("TRUNCATE deepest")
    assert outbox(parted) == [*keys(102, 12, 3), ("r", None)]


def test_a_write_that_is_rolled_back_is_not_noted_and_wakes_no_service(
    any_db: psycopg.Connection, any_database: str
) -> None:
    any_db.execute(PARTED)
    attach(any_db, "parted")
    any_db.execute("TRUNCATE syncd.outbox")
    with listening(any_database) as heard:
        with any_db.transaction():
            any_db.execute("SELECT 1")
            with any_db.transaction(force_rollback=True):
                any_db.execute("INSERT INTO parted SELECT generate_series(3, 9)")
        assert (outbox(any_db), heard()) == ([], 0)
        with any_db.transaction():
            with any_db.transaction(force_rollback=True):
                any_db.execute("INSERT INTO low VALUES (3)")
            # Asks for the guard again, and notifies:
            any_db.execute("INSERT INTO parted SELECT generate_series(4, 9)")
            any_db.execute("TRUNCATE low")
        assert outbox(any_db) == [*keys(4, 5, 6, 7, 8, 9), ("r", None)]
        assert heard() == 1
        any_db.execute("INSERT INTO deepest VALUES (104)")
        assert heard() == 1


def test_a_cascade_into_a_partitioned_table_notes_its_rows(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE parents (a bigint, b uuid, PRIMARY KEY (a, b))")
    scratch.execute(
        "CREATE TABLE kids (part text, a bigint, b uuid, n int, embedding real[], PRIMARY KEY "
        "(part, n),"
        " FOREIGN KEY (a, b) REFERENCES parents ON DELETE CASCADE ON UPDATE CASCADE) PARTITION BY "
        "LIST (part);"
        "CREATE TABLE kids_x PARTITION OF kids FOR VALUES IN ('x'); CREATE TABLE kids_y PARTITION "
        "OF kids FOR VALUES IN ('y')"
    )
    uuid = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
    scratch.execute("INSERT INTO parents VALUES (1, %s), (2, %s)", [uuid, uuid])
    scratch.execute(
        "INSERT INTO kids VALUES ('x', 1, %s, 1), ('y', 1, %s, 1), ('y', 2, %s, 2)", [uuid] * 3
    )
    attach(scratch, "kids")
    scratch.execute("TRUNCATE syncd.outbox")
    scratch.execute("DELETE FROM parents WHERE a = 1")
    assert outbox(scratch) == keys('["x", 1]', '["y", 1]')
    scratch.execute("UPDATE parents SET a = 3")
    assert outbox(scratch)[-1] == ("k", '["y", 2]')
    scratch.execute("TRUNCATE parents CASCADE")
    assert ("t", None) in outbox(scratch)


# A write never fails


WRITES: tuple[LiteralString, ...] = (
    "INSERT INTO parted VALUES (4), (5)",
    "UPDATE parted SET id = 14 WHERE id = 4",
    "DELETE FROM high WHERE id = 14",
    "TRUNCATE low",
    "TRUNCATE parted",
)


def test_a_renamed_key_column_fails_no_write_and_marks_each_transaction_once(
    parted: psycopg.Connection,
) -> None:
    parted.execute("ALTER TABLE parted RENAME COLUMN id TO number")
    parted.execute("INSERT INTO parted VALUES (4), (5)")
    parted.execute("UPDATE parted SET lang = 'de'")
    parted.execute("DELETE FROM low WHERE number = 4")
    assert outbox(parted) == [("r", None)]
    with parted.transaction(force_rollback=True):
        parted.execute("TRUNCATE syncd.outbox")
        with parted.transaction(force_rollback=True):
            parted.execute("DELETE FROM low")
        parted.execute("DELETE FROM low")  # the first marker went with its savepoint
        assert outbox(parted) == [("r", None)]


@pytest.mark.parametrize(
    "damage",
    [
        "DROP TABLE syncd.outbox CASCADE",
        "DROP TABLE syncd.outbox_0",
        "DROP SEQUENCE syncd.outbox_slot",
    ],
)
def test_an_outbox_that_cannot_be_written_fails_no_write_to_a_partition(
    parted: psycopg.Connection, damage: LiteralString
) -> None:
    warnings: list[str] = []
    parted.execute(damage)
    parted.add_notice_handler(lambda notice: warnings.append(notice.message_primary or ""))
    for write in WRITES:
        execute(parted, write)
    assert warnings
    assert all(text.startswith("syncd could not note a change of ") for text in warnings)
    # Once per transaction, not once per row:
    assert len([text for text in warnings if "change of parted" not in text]) == 1


def test_an_outbox_dropped_between_two_transactions_of_a_session_fails_no_write(
    any_db: psycopg.Connection,
) -> None:
    any_db.execute(PARTED)
    attach(any_db, "parted")
    any_db.execute("INSERT INTO parted VALUES (4)")
    any_db.execute("DROP TABLE syncd.outbox CASCADE")
    for write in WRITES[1:]:
        any_db.execute(write)


@pytest.mark.parametrize("source", ["parted", "deep"])
def test_a_write_to_a_partition_does_not_wait_for_a_lock_on_the_attachments(
    any_db: psycopg.Connection, any_database: str, source: str
) -> None:
    """A source that has become a partition looks up the owner of a leaf.

    While the attachments are locked, the leaf counts as its own.
    """
    any_db.execute(PARTED)
    any_db.execute("ALTER TABLE parted DETACH PARTITION deep")
    attach(any_db, source)
    any_db.execute("ALTER TABLE parted ATTACH PARTITION deep FOR VALUES FROM (100) TO (200)")
    any_db.execute("TRUNCATE syncd.outbox")
    with psycopg.connect(any_database) as other:
        other.execute("LOCK TABLE syncd.attachments IN ACCESS EXCLUSIVE MODE")
        any_db.execute("SET statement_timeout = '20s'")
        any_db.execute("INSERT INTO parted VALUES (103), (104)")
        any_db.execute("INSERT INTO deepest VALUES (105)")
        any_db.execute("DELETE FROM deep WHERE id = 104")
    assert sorted(outbox(any_db)) == sorted(keys(103, 104, 104, 105))


def test_a_wake_up_that_fails_fails_no_write_to_a_partition(parted: psycopg.Connection) -> None:
    parted.execute("DROP SEQUENCE syncd.notify_mode")
    for write in WRITES:
        execute(parted, write)
    assert outbox(parted) == [*keys(14, 14, 4, 4, 5), ("r", None), ("t", None)]


def test_who_may_write_a_partition_needs_no_grant_on_the_schema(
    any_server: PostgresServer, any_db: psycopg.Connection, any_database: str
) -> None:
    any_db.execute(PARTED)
    attach(any_db, "parted")
    any_db.execute("TRUNCATE syncd.outbox")
    with role(any_server, "writer"):
        any_db.execute(
            "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON parted, low, high, deepest TO writer"
        )
        with connected_as(any_database, "writer") as db:
            for write in WRITES[:-1]:
                db.execute(write)
            # Triggers use syncd's own schema, not the writer's search path.
            db.execute("CREATE TEMPORARY TABLE outbox_0 (slot int)")
            db.execute("SET search_path = pg_temp, public")
            db.execute("INSERT INTO parted VALUES (7)")
        any_db.execute("DROP OWNED BY writer")
    assert [row for row in outbox(any_db) if row[1] in ("7", "14")] == keys(14, 14, 7)


# Which triggers there must be


def test_after_attach_nothing_is_missing_and_mending_changes_nothing(
    parted: psycopg.Connection,
) -> None:
    before = everything(parted)
    assert wrong(parted) == []
    assert not mend(parted)
    attach(parted, "parted")
    assert everything(parted) == before
    assert outbox(parted) == []


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (
            "DROP TRIGGER {row} ON parted",
            [(table, "row", "missing") for table in ("deep", "deepest", "high", "low", "parted")],
        ),
        ("DROP TRIGGER {truncate} ON parted", [("parted", "truncate", "missing")]),
        (
            "ALTER TABLE low DISABLE TRIGGER ALL",
            [("low", "leaf", "disabled"), ("low", "row", "disabled")],
        ),
        ("ALTER TABLE ONLY deepest ENABLE TRIGGER {row}", [("deepest", "row", "not always")]),
        (
            "ALTER TABLE parted ENABLE REPLICA TRIGGER {truncate}",
            [("parted", "truncate", "not always")],
        ),
        ("ALTER TABLE ONLY parted DISABLE TRIGGER {row}", [("parted", "row", "disabled")]),
        (
            "CREATE OR REPLACE TRIGGER {row} AFTER INSERT ON parted "
            "FOR EACH ROW EXECUTE FUNCTION syncd.{function}();"
            "ALTER TABLE parted ENABLE ALWAYS TRIGGER {row};"
            "ALTER TABLE ONLY low ENABLE ALWAYS TRIGGER {row};"
            "ALTER TABLE ONLY high ENABLE ALWAYS TRIGGER {row};"
            "ALTER TABLE ONLY deep ENABLE ALWAYS TRIGGER {row};"
            "ALTER TABLE ONLY deepest ENABLE ALWAYS TRIGGER {row}",
            [(table, "row", "altered") for table in ("deep", "deepest", "high", "low", "parted")],
        ),
    ],
)
def test_a_wrong_trigger_is_named_and_repaired(
    parted: psycopg.Connection, harm: str, found: list[tuple[str, str, str]]
) -> None:
    number = source_id(parted)
    names = {event: f"syncd_{number}_{event}" for event in ("row", "truncate", "leaf")}
    parted.execute(harm.format(**names, function=f"capture_{number}_row"))
    assert sorted(wrong(parted)) == sorted(found)
    assert mend(parted)
    assert wrong(parted) == []
    assert not mend(parted)
    assert outbox(parted) == [("r", None)]  # a change may have been missed
    parted.execute("TRUNCATE syncd.outbox; SET session_replication_role = replica")
    parted.execute("INSERT INTO parted VALUES (3), (12), (102)")
    parted.execute("TRUNCATE low")
    assert outbox(parted) == [*keys(102, 12, 3), ("r", None)]


def test_a_new_partition_lacks_only_its_truncation_and_its_repair_reads_nothing_again(
    parted: psycopg.Connection,
) -> None:
    parted.execute("CREATE TABLE later PARTITION OF deep FOR VALUES FROM (150) TO (160)")
    assert wrong(parted) == [("later", "leaf", "missing")]
    assert mend(parted)
    assert outbox(parted) == []
    parted.execute("TRUNCATE later")
    assert outbox(parted) == [("r", None)]


def test_a_renamed_trigger_is_given_its_name_again(parted: psycopg.Connection) -> None:
    parted.execute(f"ALTER TRIGGER syncd_{source_id(parted)}_leaf ON low RENAME TO other")
    assert wrong(parted) == [("low", "leaf", "missing"), ("low", "other", "unwanted")]
    assert mend(parted)
    assert wrong(parted) == []
    parted.execute("TRUNCATE low")
    assert outbox(parted) == [("r", None)]


def test_a_detached_partition_is_let_go(parted: psycopg.Connection) -> None:
    parted.execute("ALTER TABLE parted DETACH PARTITION low")
    assert wrong(parted) == [("low", "leaf", "unwanted")]
    assert mend(parted)
    assert wrong(parted) == []
    parted.execute("INSERT INTO low VALUES (3); TRUNCATE low")
    assert outbox(parted) == []
    parted.execute("ALTER TABLE parted ATTACH PARTITION low FOR VALUES FROM (0) TO (10)")
    assert mend(parted)
    assert wrong(parted) == []


def test_detach_takes_every_trigger_along_those_of_former_partitions_too(
    parted: psycopg.Connection,
) -> None:
    parted.execute("ALTER TABLE parted DETACH PARTITION low")
    assert parted.execute("SELECT syncd.detach('parted')").fetchone() == (True,)
    left = (
        "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'syncd%' AND tgrelid <> "
        "'syncd.embeddings'::regclass"
    )
    assert parted.execute(left).fetchall() == []
    parted.execute("TRUNCATE syncd.outbox")
    for write in WRITES[3:]:
        execute(parted, write)
    assert outbox(parted) == []


def test_mending_a_table_that_is_not_attached_says_so(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    with refused(scratch, "not attached", "syncd.attach("):
        mend(scratch, "items")


def test_only_the_owner_mends(
    any_server: PostgresServer, any_db: psycopg.Connection, any_database: str
) -> None:
    any_db.execute(PARTED)
    attach(any_db, "parted")
    any_db.execute(f"DROP TRIGGER syncd_{source_id(any_db)}_row ON parted")
    with role(any_server, "stranger"), role(any_server, "table_owner"):
        any_db.execute(
            "GRANT USAGE ON SCHEMA syncd TO stranger, table_owner; GRANT ALL ON parted TO stranger"
        )
        any_db.execute("GRANT ALL ON SCHEMA public TO table_owner")
        with connected_as(any_database, "stranger") as stranger, refused(stranger, "must be owner"):
            mend(stranger)
        for table in ("parted", "low", "high", "deep", "deepest"):
            any_db.execute(
                sql.SQL("ALTER TABLE {} OWNER TO table_owner").format(sql.Identifier(table))
            )
        with connected_as(any_database, "table_owner") as owner:
            assert mend(owner)
            assert not mend(owner)
            attach(owner, "parted", metric="l2")
        assert wrong(any_db) == []
        any_db.execute(
            "REASSIGN OWNED BY table_owner TO postgres; DROP OWNED BY table_owner, stranger"
        )
