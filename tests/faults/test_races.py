"""Writers that race: each committed change is found soon, though the fallback poll is far away.

Of several open writers only one notifies. So a change is noticed late only if syncd goes to sleep
too early. These tests send plain requests only: ``after`` and ``strong`` would wake syncd.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
import pytest

from syncd.client.client import Client
from tests.daemon import Daemon

POLL_SECONDS = 100
NOTICED_WITHIN_SECONDS = 10.0
"""A tenth of the fallback poll.

At rest a change is noticed in 30 ms; a busy machine may stop a process for seconds.
"""

ASLEEP_SECONDS = 0.5
"""After a change syncd looks often. Without a pass for this long, it sleeps."""

MOST_WRITERS = 6
ROUNDS = 300
PEEK = "syncd.sync.consumer.pace.PEEK_SECONDS"
PATIENCE = "syncd.sync.consumer.pace.OPEN_WRITER_PATIENCE_SECONDS"
LOADED_PASSES = "syncd.sync.consumer.pace.LOADED_PASSES"

Versions = dict[int, int | None]
"""The expected version in the vector of each key; None if there is no row."""


@pytest.fixture(params=[POLL_SECONDS])
def sleeper(
    request: pytest.FixtureRequest, database: str, db: psycopg.Connection, tmp_path: Path
) -> Iterator[Daemon]:
    """A syncd, not started, for table ``items``. Its poll is too rare to wake it in time.

    With the parameter ``None`` it has its usual poll.
    """
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items VALUES (0, '{0,1}')")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    poll = {} if request.param is None else {"poll_seconds": request.param}
    daemon = Daemon(database, tmp_path / "data", **poll)
    yield daemon
    if daemon.process is not None:
        daemon.kill()


@dataclass
class Plan:
    """One planned transaction: statements with pauses, and its end."""

    steps: list[tuple[str, list[object]] | float] = field(default_factory=list)
    commits: bool = True
    changes: Versions = field(default_factory=dict)


class Plans:
    """Random transactions of writers; no two writers touch the same row."""

    def __init__(self, seed: int, *, rollbacks: float) -> None:
        self.random = random.Random(seed)
        self.rollbacks = rollbacks
        self.version = 0
        self.next_key = 1
        self.rows: dict[int, Versions] = {writer: {} for writer in range(MOST_WRITERS)}

    def round(self) -> list[Plan]:
        """A burst of two to six transactions; at least one of them commits a change."""
        while True:
            plans = [self.plan(writer) for writer in range(self.random.randint(2, MOST_WRITERS))]
            if any(plan.commits and plan.changes for plan in plans):
                break
        for writer, plan in enumerate(plans):
            if plan.commits:
                self.rows[writer] |= plan.changes
        return plans

    def plan(self, writer: int) -> Plan:
        """One transaction."""
        plan = Plan(commits=self.random.random() >= self.rollbacks)
        for _ in range(self.random.randint(1, 3)):
            self.pause(plan)
            if self.random.random() < self.rollbacks:
                plan.steps.append(("SAVEPOINT part", []))
                self.change(writer, plan, {})
                self.pause(plan)
                plan.steps.append(("ROLLBACK TO SAVEPOINT part", []))
            else:
                self.change(writer, plan, plan.changes)
        self.pause(plan)
        return plan

    def pause(self, plan: Plan) -> None:
        """Often none at all, at most 20 ms."""
        if self.random.random() < 0.7:
            plan.steps.append(self.random.random() ** 2 * 0.02)

    def change(self, writer: int, plan: Plan, changes: Versions) -> None:
        """Insert a row, or update or delete a row of this writer."""
        self.version += 1
        rows = self.rows[writer] | plan.changes
        key = self.random.choice(sorted(rows)) if rows and self.random.random() < 0.5 else None
        if key is None:
            key, self.next_key = self.next_key, self.next_key + 1
        version = None if key in rows and self.random.random() < 0.4 else self.version
        if version is None:
            plan.steps.append(("DELETE FROM items WHERE id = %s", [key]))
        else:
            upsert = (
                "INSERT INTO items VALUES (%s, ARRAY[%s, 1]) "
                "ON CONFLICT (id) DO UPDATE SET v = excluded.v"
            )
            plan.steps.append((upsert, [key, version]))
        changes[key] = version


def execute(connection: psycopg.Connection, plan: Plan) -> None:
    """Run a planned transaction."""
    connection.execute("BEGIN")
    for step in plan.steps:
        if isinstance(step, float):
            time.sleep(step)
        else:
            connection.execute(step[0].encode(), step[1])
    connection.execute("COMMIT" if plan.commits else "ROLLBACK")


@contextmanager
def writers(conninfo: str) -> Iterator[Callable[[list[Plan]], None]]:
    """A function that runs a burst on connections that stay, and returns when the burst is over."""
    with ExitStack() as stack:
        connections = [
            stack.enter_context(psycopg.connect(conninfo, autocommit=True))
            for _ in range(MOST_WRITERS)
        ]
        threads = stack.enter_context(ThreadPoolExecutor(MOST_WRITERS))

        def burst(plans: list[Plan]) -> None:
            list(threads.map(execute, connections, plans))

        yield burst


def find(client: Client, keys: list[int]) -> Versions:
    """The version that the index has of each of these keys."""
    found: Versions = dict.fromkeys(keys)
    for row in client.get("items", keys, vectors=True):
        assert isinstance(row.key, int)
        assert row.vector is not None
        found[row.key] = int(row.vector[0])
    return found


def assert_noticed(client: Client, expected: Versions, what: str) -> float:
    """Ask until the index has the expected versions; returns the seconds that this took."""
    begun = time.monotonic()
    keys = sorted(expected)
    while (found := find(client, keys)) != expected:
        seconds = time.monotonic() - begun
        late = {key: (found[key], expected[key]) for key in keys if found[key] != expected[key]}
        assert seconds < NOTICED_WITHIN_SECONDS, (
            f"{what}: not noticed within {seconds:.1f} s: key: (found, committed) {late}"
        )
        time.sleep(0.001)
    return time.monotonic() - begun


def wait_until_asleep(db: psycopg.Connection) -> None:
    """Return when syncd has done no pass for a while: it only looks at its two sequences."""
    deadline = time.monotonic() + 60
    query = (
        "SELECT bool_and(state = 'idle' "
        "AND (query LIKE 'SELECT o.last_value, d.last_value FROM syncd.outbox_id%%' "
        "OR state_change < clock_timestamp() - make_interval(secs => %s))) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name LIKE 'syncd/%%'"
    )
    while (row := db.execute(query, [ASLEEP_SECONDS]).fetchone()) != (True,):
        assert time.monotonic() < deadline, f"syncd does not come to rest: {row}"
        time.sleep(0.02)


def race(burst: Callable[[list[Plan]], None], client: Client, plans: Plans, rounds: range) -> float:
    """Bursts one after the other; returns the seconds until the slowest one was noticed."""
    longest = 0.0
    for number in rounds:
        some = plans.round()
        burst(some)
        expected: Versions = {}
        for plan in some:
            if plan.commits:
                expected |= plan.changes
            else:
                committed = {
                    key: version for rows in plans.rows.values() for key, version in rows.items()
                }
                expected |= {key: committed.get(key) for key in plan.changes}
        longest = max(longest, assert_noticed(client, expected, f"round {number}"))
    return longest


with_any_poll = pytest.mark.parametrize(
    "sleeper",
    [pytest.param(None, id="usual poll"), pytest.param(POLL_SECONDS, id="no poll")],
    indirect=True,
)


@pytest.mark.timeout(240)
def test_every_commit_of_a_burst_is_noticed_though_a_fifth_rolls_back(
    database: str, db: psycopg.Connection, sleeper: Daemon
) -> None:
    sleeper.start()
    plans = Plans(1, rollbacks=0.2)
    with sleeper.client() as client, writers(database) as burst:
        for start in range(0, ROUNDS, ROUNDS // 3):
            wait_until_asleep(db)
            db.execute("UPDATE items SET v = ARRAY[%s, 1] WHERE id = 0", [start + 1])
            assert_noticed(client, {0: start + 1}, "a commit after a rest")
            longest = race(burst, client, plans, range(start, start + ROUNDS // 3))
            print(f"rounds from {start}: the longest took {longest * 1000:.0f} ms to notice")
        committed = {
            key
            for rows in plans.rows.values()
            for key, version in rows.items()
            if version is not None
        }
        assert set(client.keys("items")) == committed | {0}


@with_any_poll
def test_every_commit_of_a_burst_after_a_rest_is_noticed(
    database: str, db: psycopg.Connection, sleeper: Daemon
) -> None:
    sleeper.with_constant(PEEK, (0.1, 0.1)).start()
    plans = Plans(3, rollbacks=0.2)
    with sleeper.client() as client, writers(database) as burst:
        for number in range(15):
            wait_until_asleep(db)
            race(burst, client, plans, range(number, number + 1))


@pytest.mark.timeout(240)
def test_every_commit_of_a_burst_is_noticed_by_the_look_for_open_writers_alone(
    database: str, sleeper: Daemon
) -> None:
    """Neither the polling after a change nor the steady beat under load finds these changes."""
    sleeper.with_constant(PEEK, (0.1, 0.1)).with_constant(LOADED_PASSES, 1e9).start()
    plans = Plans(2, rollbacks=0.0)
    with sleeper.client() as client, writers(database) as burst:
        longest = race(burst, client, plans, range(ROUNDS))
        print(f"the longest took {longest * 1000:.0f} ms to notice")


@with_any_poll
def test_a_commit_is_noticed_though_the_guards_winner_rolls_back(
    database: str, db: psycopg.Connection, sleeper: Daemon
) -> None:
    sleeper.start()
    with (
        sleeper.client() as client,
        psycopg.connect(database) as winner,
        psycopg.connect(database) as loser,
    ):
        wait_until_asleep(db)
        winner.execute("INSERT INTO items VALUES (1, '{1,1}')")
        loser.execute("INSERT INTO items VALUES (2, '{2,1}')")
        winner.rollback()
        loser.commit()
        assert_noticed(client, {1: None, 2: 2}, "the loser's row")


@with_any_poll
def test_a_commit_is_noticed_though_the_guards_winner_rolls_back_to_a_savepoint(
    database: str, db: psycopg.Connection, sleeper: Daemon
) -> None:
    sleeper.start()
    with (
        sleeper.client() as client,
        psycopg.connect(database) as winner,
        psycopg.connect(database) as loser,
    ):
        wait_until_asleep(db)
        winner.execute("SAVEPOINT part")
        winner.execute("INSERT INTO items VALUES (1, '{1,1}')")
        loser.execute("INSERT INTO items VALUES (2, '{2,1}')")
        winner.execute("ROLLBACK TO SAVEPOINT part")
        loser.commit()
        assert_noticed(client, {1: None, 2: 2}, "the loser's row")
        winner.execute("INSERT INTO items VALUES (3, '{3,1}')")
        winner.commit()
        assert_noticed(client, {1: None, 2: 2, 3: 3}, "the winner's row")


@with_any_poll
def test_losers_do_not_wait_for_a_winner_that_stays_open(
    database: str, db: psycopg.Connection, sleeper: Daemon
) -> None:
    sleeper.with_constant(PATIENCE, 0.0).start()  # as if the winner had been open for long already
    with sleeper.client() as client, psycopg.connect(database) as winner:
        wait_until_asleep(db)
        winner.execute("INSERT INTO items VALUES (1, '{1,1}')")
        for key in range(2, 12):
            db.execute("INSERT INTO items VALUES (%s, ARRAY[%s, 1])", [key, key])
            assert_noticed(client, {key: key}, f"loser {key}")
        db.execute("INSERT INTO items VALUES (12, '{12,1}')")
        assert_noticed(client, {1: None, 12: 12}, "the loser after a while")
        winner.commit()
        assert_noticed(client, {1: 1}, "the winner")


@with_any_poll
def test_a_loser_that_stays_open_longer_than_anyone_looks_out_for_it_is_noticed(
    database: str, sleeper: Daemon
) -> None:
    sleeper.with_constant(PATIENCE, 0.0).start()  # as if both had been open for long already
    with (
        sleeper.client() as client,
        psycopg.connect(database) as winner,
        psycopg.connect(database) as loser,
    ):
        winner.execute("INSERT INTO items VALUES (1, '{1,1}')")
        loser.execute("INSERT INTO items VALUES (2, '{2,1}')")
        winner.commit()
        assert_noticed(client, {1: 1, 2: None}, "the winner")
        loser.commit()
        assert_noticed(client, {2: 2}, "the loser")


@with_any_poll
def test_a_transaction_that_took_a_lower_outbox_id_and_commits_later_is_noticed(
    database: str, db: psycopg.Connection, sleeper: Daemon
) -> None:
    sleeper.start()
    with sleeper.client() as client, psycopg.connect(database) as early:
        for first in range(1, 30, 3):
            early.execute("INSERT INTO items VALUES (%s, '{7,1}')", [first])
            db.execute("INSERT INTO items VALUES (%s, '{8,1}')", [first + 1])
            assert_noticed(client, {first: None, first + 1: 8}, "the later id")
            db.execute("UPDATE items SET v = '{9,1}' WHERE id = %s", [first + 1])
            assert_noticed(client, {first: None, first + 1: 9}, "a second change")
            early.commit()
            assert_noticed(client, {first: 7, first + 1: 9}, "the lower id")


def test_readers_never_see_half_of_a_transaction(
    database: str, db: psycopg.Connection, sleeper: Daemon
) -> None:
    """Transactions move an amount from one row to another: each read of all rows gets the same sum.

    Rows are many and passes frequent, so that each pass reads some rows while others change.
    """
    accounts = list(range(100, 160))
    for key in accounts:
        db.execute("INSERT INTO items VALUES (%s, '{100,1}')", [key])
    sleeper.with_constant(LOADED_PASSES, 1e9).start()
    stopped = threading.Event()

    def move(seed: int) -> int:
        chosen = random.Random(seed)
        moves = 0
        with psycopg.connect(database) as connection:
            while not stopped.is_set():
                # In order, so that no two writers wait for each other.
                payer, payee = sorted(chosen.sample(accounts, 2))
                query = "UPDATE items SET v = ARRAY[v[1] + %s, 1] WHERE id = %s"
                connection.execute(query, [1, payer])
                connection.execute(query, [-1, payee])
                connection.commit()
                moves += 1
        return moves

    with sleeper.client() as client, ThreadPoolExecutor(3) as threads:
        moving = [threads.submit(move, seed) for seed in range(3)]
        try:
            seen: set[tuple[int, ...]] = set()
            begun = time.monotonic()
            while time.monotonic() < begun + 3 or len(seen) <= 20:
                assert time.monotonic() < begun + 60, f"only {len(seen)} states were seen"
                found = find(client, accounts)
                amounts = [amount for amount in found.values() if amount is not None]
                assert sum(amounts) == 100 * len(accounts), f"half of a transaction: {found}"
                seen.add(tuple(amounts))
        finally:
            stopped.set()
        moves = sum(future.result(timeout=30) for future in moving)
    print(f"{moves} moves, {len(seen)} states seen")
