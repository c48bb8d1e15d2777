"""Objects in a source's rules are renamed, moved, replaced or dropped.

The rules follow, or the source fails with a command. No row leaves the index.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import psycopg
import pytest

from tests.daemon import Daemon
from tests.faults.altered import Followed, eventually, read_index, serving
from tests.integration.commands import run

ROWS = 200
LIVE = "status = 'active'"
QUERY = "SELECT id, v::real[] FROM items WHERE status::text IN ('active', 'live')"


def make_items(db: psycopg.Connection, arguments: str) -> None:
    """Make and attach table ``items``, with every second row active, a user's functions and an
    enum.
    """
    db.execute("CREATE SCHEMA app; CREATE TYPE app.st AS ENUM ('active', 'gone')")
    db.execute(
        "CREATE FUNCTION app.is_active(s app.st) RETURNS boolean IMMUTABLE LANGUAGE sql "
        "AS $$ SELECT s = 'active' $$;"
        "CREATE FUNCTION app.label(n int) RETURNS text IMMUTABLE LANGUAGE sql "
        "AS $$ SELECT 'items' || left($1::text, 0) $$;"
        "CREATE FUNCTION app.value_of(s app.st) RETURNS text IMMUTABLE LANGUAGE sql "
        "AS $$ SELECT s::text $$;"
        "CREATE TABLE items (id int PRIMARY KEY, v vector(3), status app.st, note text);"
        "INSERT INTO items SELECT i, ARRAY[i, i % 7, 1]::real[]::vector, "
        "(ARRAY['active', 'gone'])[1 + i % 2]::app.st, 'n' "
        f"FROM generate_series(1, {ROWS}) AS i".encode()
    )
    db.execute("SET search_path = app, public")
    db.execute(f"SELECT syncd.attach('items', metric => 'l2', {arguments})".encode())
    db.execute("SET search_path = public")


@pytest.fixture
def enum(db: psycopg.Connection, daemon: Daemon) -> Iterator[Followed]:
    """A rule with an enum value and a user's function, and the enum as a column to filter on."""
    make_items(
        db,
        "live => $$status = 'active' AND label(id) = 'items'$$, dataset => 'label(id)', "
        "columns => ARRAY['status']",
    )
    with serving(db, daemon) as followed:
        followed.in_step(QUERY)
        yield followed


def untouched(followed: Followed) -> None:
    """The index is right after writes, and the service has reported no trouble."""
    followed.db.execute("UPDATE items SET v = ARRAY[0, id, 1]::real[]::vector")
    followed.in_step(QUERY)
    assert followed.client.status().quarantined == 0
    assert "source_failed" not in followed.log


RENAMES = {
    "an enum's value": "ALTER TYPE app.st RENAME VALUE 'active' TO 'live'",
    "the enum": "ALTER TYPE app.st RENAME TO state",
    "the enum's schema": "ALTER TYPE app.st SET SCHEMA public",
    "a function": "ALTER FUNCTION app.label RENAME TO name_of",
    "a function's schema": "ALTER FUNCTION app.label SET SCHEMA public",
    "the schema": "ALTER SCHEMA app RENAME TO other",
    "a function, and another takes its name": "ALTER FUNCTION app.label RENAME TO name_of; "
    "CREATE FUNCTION app.label(n int) RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT 'wrong' $$",
}


@pytest.mark.parametrize("what", RENAMES)
@pytest.mark.parametrize("running", [True, False])
def test_rules_follow_an_object_that_is_renamed_or_moved(
    enum: Followed, what: str, running: bool
) -> None:
    if not running:
        enum.daemon.stop()
    enum.db.execute(RENAMES[what].encode())
    enum.db.execute("UPDATE items SET note = 'm' WHERE id % 3 = 0")
    if not running:
        enum.daemon.start()
    enum.in_step(QUERY)
    untouched(enum)


def test_values_of_an_enum_that_change_places_are_not_confused(enum: Followed) -> None:
    enum.db.execute(
        "BEGIN; ALTER TYPE app.st RENAME VALUE 'active' TO 'x'; "
        "ALTER TYPE app.st RENAME VALUE 'gone' TO 'active'; "
        "ALTER TYPE app.st RENAME VALUE 'x' TO 'gone'; UPDATE items SET note = 'm'; COMMIT"
    )
    enum.in_step("SELECT id, v::real[] FROM items WHERE status = 'gone'")

    def found() -> None:
        assert enum.client.search("items", [1, 0, 0], k=1, filter={"status": "gone"})
        assert not enum.client.search("items", [1, 0, 0], k=1, filter={"status": "active"})

    eventually(found)


def test_a_search_filters_on_the_new_name_of_a_renamed_value(enum: Followed) -> None:
    enum.db.execute("ALTER TYPE app.st RENAME VALUE 'active' TO 'live'")

    def found() -> None:
        assert (
            len(enum.client.search("items", [1, 0, 0], k=ROWS, filter={"status": "live"}))
            == ROWS // 2
        )

    eventually(found)
    enum.logged("enum value active was renamed to live")


def test_a_value_added_to_an_enum_changes_nothing(enum: Followed) -> None:
    enum.db.execute("ALTER TYPE app.st ADD VALUE 'new'")
    untouched(enum)
    assert "source_doubted" not in enum.log


