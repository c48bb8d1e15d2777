"""Triggers that were off, and missing rights.

Rows that were written meanwhile are found, and the owner gets the command to run.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from syncd.errors import TimedOut
from tests.daemon import Daemon
from tests.faults.altered import (
    LIVE,
    Followed,
    eventually,
    make_items,
    other_source,
    read_index,
    read_table,
    serving,
)

COMPARE_SECONDS = "syncd.sync.source.looking.COMPARE_SECONDS"

roles = itertools.count(1)


# Triggers


def trigger(db: psycopg.Connection, event: str) -> str:
    """Name of the table's trigger for an event."""
    row = db.execute(
        "SELECT tgname FROM pg_trigger WHERE tgrelid = 'items'::regclass AND tgname LIKE %s",
        [f"syncd_%_{event}"],
    ).fetchone()
    assert row is not None
    return str(row[0])


def test_rows_written_while_a_trigger_was_disabled_are_found_once_it_is_enabled_again(
    followed: Followed,
) -> None:
    name = trigger(followed.db, "insert")
    followed.db.execute(f"ALTER TABLE items DISABLE TRIGGER {name}".encode())
    followed.logged(f"trigger {name} was disabled")
    followed.db.execute("INSERT INTO items VALUES (1000, '[1,1,1]')")
    followed.db.execute(f"ALTER TABLE items ENABLE ALWAYS TRIGGER {name}".encode())
    followed.in_step()
    followed.logged(f"trigger {name} was enabled again")


def test_rows_written_while_a_trigger_was_off_within_one_transaction_are_found(
    followed: Followed,
) -> None:
    name = trigger(followed.db, "update")
    followed.db.execute(
        f"BEGIN; ALTER TABLE items DISABLE TRIGGER {name}; "
        "UPDATE items SET v = '[2,2,2]' WHERE id < 50; "
        f"ALTER TABLE items ENABLE ALWAYS TRIGGER {name}; COMMIT".encode()
    )
    followed.in_step()
    followed.logged(f"trigger {name} was altered")


def test_rows_truncated_while_the_trigger_was_off_are_gone(followed: Followed) -> None:
    name = trigger(followed.db, "truncate")
    followed.db.execute(
        f"BEGIN; ALTER TABLE items DISABLE TRIGGER {name}; TRUNCATE items; "
        f"ALTER TABLE items ENABLE ALWAYS TRIGGER {name}; COMMIT".encode()
    )
    followed.in_step()


def test_rows_written_without_triggers_while_syncd_was_down_are_found_at_start(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    make_items(db)
    with serving(db, daemon) as followed:
        followed.in_step()
        daemon.stop()
    name = trigger(db, "update")
    db.execute(f"ALTER TABLE items DISABLE TRIGGER {name}".encode())
    db.execute("UPDATE items SET v = '[2,2,2]' WHERE id < 50")
    db.execute(f"ALTER TABLE items ENABLE ALWAYS TRIGGER {name}".encode())
    with serving(db, daemon) as followed:
        followed.in_step()
        daemon.stop()
    db.execute("ALTER TABLE items ALTER COLUMN v TYPE vector(3) USING ARRAY[id, 9, 9]::vector(3)")
    with serving(db, daemon) as followed:
        followed.in_step()
        followed.logged("column v was altered")


@pytest.fixture
def limited(database: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Followed]:
    """A service whose role owns no table and may only read them."""
    role = f"syncd_limited_{os.getpid()}_{next(roles)}"
    make_items(db)
    other_source(db)
    db.execute(f"CREATE ROLE {role} LOGIN".encode())
    db.execute(f"GRANT USAGE ON SCHEMA syncd TO {role}".encode())
    db.execute(
        "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE "
        f"ON ALL TABLES IN SCHEMA syncd TO {role}".encode()
    )
    db.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA syncd TO {role}".encode())
    db.execute(f"GRANT SELECT ON items, others TO {role}".encode())
    daemon = Daemon(make_conninfo(database, user=role), tmp_path / "data")
    daemon.with_constant(COMPARE_SECONDS, 0.5)
    with serving(db, daemon) as it:
        it.in_step()
        it.role = role  # type: ignore[attr-defined]
        yield it
        daemon.stop()
    db.execute(f"DROP OWNED BY {role}".encode())
    db.execute(f"DROP ROLE {role}".encode())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("ALTER TABLE items DISABLE TRIGGER ALL", id="disabled"),
        pytest.param(
            "ALTER TABLE items DISABLE TRIGGER ALL; ALTER TABLE items ENABLE TRIGGER ALL",
            id="not always",
        ),
        pytest.param(
            "DROP TRIGGER {insert} ON items; DROP TRIGGER {update} ON items", id="dropped"
        ),
    ],
)
def test_while_triggers_are_off_the_table_is_compared_again_and_again(
    limited: Followed, damage: str
) -> None:
    db = limited.db
    names = {event: trigger(db, event) for event in ("insert", "update")}
    db.execute(damage.format(**names).encode())

    def weak() -> None:
        assert limited.state() == "rebuilding"
        assert "run as the owner of the table: SELECT syncd.mend('public.items')" in limited.log

    eventually(weak)
    for number in range(2):
        with db.transaction():
            db.execute("SET LOCAL session_replication_role = replica")
            db.execute("INSERT INTO items VALUES (%s, '[1,1,1]')", [1000 + number])
            db.execute("UPDATE items SET v = ARRAY[%s, 8, 8]::vector WHERE id = 1", [number])

        def check() -> None:
            assert read_index(limited.client, "items") == read_table(db, limited.query)

        eventually(check)
    assert limited.state() == "rebuilding"
    with pytest.raises(TimedOut, match="trigger"):
        limited.client.search("items", [1, 0, 0], consistency="strong", timeout_ms=100)
    db.execute(f"SELECT syncd.attach('items', live => '{LIVE}', metric => 'l2')".encode())
    limited.in_step()


