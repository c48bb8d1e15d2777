"""Rights of each role, and secrets that are never shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg
from psycopg.conninfo import make_conninfo

from syncd.client.client import connect
from syncd.errors import RequestError, Unauthorized
from syncd.postgres import schema
from tests.daemon import Daemon
from tests.integration.commands import run
from tests.scrape import events, get, wait_for_event
from tests.servers import PostgresServer

ROLES = ("installer", "follower", "keeper", "writer", "reader", "stranger")
SECRETS = {
    "password": "s3cret-dsn-w0rd",
    "token": "s3cret-t0ken-w0rd",
    "webhook": "s3cret-hook-w0rd",
    "guess": "wr0ng-token-guess",
}


@dataclass(frozen=True)
class Installed:
    """A database in which each role has exactly the rights that syncd/docs/use.md gives it.

    The installer may create in the database and runs ``init``. The follower is a member of the
    installer and may read the table: ``serve`` connects as the follower. The keeper owns the table
    and may use the schema. The writer may write the table, the reader may read syncd's views, and
    the stranger may connect.
    """

    server: PostgresServer
    conninfo: str

    def as_role(self, role: str) -> str:
        return make_conninfo(self.conninfo, user=role)

    def run(self, role: str, *arguments: str) -> None:
        done = run(*arguments, SYNCD_DSN=self.as_role(role))
        assert done.returncode == 0, (done.stdout, done.stderr)


@pytest.fixture(scope="module")
def installed(server: PostgresServer) -> Iterator[Installed]:
    name = "roles"
    for role in ROLES:
        server.execute(f"CREATE ROLE {role} LOGIN")
    try:
        it = Installed(server, server.create_database(name))
        server.execute("GRANT installer TO follower")
        server.execute(f"GRANT CREATE ON DATABASE {name} TO installer", name)
        server.execute("CREATE SCHEMA app", name)
        server.execute("CREATE TABLE app.items (id int PRIMARY KEY, v real[])", name)
        server.execute(
            "INSERT INTO app.items SELECT i, ARRAY[i, 1] FROM generate_series(1, 20) AS i", name
        )
        server.execute("ALTER TABLE app.items OWNER TO keeper", name)
        server.execute("GRANT USAGE ON SCHEMA app TO keeper, writer, follower", name)
        server.execute("GRANT SELECT ON app.items TO follower", name)
        server.execute(
            "GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON app.items TO writer", name
        )
        schema.install(it.as_role("installer"))
        server.execute("GRANT USAGE ON SCHEMA syncd TO keeper, reader", name)
        server.execute(
            "GRANT SELECT ON syncd.status, syncd.quarantine, syncd.sources TO reader", name
        )
        it.run("keeper", "attach", "app.items", "--metric", "l2")
        yield it
    finally:
        server.drop_database(name)
        for role in ROLES:
            server.execute(f"DROP ROLE {role}")


@pytest.fixture(scope="module")
def following(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(
        installed.as_role("follower"), tmp_path_factory.mktemp("roles") / "data"
    ).start()
    yield daemon
    if daemon.process is not None:
        daemon.stop()


def test_the_follower_follows_verifies_repairs_rebuilds_and_saves(
    installed: Installed, following: Daemon
) -> None:
    with (
        following.client() as client,
        psycopg.connect(installed.as_role("writer"), autocommit=True) as writer,
    ):
        writer.execute("INSERT INTO app.items VALUES (100, '{100,1}')")
        writer.execute("UPDATE app.items SET v = '{200,1}' WHERE id = 1")
        writer.execute("DELETE FROM app.items WHERE id = 2")
        with psycopg.connect(installed.as_role("follower"), autocommit=True) as db:
            row = db.execute("SELECT syncd.token()").fetchone()
            assert row is not None
        assert [hit.key for hit in client.search("items", [200.0, 1.0], k=2, after=row[0])] == [
            1,
            100,
        ]
        assert all(each.in_sync for each in client.verify(repair=True, deep=True).datasets)
        assert client.rebuild("items").rows == 20
        client.checkpoint()
    following.stop()
    following.start()
    assert not events(following, "reconciling")
    installed.run("follower", "check")


@pytest.mark.parametrize(
    ("role", "arguments"),
    [
        ("follower", ["attach", "app.items", "--metric", "ip"]),
        ("writer", ["detach", "app.items"]),
        ("keeper", ["serve", "--once"]),
        ("installer", ["uninstall", "--yes"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_role_without_the_right_is_refused_with_exit_1_and_the_next_command(
    installed: Installed, tmp_path: Path, role: str, arguments: list[str]
) -> None:
    done = run(
        *arguments,
        SYNCD_DSN=installed.as_role(role),
        SYNCD_DATA_DIR=str(tmp_path),
        SYNCD_HTTP="off",
    )
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "query",
    ["SELECT * FROM app.items", "SELECT * FROM syncd.sources", "SELECT * FROM syncd.outbox"],
)
def test_a_stranger_sees_nothing(installed: Installed, query: str) -> None:
    with (
        psycopg.connect(installed.as_role("stranger")) as db,
        pytest.raises(pg.InsufficientPrivilege),
    ):
        db.execute(query.encode())


def test_a_reader_sees_the_reports_of_services_and_neither_rows_nor_the_outbox(
    installed: Installed, following: Daemon
) -> None:
    assert following.process is not None
    with psycopg.connect(installed.as_role("reader"), autocommit=True) as db:
        assert db.execute("SELECT DISTINCT consumer FROM syncd.status").fetchall() == [("default",)]
        assert ("app.items",) in db.execute("SELECT source::text FROM syncd.sources").fetchall()
        assert db.execute("SELECT key, reason FROM syncd.quarantine").fetchall() == []
        for query in (
            "SELECT * FROM app.items",
            "SELECT * FROM syncd.outbox",
            "SELECT * FROM syncd.embeddings",
        ):
            with pytest.raises(pg.InsufficientPrivilege):
                db.execute(query.encode())


def test_a_writer_needs_no_right_on_schema_syncd_and_gets_none(installed: Installed) -> None:
    with psycopg.connect(installed.as_role("writer")) as db:
        db.execute("TRUNCATE app.items")
        db.execute(
            "INSERT INTO app.items VALUES (1, '{1,1}') ON CONFLICT (id) DO UPDATE SET v = "
            "excluded.v"
        )
        with pytest.raises(pg.InsufficientPrivilege):
            db.execute("SELECT * FROM syncd.status")
        db.rollback()


def test_the_keeper_may_attach_but_not_change_the_outbox(installed: Installed) -> None:
    for query in (
        "DELETE FROM syncd.outbox",
        "INSERT INTO syncd.outbox (slot, source, op) VALUES (0, 1, 't')",
    ):
        with (
            psycopg.connect(installed.as_role("keeper")) as db,
            pytest.raises(pg.InsufficientPrivilege),
        ):
            db.execute(query.encode())


# Secrets


def test_no_secret_is_in_a_log_a_page_an_answer_or_config(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("CREATE TABLE t (id int PRIMARY KEY, v real[])")
        db.execute("SELECT syncd.attach('t')")
        db.execute("INSERT INTO t VALUES (1, '{1,2}')")
    dsn = make_conninfo(database, password=SECRETS["password"])
    daemon = Daemon(
        dsn,
        tmp_path / "data",
        http="127.0.0.1:0",
        listen="127.0.0.1:0",
        token=SECRETS["token"],
        webhook_url=f"http://127.0.0.1:9/{SECRETS['webhook']}",
    )
    daemon.with_constant("syncd.ops.webhook.RETRY_SECONDS", ()).start("--verbose")
    seen: list[str] = []
    address = f"tcp://127.0.0.1:{events(daemon, 'listening')[-1]['address'].rpartition(':')[2]}"
    with pytest.raises(Unauthorized) as refused:
        connect(address, token=SECRETS["guess"])
    seen.append(repr(refused.value) + str(refused.value))
    away = daemon.data_dir.with_name("away")
    with connect(address, token=SECRETS["token"]) as client, daemon.client() as local:
        daemon.data_dir.rename(away)
        with pytest.raises(RequestError) as failed:
            client.checkpoint()
        away.rename(daemon.data_dir)
        seen += [
            str(failed.value),
            repr(client),
            json.dumps(str(client.status())),
            str(client.datasets()),
            str(local.why("t")),
        ]
        assert wait_for_event(daemon, "webhook_failed")["alert"] == "checkpoint_failed"
        lose_database(database, until=lambda: bool(events(daemon, "database_lost")))
        seen += [
            get(daemon, path)[1]
            for path in ("/", "/live", "/status", "/readyz", "/metrics", "/?dataset=t&key=1")
        ]
    daemon.stop()
    settings: dict[str, Any] = {
        name: value for name, value in daemon.environment.items() if name.startswith("SYNCD_")
    }
    done = run("check", **settings)
    seen += [done.stdout, done.stderr]
    seen.append(daemon.log.read_text())
    for name, secret in SECRETS.items():
        assert not [text for text in seen if secret in text], name


def lose_database(database: str, until: Callable[[], bool]) -> None:
    """Terminate syncd's connections until it has noticed."""
    with psycopg.connect(database, autocommit=True) as db:
        while not until():
            db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = "
                "current_database() AND application_name LIKE 'syncd/%'"
            )
