"""Statements that are asked as one message, and what stays prepared in the session."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from syncd.postgres import batch
from syncd.postgres.batch import Kept, PreparingConnection, Query, ask
from syncd.postgres.connection import open_pass_connection
from syncd.postgres.identity import read_incarnation
from syncd.sync.consumer.passes import Pass
from syncd.sync.consumer.progress import NOWHERE

RUN_ID = "00000000-0000-0000-0000-000000000001"


@pytest.fixture
def session(database: str) -> Iterator[PreparingConnection]:
    """A pass's own session."""
    with open_pass_connection(database, "it") as connection:
        connection.kept = Kept()
        yield connection


def prepared(session: PreparingConnection) -> int:
    """Number of statements that the server has prepared for a session."""
    ((number,),) = session.execute("SELECT count(*) FROM pg_prepared_statements").fetchall()
    return int(number)


def test_answers_come_in_order_and_a_statement_is_prepared_once(
    session: PreparingConnection,
) -> None:
    add = Query(b"SELECT $1::int + 1")
    for number in range(3):
        one, two, nothing = ask(
            session,
            Query(add.text, [str(number)]),
            Query(add.text, ["10"], binary=True),
            Query(b"SET TIME ZONE 'UTC'", prepare=False),
        )
        assert (one, two, nothing) == ([(number + 1,)], [(11,)], [])
    assert prepared(session) == 1


def test_after_an_error_the_session_goes_on_with_what_was_prepared(
    session: PreparingConnection,
) -> None:
    good, bad, late = Query(b"SELECT 1"), Query(b"SELECT no_such_column"), Query(b"SELECT 2")
    for _ in range(2):
        with pytest.raises(psycopg.errors.UndefinedColumn, match="no_such_column"):
            ask(session, good, bad, late)
        assert prepared(session) == 1
    assert ask(session, late, good) == [[(2,)], [(1,)]]
    assert prepared(session) == 2


def test_only_the_statements_that_were_used_last_stay_prepared(
    session: PreparingConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "KEPT_STATEMENTS", 3)
    for number in range(10):
        assert ask(session, Query(b"SELECT 0"), Query(b"SELECT %d" % number)) == [
            [(0,)],
            [(number,)],
        ]
        assert prepared(session) <= 3
    assert session.kept is not None
    assert b"SELECT 0" in session.kept.names


def test_a_pass_goes_on_if_its_statements_were_deallocated(
    db: psycopg.Connection, session: PreparingConnection
) -> None:
    """A server, or a pooler between two clients of one session, may do so at any time."""
    db.execute("INSERT INTO syncd.consumers (name, run_id) VALUES ('it', %s)", [RUN_ID])
    this = Pass(session, "it", RUN_ID, read_incarnation(session), NOWHERE, pooled=False)
    for _ in range(2):
        assert this.run([]).took_snapshot
        session.execute("DEALLOCATE ALL")
