"""A rule that fails on some rows: these are quarantined until the rule works; the others go on."""

from __future__ import annotations

import psycopg

from tests.daemon import Daemon
from tests.faults.altered import Followed, eventually, make_items, serving


def test_rows_on_which_an_expression_fails_are_quarantined_and_the_others_go_on(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute(
        "CREATE TABLE items (id int PRIMARY KEY, v vector(3), part int DEFAULT 1, deleted_at date)"
    )
    db.execute(
        "INSERT INTO items SELECT i, ARRAY[i, 1, 1]::vector FROM generate_series(1, 3000) AS i"
    )
    db.execute("SELECT syncd.attach('items', live => '10 / part > 0', metric => 'l2')")
    good = "SELECT id, v::real[] FROM items WHERE part <> 0"
    with serving(db, daemon) as followed:
        followed.in_step(good)
        db.execute(
            "INSERT INTO items VALUES "
            "(3001, '[1,1,1]', 0), (3002, '[1,1,1]', 1), (3003, '[1,1,1]', 0)"
        )
        db.execute("UPDATE items SET part = 0 WHERE id IN (1, 1500)")
        followed.in_step(good)
        assert followed.client.status().quarantined == 4
        db.execute("UPDATE items SET v = '[5,5,5]' WHERE id % 2 = 0")
        followed.in_step(good)
        daemon.kill()  # with or without a checkpoint
    db.execute("VACUUM FULL items")
    with serving(db, daemon) as followed:
        followed.in_step(good)
        assert followed.client.status().quarantined == 4

        def listed() -> None:
            found = db.execute("SELECT key, reason FROM syncd.quarantine ORDER BY key").fetchall()
            assert found == [(key, "expression_failed") for key in ("1", "1500", "3001", "3003")]

        eventually(listed)
        db.execute("UPDATE items SET part = 2")
        followed.in_step()
        assert followed.client.status().quarantined == 0


def test_a_table_whose_rows_fail_is_quarantined_and_followed_again_after_the_repair(
    followed: Followed,
) -> None:
    db = followed.db
    db.execute(
        "CREATE FUNCTION picky(int) RETURNS text IMMUTABLE LANGUAGE plpgsql "
        "AS $$ BEGIN RETURN 'items'; END $$"
    )
    db.execute(
        "SELECT syncd.attach('items', live => 'deleted_at IS NULL', dataset => 'picky(id)', "
        "metric => 'l2')"
    )
    followed.in_step()
    db.execute(
        "CREATE OR REPLACE FUNCTION picky(int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS "
        "$$ BEGIN IF $1 > 2 THEN RAISE EXCEPTION 'no'; END IF; RETURN 'items'; END $$"
    )
    db.execute("UPDATE items SET v = '[1,2,3]'")
    followed.in_step("SELECT id, v::real[] FROM items WHERE id <= 2")
    db.execute(
        "CREATE OR REPLACE FUNCTION picky(int) RETURNS text IMMUTABLE LANGUAGE sql "
        "AS $$ SELECT 'items' $$"
    )
    db.execute("UPDATE items SET v = '[3,2,1]'")
    followed.in_step()


def test_a_function_that_fails_on_every_row_fails_the_source_and_no_row_leaves(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    make_items(db)
    db.execute("CREATE TYPE kind AS ENUM ('good', 'bad')")
    db.execute(
        "CREATE FUNCTION is_good(k kind) RETURNS boolean IMMUTABLE LANGUAGE plpgsql "
        "AS $$ BEGIN RETURN k = 'good'; END $$"
    )
    db.execute("ALTER TABLE items ADD COLUMN kind kind DEFAULT 'good'")
    db.execute(
        "SELECT syncd.attach('items', live => 'deleted_at IS NULL AND is_good(kind)', "
        "metric => 'l2')"
    )
    with serving(db, daemon) as followed:
        followed.in_step()
        # The body of a function does not follow, but its plan in a session does.
        db.execute("ALTER TYPE kind RENAME VALUE 'good' TO 'fine'")
        daemon.stop()
        db.execute("UPDATE items SET note = 'm' WHERE id < 5")
        daemon.start()
        said = followed.failed(
            'invalid input value for enum public.kind: "good" (PL/pgSQL function'
        )
        assert "is_good" in said
        assert followed.client.status().quarantined == 0
        db.execute(
            "CREATE OR REPLACE FUNCTION is_good(k kind) RETURNS boolean IMMUTABLE LANGUAGE plpgsql "
            "AS $$ BEGIN RETURN k = 'fine'; END $$"
        )
        followed.in_step()
        assert followed.client.status().quarantined == 0