def test_datasets_named_by_an_enum_are_named_by_its_present_values(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    make_items(db, "dataset => 'value_of(status)'")
    with serving(db, daemon) as followed:
        followed.in_step("SELECT id, v::real[] FROM items WHERE status = 'gone'", "gone")
        db.execute("ALTER TYPE app.st RENAME VALUE 'gone' TO 'old'")
        followed.in_step("SELECT id, v::real[] FROM items WHERE status = 'old'", "old")
        assert read_index(followed.client, "gone") == {}


def test_a_function_that_is_replaced_has_its_rows_compared(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    make_items(db, "live => 'is_active(status)'")
    with serving(db, daemon) as followed:
        followed.in_step(QUERY)
        db.execute(
            "CREATE OR REPLACE FUNCTION app.is_active(s app.st) RETURNS boolean IMMUTABLE "
            "LANGUAGE sql AS $$ SELECT s <> 'active' $$"
        )
        followed.in_step("SELECT id, v::real[] FROM items WHERE status <> 'active'")
        followed.logged("a function of its rules was altered")


def test_pgvector_moved_to_another_schema_is_followed(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    make_items(db, "live => 'vector_dims(v) = 3'")
    query = "SELECT id, (v::text::public.vector)::real[] FROM items"
    with serving(db, daemon) as followed:
        followed.in_step("SELECT id, v::real[] FROM items")
        db.execute("CREATE SCHEMA elsewhere; ALTER EXTENSION vector SET SCHEMA elsewhere")
        db.execute("SET search_path = public, elsewhere")
        db.execute("UPDATE items SET v = ARRAY[1, 2, id]::real[]::vector")
        followed.in_step(query.replace("public.vector", "vector"))
        assert followed.client.status().quarantined == 0
        assert "source_failed" not in followed.log


def test_the_usual_exchange_of_an_enum_type_goes_through_and_is_followed(enum: Followed) -> None:
    db = enum.db
    db.execute(
        "BEGIN; ALTER TYPE app.st RENAME TO st_old; "
        "CREATE TYPE app.st AS ENUM ('active', 'paused', 'gone')"
    )
    db.execute("ALTER TABLE items ALTER COLUMN status TYPE app.st USING status::text::app.st")
    # The functions of the test go with it, no object of syncd's.
    db.execute("DROP TYPE app.st_old CASCADE; COMMIT")
    untouched(enum)
    db.execute("ALTER TYPE app.st RENAME VALUE 'active' TO 'live'")
    untouched(enum)


@pytest.mark.parametrize("running", [True, False])
def test_a_rule_without_its_function_fails_the_source_with_the_command_and_no_row_leaves(
    enum: Followed, running: bool
) -> None:
    db = enum.db
    if not running:
        enum.daemon.stop()
    db.execute("DROP FUNCTION app.label(int)")
    db.execute("UPDATE items SET note = 'm' WHERE id % 3 = 0")
    if not running:
        enum.daemon.start()
    said = enum.failed(
        "function app.label(integer) does not exist: attach it again: syncd attach public.items"
    )
    assert enum.client.status().quarantined == 0
    db.execute(
        "CREATE FUNCTION public.label(n int) RETURNS text IMMUTABLE LANGUAGE sql "
        "AS $$ SELECT 'items' || left($1::text, 0) $$"
    )
    command = said.partition("attach it again: syncd ")[2]
    done = run(
        *shlex.split(command), SYNCD_DSN=f"{db.info.dsn} options='-c search_path=app,public'"
    )
    assert done.returncode == 0, done.stderr
    enum.in_step(QUERY)
    assert enum.client.status().quarantined == 0


def test_a_rule_compiled_by_another_major_version_is_compiled_again_and_followed(
    enum: Followed,
) -> None:
    enum.daemon.stop()
    enum.db.execute("UPDATE syncd.rules SET server = server - 1")  # as pg_upgrade leaves it
    enum.daemon.start()

    def kept() -> None:
        assert enum.db.execute("SELECT kept FROM syncd.present_rules WHERE id > 1").fetchone() == (
            True,
        )

    eventually(kept)
    enum.db.execute("ALTER TYPE app.st RENAME VALUE 'active' TO 'live'")
    untouched(enum)


def test_a_value_that_the_rule_names_by_an_old_name_fails_the_source_and_no_row_leaves(
    enum: Followed,
) -> None:
    enum.daemon.stop()
    enum.db.execute("UPDATE syncd.rules SET server = server - 1")  # as pg_upgrade leaves it
    # While the stored trees of the rules are of no use:
    enum.db.execute("ALTER TYPE app.st RENAME VALUE 'active' TO 'live'")
    enum.db.execute("UPDATE items SET note = 'm'")
    enum.daemon.start()
    enum.failed(
        'invalid input value for enum app.st: "active": attach it again: syncd attach public.items'
    )
    assert enum.client.status().quarantined == 0
    enum.db.execute("ALTER TYPE app.st RENAME VALUE 'live' TO 'active'")
    untouched_since(enum)


def untouched_since(followed: Followed) -> None:
    """The index holds every row again, and dropped none meanwhile."""
    followed.in_step(QUERY)
    assert followed.client.status().quarantined == 0
