"""Tokens: a reader waits for the write of a token, but not for tokens of another history."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import psycopg
import pytest

from syncd.errors import InvalidParams, TimedOut
from syncd.statements import statement
from syncd.types import Token
from tests.daemon import Daemon
from tests.servers import PostgresServer, fetch

TOKEN = "SELECT syncd.token()"  # noqa: S105 - no password
HISTORY = "SELECT syncd.history()"


@pytest.fixture
def items(db: psycopg.Connection, daemon: Daemon) -> Daemon:
    """A syncd that follows a table."""
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v real[])")
    db.execute("INSERT INTO items VALUES (1, '{1,0}')")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    return daemon.start()


def test_every_role_with_usage_gets_a_token_that_names_transaction_and_history(
    any_db: psycopg.Connection,
) -> None:
    with any_db.transaction(force_rollback=True):
        any_db.execute(
            "CREATE ROLE plain; GRANT USAGE ON SCHEMA syncd TO plain; SET LOCAL ROLE plain"
        )
        xid, token, again = any_db.execute(
            "SELECT pg_current_xact_id()::text, syncd.token(), syncd.token()"
        ).fetchone() or ("", "", "")
        assert token == again
        assert re.fullmatch(rf"{xid}\.[0-9a-f]{{8}}\.\d+", token)
        assert Token.parse(token).xid == int(xid)


def test_a_reader_waits_for_a_write_of_this_history_until_it_is_committed(
    items: Daemon, db: psycopg.Connection, database: str
) -> None:
    with items.client() as client, psycopg.connect(database) as writer:
        writer.execute("INSERT INTO items VALUES (2, '{2,0}')")
        row = writer.execute(TOKEN).fetchone()
        assert row is not None
        # Version 0.1.0 wrote only the transaction id.
        for given in (row[0], row[0].partition(".")[0]):
            with pytest.raises(TimedOut, match="does not include transaction"):
                client.search("items", [2, 0], after=given, timeout_ms=200)
        writer.commit()
        for given in (row[0], row[0].partition(".")[0]):
            assert client.search("items", [2, 0], k=1, after=given)[0].key == 2
    for number in range(3, 20):
        db.execute("INSERT INTO items VALUES (%s, ARRAY[%s, 0])", [number, number])
        with items.client() as client:
            assert (
                client.search("items", [number, 0], k=1, after=fetch(database, TOKEN))[0].key
                == number
            )


def test_a_token_of_another_database_makes_no_reader_wait(
    items: Daemon, server: PostgresServer, database: str
) -> None:
    """Also a token of a copy by template, whose transaction ids are this server's.

    The transaction stays open: a reader that waited for it would time out.
    """
    copy = server.create_database("copied", "syncd_template")
    try:
        with psycopg.connect(copy) as writer, items.client() as client:
            row = writer.execute(TOKEN).fetchone()
            assert row is not None
            assert fetch(copy, HISTORY) != fetch(database, HISTORY)
            for given in (row[0], f"{10**12}.0123abcd.5"):
                assert [hit.key for hit in client.search("items", [1, 0], after=given)] == [1]
                client.wait(given)
    finally:
        server.drop_database("copied")


def test_a_token_beyond_this_servers_transactions_makes_no_reader_wait(
    items: Daemon, database: str
) -> None:
    """A failover that loses commits, or a database turned back in time, leaves such tokens."""
    history = fetch(database, HISTORY)
    with items.client() as client:
        given = f"{10**12}.{history}"
        client.wait(given)
        assert [hit.key for hit in client.search("items", [1, 0], after=given)] == [1]
        with pytest.raises(TimedOut):  # without a history it may be a future transaction
            client.wait(f"{10**12}", timeout_ms=200)


def test_a_restored_copy_names_no_history_until_it_has_its_own(
    server: PostgresServer, database: str, tmp_path: Path
) -> None:
    """Its tokens must not name the history that the dump brought along."""
    dump = tmp_path / "dump"
    subprocess.run([server.bindir / "pg_dump", "-Fc", "-f", dump, "-d", database], check=True)
    restored = server.create_database("restored_tokens")
    follower = Daemon(restored, tmp_path / "restored")
    try:
        subprocess.run(
            [server.bindir / "pg_restore", "--exit-on-error", "-d", restored, dump], check=True
        )
        early = fetch(restored, TOKEN)
        assert early.isdigit()
        follower.start()
        assert fetch(restored, TOKEN).partition(".")[2] not in ("", fetch(database, HISTORY))
        with follower.client() as client:
            client.wait(early)
            client.wait(fetch(restored, TOKEN))
            client.wait(f"{10**12}.{fetch(database, HISTORY)}")
    finally:
        if follower.process is not None:
            follower.stop()
        server.drop_database("restored_tokens")


def test_a_token_is_given_while_a_consumer_renews_the_identity(
    any_db: psycopg.Connection, any_database: str
) -> None:
    with psycopg.connect(any_database) as consumer:
        consumer.execute(statement("consumer", "lock_identity"))
        any_db.execute("SET statement_timeout = '20s'")
        assert any_db.execute(TOKEN).fetchone() is not None


def test_an_identity_that_another_consumer_renewed_is_noticed_by_the_next_pass(
    items: Daemon, db: psycopg.Connection, database: str
) -> None:
    """Readers wait for tokens of the new identity, and every table is compared."""
    db.execute("DELETE FROM syncd.meta; INSERT INTO syncd.meta DEFAULT VALUES")
    with items.client() as client, psycopg.connect(database) as writer:
        writer.execute("INSERT INTO items VALUES (2, '{2,0}')")
        row = writer.execute(TOKEN).fetchone()
        assert row is not None
        deadline = time.monotonic() + 60
        waited = False
        while not waited and time.monotonic() < deadline:
            try:
                client.wait(row[0], timeout_ms=500)
            except TimedOut:
                waited = True
        assert waited
        writer.commit()
        client.wait(row[0])
        assert [hit.key for hit in client.search("items", [2, 0], k=1)] == [2]
    assert "the database was restored from a dump" in items.log.read_text()


@pytest.mark.parametrize(
    "given",
    ["", "x", "1.", "1.x", "-1", "1.0123abcd", "1.0123abcd.", "1.0123ABCD.5", "٣", "9" * 21],
)
def test_text_that_is_not_a_token_is_refused(items: Daemon, given: str) -> None:
    with (
        items.client() as client,
        pytest.raises(InvalidParams, match="is not a valid token") as caught,
    ):
        client.wait(given)
    assert "SELECT syncd.token()" in caught.value.hint
