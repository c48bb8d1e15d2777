"""The rules that write, as applications do.

Transactions are short, and up to three stay open over many steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import psycopg
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from psycopg import errors as pg

from tests.oracle.tables import (
    ANCHORED_TOPIC,
    BY_NAME,
    DIMENSION,
    ITEMS,
    MISFITS,
    SHELVES,
    TOPICS,
    Table,
    Vectors,
    bad_vectors,
)

BULK = (10_000, 16_000)
"""Numbers of the rows of one large write: more than a page of the outbox, and some of a scan."""

LOCK_TIMEOUT = "300ms"
LONG_SESSIONS = (1, 2, 3)
NUMBERS = 40

REFUSED = (pg.LockNotAvailable, pg.UniqueViolation, pg.SerializationFailure)
"""Errors of a write that is then undone as a whole.

An open session holds the rows or has moved them to another partition, or a key is taken.
"""

wheres = st.sampled_from((0, 0, 0, *LONG_SESSIONS))
tables = st.sampled_from(sorted(BY_NAME))
partitions = st.sampled_from(sorted(SHELVES.partitions)[:-1])
topics = st.sampled_from(TOPICS)
numbers = st.lists(st.integers(0, NUMBERS - 1), min_size=1, max_size=8, unique=True)
one_number = st.integers(0, NUMBERS - 1)
seeds = st.integers(0, 10_000)
misfits = st.sampled_from(MISFITS)

Write = Callable[[psycopg.Connection], object]


class Writes(RuleBasedStateMachine):
    """The rules. A subclass knows the database."""

    conninfo: str
    counts: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.connection: psycopg.Connection | None = None
        self.sessions: dict[int, psycopg.Connection] = {}

    @property
    def db(self) -> psycopg.Connection:
        """The connection of short transactions; a new one after a crash."""
        if self.connection is None:
            self.connection = self.connect(autocommit=True)
        return self.connection

    def connect(self, *, autocommit: bool) -> psycopg.Connection:
        connection = psycopg.connect(
            self.conninfo, autocommit=autocommit, options=f"-c lock_timeout={LOCK_TIMEOUT}"
        )
        connection.prepare_threshold = None
        return connection

    def write(self, where: int, work: Write) -> None:
        """Run ``work`` in a transaction, or in the long one of a session. A refusal undoes it."""
        if where == 0:
            connection = self.db
        elif where in self.sessions:
            connection = self.sessions[where]
        else:
            connection = self.sessions[where] = self.connect(autocommit=False)
            connection.execute("SELECT 1")  # from here on ``transaction`` is a savepoint
        self.counts["writes"] += 1
        try:
            with connection.transaction():
                work(connection)
        except REFUSED:
            self.counts["refused"] += 1

    def execute(self, where: int, query: str, parameters: Sequence[Any]) -> None:
        """Run one statement."""
        self.write(where, lambda connection: run(connection, query, parameters))

    def rows(
        self, table: Table, where: int, some: Sequence[int], topic: str | None, seed: int
    ) -> list[tuple[int, str | None, str | None]]:
        """New rows, with vectors made from ``seed``."""
        vectors = make_vectors(seed, len(some))
        return [
            (n, topic, table.literal(vector.tolist()))
            for n, vector in zip(own(where, some), vectors, strict=True)
        ]

    @rule(where=wheres, name=tables, some=numbers, topic=topics, seed=seeds)
    def insert(self, where: int, name: str, some: list[int], topic: str | None, seed: int) -> None:
        table = BY_NAME[name]
        rows = self.rows(table, where, some, topic, seed)
        conflict = "ON CONFLICT DO NOTHING" if table.can_upsert else ""
        self.write(where, lambda connection: table.insert(connection, rows, conflict))

    @rule(where=wheres, name=tables, some=numbers, topic=topics, seed=seeds)
    def upsert(self, where: int, name: str, some: list[int], topic: str | None, seed: int) -> None:
        table = BY_NAME[name]
        rows = self.rows(table, where, some, topic, seed)

        def work(connection: psycopg.Connection) -> None:
            if table.can_upsert:
                table.insert(
                    connection,
                    rows,
                    f"ON CONFLICT ({table.key_columns}) "
                    "DO UPDATE SET v = excluded.v, topic = excluded.topic",
                )
            else:
                run(connection, f"DELETE FROM {table.name} WHERE n = ANY (%s)", [own(where, some)])
                table.insert(connection, rows)

        self.write(where, work)

    @rule(where=wheres, name=tables, some=numbers, seed=seeds)
    def update_vectors(self, where: int, name: str, some: list[int], seed: int) -> None:
        table = BY_NAME[name]
        rows = self.rows(table, where, some, None, seed)

        def work(connection: psycopg.Connection) -> None:
            run(
                connection,
                f"UPDATE {table.name} AS t SET v = r.v::{table.vector_type} "
                "FROM unnest(%s::integer[], %s::text[]) AS r (n, v) WHERE t.n = r.n",
                [[n for n, _, _ in rows], [vector for _, _, vector in rows]],
            )

        self.write(where, work)

    @rule(where=wheres, name=tables, some=numbers)
    def set_vectors_to_null(self, where: int, name: str, some: list[int]) -> None:
        self.execute(where, f"UPDATE {name} SET v = NULL WHERE n = ANY (%s)", [own(where, some)])

    @rule(where=wheres, name=tables, some=numbers, topic=topics)
    def move_to_dataset(self, where: int, name: str, some: list[int], topic: str | None) -> None:
        self.execute(
            where, f"UPDATE {name} SET topic = %s WHERE n = ANY (%s)", [topic, own(where, some)]
        )

    @rule(where=wheres, name=tables, one=one_number, other=one_number)
    def change_key(self, where: int, name: str, one: int, other: int) -> None:
        [old, new] = own(where, [one, other])
        table = BY_NAME[name]
        self.execute(where, f"UPDATE {name} SET {table.set_key(f'({new})')} WHERE n = %s", [old])

    @rule(where=wheres, name=tables, one=one_number, other=one_number)
    def swap_keys(self, where: int, name: str, one: int, other: int) -> None:
        [one, other] = own(where, [one, other])
        table = BY_NAME[name]

        def work(connection: psycopg.Connection) -> None:
            if not table.can_upsert:  # deferrable: both at once
                swap = (
                    f"UPDATE {name} SET {table.set_key(f'({one + other} - n)')} WHERE n IN (%s, %s)"
                )
                run(connection, swap, [one, other])
                return
            for old, new in ((one, 777_777), (other, one), (777_777, other)):
                run(
                    connection, f"UPDATE {name} SET {table.set_key(f'({new})')} WHERE n = %s", [old]
                )

        self.write(where, work)

    @rule(where=wheres, name=tables, back=st.booleans())
    def shift_keys(self, where: int, name: str, back: bool) -> None:
        """``id = id + 1000`` for many rows in one statement, or back."""
        first = own(where, [0])[0] + (1000 if back else 0)
        change = "(n - 1000)" if back else "(n + 1000)"
        self.execute(
            where,
            f"UPDATE {name} SET {BY_NAME[name].set_key(change)} WHERE n >= %s AND n < %s",
            [first, first + NUMBERS],
        )

    @rule(where=wheres, name=tables, some=numbers, deleted=st.booleans())
    def soft_delete(self, where: int, name: str, some: list[int], deleted: bool) -> None:
        value = "now()" if deleted else "NULL"
        self.execute(
            where, f"UPDATE {name} SET deleted_at = {value} WHERE n = ANY (%s)", [own(where, some)]
        )

    @rule(where=wheres, name=tables, some=numbers)
    def delete(self, where: int, name: str, some: list[int]) -> None:
        self.execute(where, f"DELETE FROM {name} WHERE n = ANY (%s)", [own(where, some)])

    @rule(name=tables, topic=topics)
    def delete_dataset(self, name: str, topic: str | None) -> None:
        self.execute(
            0, f"DELETE FROM {name} WHERE n >= 0 AND topic IS NOT DISTINCT FROM %s", [topic]
        )

    @rule(name=tables, some=numbers, topic=topics, seed=seeds, commit=st.booleans())
    def truncate(
        self, name: str, some: list[int], topic: str | None, seed: int, commit: bool
    ) -> None:
        """Truncate, with rows written before and after in the same transaction."""
        table = BY_NAME[name]
        rows = self.rows(table, 0, some, topic, seed)

        def work(connection: psycopg.Connection) -> None:
            run(connection, f"UPDATE {name} SET v = v WHERE n = ANY (%s)", [some])
            run(connection, f"TRUNCATE {name}", [])
            table.put_anchors(connection)
            table.insert(connection, rows[1:])
            self.counts["truncates"] += 1
            if not commit:
                undo()

        self.write(0, work)

    @rule(partition=partitions, some=numbers, topic=topics, seed=seeds, commit=st.booleans())
    def truncate_partition(
        self, partition: str, some: list[int], topic: str | None, seed: int, commit: bool
    ) -> None:
        """Truncate one partition; the others keep their rows."""
        rows = self.rows(SHELVES, 0, some, topic, seed)

        def work(connection: psycopg.Connection) -> None:
            SHELVES.insert(connection, rows[:1], "ON CONFLICT DO NOTHING")
            run(connection, f"TRUNCATE {partition}", [])
            SHELVES.insert(connection, rows[1:], "ON CONFLICT DO NOTHING")
            self.counts["partition_truncates"] += 1
            if not commit:
                undo()

        self.write(0, work)

    @rule(where=wheres, name=tables, some=numbers, topic=topics, seed=seeds)
    def roll_back_to_a_savepoint(
        self, where: int, name: str, some: list[int], topic: str | None, seed: int
    ) -> None:
        """Keep the first and the last part of the rows; roll the middle back."""
        table = BY_NAME[name]
        rows = self.rows(table, where, some, topic, seed)

        def work(connection: psycopg.Connection) -> None:
            run(connection, f"DELETE FROM {name} WHERE n = ANY (%s)", [own(where, some)])
            table.insert(connection, rows[:1])
            with connection.transaction():
                table.insert(connection, rows[1:])
                run(connection, f"DELETE FROM {name} WHERE n = %s", [rows[0][0]])
                with connection.transaction():
                    run(
                        connection,
                        f"UPDATE {name} SET topic = 'b' WHERE n = ANY (%s)",
                        [own(where, some)],
                    )
                undo()
            table.insert(connection, rows[2:])

        self.write(where, work)

    @rule(where=wheres, name=tables, some=numbers, topic=topics, seed=seeds)
    def roll_back(
        self, where: int, name: str, some: list[int], topic: str | None, seed: int
    ) -> None:
        table = BY_NAME[name]
        rows = self.rows(table, where, some, topic, seed)

        def work(connection: psycopg.Connection) -> None:
            run(connection, f"DELETE FROM {name} WHERE n = ANY (%s)", [own(where, some)])
            table.insert(connection, rows)
            undo()

        self.write(where, work)

    @rule(where=wheres, name=tables, some=numbers, seed=seeds)
    def spoil(self, where: int, name: str, some: list[int], seed: int) -> None:
        """Set vectors that cannot be indexed; other rules repair them."""
        table = BY_NAME[name]
        if table.is_array:
            bad = bad_vectors(table)
            query = f"UPDATE {name} SET v = %s::{table.vector_type} WHERE n = ANY (%s)"
            self.execute(where, query, [bad[seed % len(bad)], own(where, some)])

    @rule(name=tables, n=misfits, right=st.booleans(), seed=seeds)
    def put_misfit(self, name: str, n: int, right: bool, seed: int) -> None:
        """Set a vector of another length, or repair the same row."""
        table = BY_NAME[name]
        if table.is_array:
            vector = make_vectors(seed, 1)[0].tolist()

            def work(connection: psycopg.Connection) -> None:
                run(connection, f"DELETE FROM {name} WHERE n = %s", [n])
                table.insert(
                    connection,
                    [(n, ANCHORED_TOPIC, table.literal(vector if right else vector[:3]))],
                )

            self.write(0, work)

    @rule(seed=seeds)
    def write_many(self, seed: int) -> None:
        """Insert more rows than a page holds, or delete them the next time."""

        def work(connection: psycopg.Connection) -> None:
            cursor = run(connection, "DELETE FROM items WHERE n >= %s AND n < %s", BULK)
            if cursor.rowcount == 0:
                topic = TOPICS[seed % len(TOPICS)]
                vectors = make_vectors(seed, BULK[1] - BULK[0]).tolist()
                rows = [
                    (n, topic, ITEMS.literal(vector))
                    for n, vector in zip(range(*BULK), vectors, strict=True)
                ]
                ITEMS.insert(connection, rows)

        self.write(0, work)

    @precondition(lambda self: self.sessions)
    @rule(which=st.integers(0, len(LONG_SESSIONS) - 1))
    def commit_session(self, which: int) -> None:
        """Commit in any order, so that an older transaction often commits last."""
        connection = self.sessions.pop(sorted(self.sessions)[which % len(self.sessions)])
        connection.commit()
        connection.close()
        self.counts["long_commits"] += 1

    @precondition(lambda self: self.sessions)
    @rule(which=st.integers(0, len(LONG_SESSIONS) - 1))
    def roll_back_session(self, which: int) -> None:
        connection = self.sessions.pop(sorted(self.sessions)[which % len(self.sessions)])
        connection.rollback()
        connection.close()
        self.counts["long_rollbacks"] += 1

    def close_connections(self) -> None:
        """Forget every connection, dead or not."""
        with ExitStack() as stack:
            for connection in self.sessions.values():
                stack.callback(connection.close)
            if self.connection is not None:
                stack.callback(self.connection.close)
        self.sessions.clear()
        self.connection = None


def run(connection: psycopg.Connection, query: str, parameters: Any) -> psycopg.Cursor[Any]:
    """Run a statement that is composed here."""
    return connection.execute(query.encode(), parameters)


def undo() -> None:
    """Roll the innermost transaction or savepoint back.

    It is not typed ``NoReturn``: for mypy, code follows.
    """
    raise psycopg.Rollback


def fetch(connection: psycopg.Connection, query: str) -> str:
    """One value as text."""
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return str(row[0])


def own(where: int, some: Sequence[int]) -> list[int]:
    """Row numbers of a session's own, so that no session waits for another's rows."""
    return [100 * where + n for n in some]


def make_vectors(seed: int, count: int) -> Vectors:
    """Vectors that can be indexed; with even seeds they are on a grid, so that distances tie."""
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSION))
    if seed % 2 == 0:
        vectors = vectors.round()
        vectors[:, 0] += 0.5
    return vectors