def test_writes_as_a_replica_are_changes_like_any_other(followed: Followed) -> None:
    with followed.db.transaction():
        followed.db.execute("SET LOCAL session_replication_role = replica")
        followed.db.execute("INSERT INTO items VALUES (1000, '[1,2,9]')")
        followed.db.execute("DELETE FROM items WHERE id = 2")
    hits = followed.client.search("items", [1, 2, 9], k=1, consistency="strong")
    assert hits[0].key == 1000
    followed.in_step()
    assert "source_doubted" not in followed.log


def test_a_load_between_disable_and_enable_trigger_all_is_found(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items DISABLE TRIGGER ALL")
    followed.db.execute(
        "INSERT INTO items SELECT i, '[1,1,1]' FROM generate_series(1000, 3000) AS i"
    )
    followed.db.execute("ALTER TABLE items ENABLE TRIGGER ALL")

    def check() -> None:
        assert read_index(followed.client, "items") == read_table(followed.db, followed.query)

    eventually(check)


# Rights


def test_row_level_security_fails_the_dataset_and_hides_no_row(limited: Followed) -> None:
    db = limited.db
    db.execute("CREATE POLICY part ON items USING (id < 50)")
    db.execute("ALTER TABLE items ENABLE ROW LEVEL SECURITY")
    db.execute("ALTER TABLE items FORCE ROW LEVEL SECURITY")
    limited.failed("row-level security would hide rows of public.items")
    db.execute("UPDATE items SET v = '[6,6,6]' WHERE id = 100")
    db.execute("UPDATE others SET v = '[3,2,1]'")
    limited.in_step("SELECT id, v::real[] FROM others", "others")
    assert limited.state() == "failed"
    db.execute("ALTER TABLE items DISABLE ROW LEVEL SECURITY")
    limited.in_step()


def test_revoked_rights_fail_the_dataset_until_they_are_granted_again(limited: Followed) -> None:
    db, role = limited.db, limited.role  # type: ignore[attr-defined]
    db.execute(f"REVOKE SELECT ON items FROM {role}".encode())
    limited.failed('GRANT SELECT ON "public"."items"')
    db.execute("UPDATE items SET v = '[6,6,6]' WHERE id = 100")
    db.execute("UPDATE others SET v = '[3,2,1]'")
    limited.in_step("SELECT id, v::real[] FROM others", "others")
    db.execute(f"GRANT SELECT ON items TO {role}".encode())
    limited.in_step()


def test_a_role_that_does_not_own_the_table_names_the_command_for_the_owner(
    limited: Followed,
) -> None:
    limited.db.execute(
        f"ALTER TABLE items DISABLE TRIGGER {trigger(limited.db, 'insert')}".encode()
    )
    limited.logged("triggers_not_repaired")
    limited.logged("SELECT syncd.mend('public.items');")
    limited.db.execute(f"SELECT syncd.attach('items', live => '{LIVE}', metric => 'l2')".encode())
    limited.in_step()


def test_triggers_are_repaired_if_the_role_has_the_right(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    make_items(db)
    with serving(db, daemon) as followed:
        followed.in_step()
        db.execute(
            "BEGIN; ALTER TABLE items DISABLE TRIGGER ALL; "
            "INSERT INTO items VALUES (1000, '[1,1,1]'); COMMIT"
        )
        followed.logged("triggers_repaired")
        followed.in_step()
        db.execute("INSERT INTO items VALUES (1001, '[1,1,1]')")
        assert (
            len(
                followed.client.search(
                    "items", [1, 1, 1], k=2, max_distance=0.0, consistency="strong"
                )
            )
            == 2
        )
        followed.in_step()
