"""Reading the outbox: each change once, at a cost in proportion to the changes."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence

import psycopg
import pytest
from psycopg import sql

from syncd.postgres import outbox
from syncd.postgres.batch import Query
from syncd.postgres.outbox import Asked, Cursor, Window, read_changes
from syncd.statements import statement
from syncd.sync.consumer.transaction import session_settings
from syncd.types import Position, Snapshot

SOURCE = 7
PAGE_ROWS = 100


def write(db: psycopg.Connection, *keys: int) -> None:
    db.cursor().executemany(
        "INSERT INTO syncd.outbox (source, op, key) VALUES (7, 'k', %s)",
        [[str(key)] for key in keys],
    )


def snapshot(db: psycopg.Connection) -> Snapshot:
    row = db.execute("SELECT pg_current_snapshot()::text").fetchone()
    assert row is not None
    return Snapshot.parse(row[0])


def follow(db: psycopg.Connection, cursor: Cursor) -> tuple[list[int], Cursor]:
    """One pass of a consumer, in as many pages as it takes."""
    found: list[int] = []
    while True:
        with db.transaction():
            db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            changes = read_changes(db, Asked(cursor, [SOURCE], PAGE_ROWS), snapshot(db))
        found += map(int, changes.keys.get(SOURCE, []))
        cursor = changes.cursor
        if cursor.window is None:
            return found, cursor


@pytest.fixture
def start(db: psycopg.Connection) -> Cursor:
    return Cursor(Position(snapshot(db), 0))


def test_a_transaction_that_took_lower_ids_and_commits_later_is_read_once(
    db: psycopg.Connection, database: str, start: Cursor
) -> None:
    with psycopg.connect(database) as early:
        write(early, 1)
        write(db, 2)
        found, cursor = follow(db, start)
        assert found == [2]
        early.commit()
        found, cursor = follow(db, cursor)
        assert found == [1]
        assert follow(db, cursor)[0] == []


def test_pages_of_a_large_window_give_each_key_once_while_others_write(
    db: psycopg.Connection, start: Cursor
) -> None:
    with db.transaction():
        write(db, *range(PAGE_ROWS * 3 + 7))
    first = read_changes(db, Asked(start, [SOURCE], PAGE_ROWS), snapshot(db))
    assert first.cursor.window is not None
    write(db, 1_000_000)
    found, cursor = follow(db, first.cursor)
    assert sorted([*map(int, first.keys[SOURCE]), *found]) == list(range(PAGE_ROWS * 3 + 7))
    assert follow(db, cursor)[0] == [1_000_000]


@pytest.mark.parametrize("behind_an_open_transaction", [False, True])
def test_a_page_reads_the_changes_and_not_the_whole_outbox(
    db: psycopg.Connection,
    database: str,
    behind_an_open_transaction: bool,
) -> None:
    with psycopg.connect(database) as early:
        if behind_an_open_transaction:
            write(early, 1)
        db.execute(
            "INSERT INTO syncd.outbox (source, op, key) SELECT 7, 'k', i FROM generate_series(1, "
            "50000) AS i"
        )
        db.execute("ANALYZE syncd.outbox")
        position = Cursor(Position(snapshot(db), 0))
        write(db, 2, 3)
        like_a_pass(db)
        for name, bounds in outbox.key_queries(position):
            plan = explained(db, name, [*bounds, outbox.array([SOURCE]), str(PAGE_ROWS)])
            assert pages_of(plan) < 50, json.dumps(plan, indent=1)


def explained(db: psycopg.Connection, name: str, parameters: Sequence[str]) -> dict[str, object]:
    """The plan of a statement of a pass as it ran: one for all parameters."""
    parts = statement("passes", name).split("%s")
    text = "".join(f"{part}${number}" for number, part in enumerate(parts[:-1], 1)) + parts[-1]
    db.execute(f"PREPARE explained AS {text}".encode())
    values = ", ".join(sql.Literal(each).as_string(None) for each in parameters)
    row = db.execute(
        f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE explained ({values})".encode()
    ).fetchone()
    db.execute("DEALLOCATE explained")
    assert row is not None
    plan = row[0][0]["Plan"]
    assert isinstance(plan, dict)
    assert "$1" in json.dumps(plan), "the plan knows its parameters"
    return plan


def pages_of(plan: dict[str, object]) -> int:
    """Pages that a query read."""
    return sum(int(str(plan[name])) for name in ("Shared Hit Blocks", "Shared Read Blocks"))


def scans(plan: dict[str, object]) -> list[dict[str, object]]:
    """Nodes of a plan that read a table."""
    below = plan.get("Plans", [])
    assert isinstance(below, list)
    mine = [plan] if "Relation Name" in plan else []
    return mine + [scan for each in below for scan in scans(each)]


def like_a_pass(db: psycopg.Connection) -> None:
    """The settings of a pass's session."""
    db.execute(session_settings(db))
    db.execute("SET statement_timeout = 0")


@pytest.mark.parametrize("analyzed", [True, False])
def test_a_page_of_one_large_transaction_is_read_by_its_index_in_every_slot(
    db: psycopg.Connection, analyzed: bool
) -> None:
    """Also without statistics, as after a large transaction or after a slot was freed."""
    for slot in range(3):
        db.execute(
            "INSERT INTO syncd.outbox (slot, source, op, key) SELECT %s, 7, 'k', i FROM "
            "generate_series(1, 2000) AS i",
            [slot],
        )
    early = Cursor(Position(Snapshot(1, 1, frozenset()), 0))
    with db.transaction():
        for slot in range(3):
            db.execute(
                "INSERT INTO syncd.outbox (slot, source, op, key) "
                "SELECT %s, 7, 'k', i FROM generate_series(1, 40000) AS i",
                [slot],
            )
    if analyzed:
        db.execute("ANALYZE syncd.outbox")
    like_a_pass(db)
    cursor = early
    for _ in range(8):  # into the middle of the large transaction
        cursor = read_changes(db, Asked(cursor, [SOURCE], 2000), snapshot(db)).cursor
    assert cursor.window is not None
    [(name, bounds)] = outbox.key_queries(cursor)
    plan = explained(db, name, [*bounds, outbox.array([SOURCE]), str(PAGE_ROWS)])
    found = scans(plan)
    assert {scan["Relation Name"] for scan in found} == {"outbox_0", "outbox_1", "outbox_2"}
    for scan in found:
        assert scan["Node Type"] == "Index Scan", json.dumps(plan, indent=1)
        assert f"outbox_{str(scan['Relation Name'])[-1]}_xid_id_idx" == scan["Index Name"]
        assert "ROW(xid, id) > ROW(" in str(scan["Index Cond"])
    assert pages_of(plan) < 50, json.dumps(plan, indent=1)


def test_a_plan_made_while_the_outbox_was_empty_reads_a_page_of_a_large_one(
    db: psycopg.Connection,
) -> None:
    """A session keeps its plans, so a service that started early has such plans."""
    db.execute("VACUUM ANALYZE syncd.outbox_0, syncd.outbox_1, syncd.outbox_2")
    like_a_pass(db)
    first = Asked(Cursor(Position(Snapshot(1, 1, frozenset([1])), 0)), [SOURCE], PAGE_ROWS)
    window = Window(Snapshot(10**9, 10**9, frozenset()), (2, 2))
    later = Asked(Cursor(first.cursor.position, window), [SOURCE], PAGE_ROWS)
    queries = [*first.queries(), *later.queries()]
    for number, query in enumerate(queries):
        db.execute(b"PREPARE kept_%d AS %s" % (number, query.text))
        db.execute(b"EXECUTE " + kept(number, query))
    db.execute(
        "INSERT INTO syncd.outbox (source, op, key) SELECT 7, 'k', i FROM generate_series(1, "
        "50000) AS i"
    )
    for number, query in enumerate(queries):
        row = db.execute(
            b"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE " + kept(number, query)
        ).fetchone()
        assert row is not None
        assert pages_of(row[0][0]["Plan"]) < 50, json.dumps(row[0], indent=1)


def kept(number: int, query: Query) -> bytes:
    """A prepared statement with its parameters, for EXECUTE."""
    values = ", ".join(sql.Literal(each).as_string(None) for each in query.parameters)
    return f"kept_{number} ({values})".encode()


@pytest.mark.parametrize("in_progress", [frozenset(), frozenset([1])])
def test_a_look_for_markers_does_not_read_a_large_transaction(
    db: psycopg.Connection, in_progress: frozenset[int]
) -> None:
    db.execute(
        "INSERT INTO syncd.outbox (source, op, key) SELECT 7, 'k', i FROM generate_series(1, "
        "100000) AS i"
    )
    like_a_pass(db)
    bounds = outbox.unseen(Snapshot(1, 1, in_progress))
    plan = explained(db, "read_markers", [*bounds, outbox.array([SOURCE])])
    assert pages_of(plan) < 50, json.dumps(plan, indent=1)
    plan = explained(db, "read_marked", bounds)
    found = scans(plan)
    assert "outbox_0" in {scan["Relation Name"] for scan in found}
    assert sum(map(pages_of, found)) < 50, json.dumps(plan, indent=1)


@pytest.mark.parametrize(
    "rows", [200_000, pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)
def test_a_pass_behind_an_old_transaction_costs_at_most_twice_as_much(
    db: psycopg.Connection, database: str, rows: int
) -> None:
    """The two are measured in turn, each with the same few new rows."""
    with psycopg.connect(database) as early:
        write(early, -1)
        for _ in range(20):
            db.execute(
                "INSERT INTO syncd.outbox (source, op, key) SELECT 7, 'k', i FROM "
                "generate_series(1, %s::int) AS i",
                [rows // 20],
            )
        behind = snapshot(db)
        assert behind.in_progress
        nothing_open = Snapshot(behind.xmax, behind.xmax, frozenset())
        like_a_pass(db)
        seconds: dict[Snapshot, list[float]] = {behind: [], nothing_open: []}
        for number in range(150):
            write(db, number)
            for position in (behind, nothing_open) if number % 2 else (nothing_open, behind):
                begun = time.perf_counter()
                with db.transaction():
                    db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                    cursor = Cursor(Position(position, 0))
                    found = read_changes(db, Asked(cursor, [SOURCE], 5000), snapshot(db)).rows
                seconds[position].append(time.perf_counter() - begun)
                assert found == number + 1
    # Other programs on the machine only add to a time: the lower quartile has least of them.
    quartiles = {each: statistics.quantiles(taken)[0] for each, taken in seconds.items()}
    ratio = quartiles[behind] / quartiles[nothing_open]
    print(
        f"{rows} rows behind an open transaction: {ratio:.2f} times the cost, "
        f"{quartiles[behind] * 1e3:.2f} ms"
    )
    assert ratio < 2
