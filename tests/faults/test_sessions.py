"""Sessions inherit settings from a role, a database, a connection string or the environment.

syncd sets each setting that its SQL depends on.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import psycopg
import pytest

from syncd.apps.contents import Document
from syncd.apps.documents import Documents
from syncd.ops.look import Service, looking
from syncd.postgres import session
from syncd.postgres.connection import connect, connect_blocking, open_pass_connection, open_session
from syncd.postgres.control import Control
from syncd.settings import load_settings
from syncd.statements import statement
from syncd.sync.consumer.transaction import local_settings, session_settings
from tests.conftest import Servers, clone, has_pgvector
from tests.daemon import Daemon
from tests.faults.following import TABLES, applied, assert_in_step, attach_tables, change, until
from tests.faults.hostile import HOSTILE, ODD_SCHEMA, SOURCES, Hostile, as_options, hostile
from tests.faults.rotation import value
from tests.integration.commands import printed_json, run
from tests.servers import VERSIONS, PostgresServer, Version

PLANS = ("enable_indexscan", "enable_bitmapscan", "enable_partition_pruning", "plan_cache_mode")
REST = "idle_session_timeout"
NOT_NEEDED = (
    "escape_string_warning",
    "synchronous_commit",
    "check_function_bodies",
    "plpgsql.extra_errors",
)
BEGINNINGS = {
    "default_transaction_read_only": ("transaction_read_only", "off"),
    "default_transaction_isolation": ("transaction_isolation", "read committed"),
    "default_transaction_deferrable": ("transaction_deferrable", "off"),
}
"""Defaults that count when a transaction begins: the setting that each becomes, and its value in
syncd's transactions."""


def shown(db: psycopg.Connection, names: Iterable[str]) -> dict[str, str]:
    """Value of each of these settings; in one statement, since a session may not be idle long."""
    return dict(
        db.execute(
            "SELECT n, pg_catalog.current_setting(n) FROM pg_catalog.unnest(%s::text[]) AS s (n)",
            [list(names)],
        ).fetchall()
    )


async def shown_to(db: psycopg.AsyncConnection, name: str) -> str:
    row = await (await db.execute("SELECT pg_catalog.current_setting(%s)", [name])).fetchone()
    assert row is not None
    return str(row[0])


def bare(it: Hostile) -> dict[str, str]:
    """The settings that a session inherits."""
    with psycopg.connect(it.dsn, autocommit=True) as db:
        with_timeout = db.info.server_version >= 170_000
        return shown(db, [n for n in HOSTILE if n != "transaction_timeout" or with_timeout])


@contextmanager
def variables(it: Hostile) -> Iterator[None]:
    """Set the environment variables of a test."""
    with pytest.MonkeyPatch.context() as patch:
        for variable, text in it.environment.items():
            patch.setenv(variable, text)
        yield


@contextmanager
def passes(dsn: str) -> Iterator[psycopg.Connection]:
    """A session between two passes."""
    with open_pass_connection(dsn, "it") as db:
        db.execute(session_settings(db))
        yield db


@contextmanager
def pooled_passes(dsn: str) -> Iterator[psycopg.Connection]:
    """A session in a pass behind a pooler."""
    with open_pass_connection(dsn, "it") as db, db.transaction():
        db.execute(local_settings(db))
        yield db


@contextmanager
def verifies(dsn: str) -> Iterator[psycopg.Connection]:
    with open_pass_connection(dsn, "it") as db, db.transaction():
        db.execute(";\n".join((session.service_settings(db), statement("verify", "limits"))))
        yield db


@contextmanager
def checks(dsn: str) -> Iterator[psycopg.Connection]:
    with looking(load_settings(dsn=dsn), Service(None, ())) as look, look.transaction():
        yield look.connection


@contextmanager
def stores(dsn: str) -> Iterator[psycopg.Connection]:
    """A session of a store's pool."""
    with (
        Documents(dsn, table="public.documents", collection="a") as documents,
        documents._own.get().connection() as db,
        session.transaction(db),
    ):
        yield db


KINDS: Mapping[
    str, tuple[Callable[[str], AbstractContextManager[psycopg.Connection]], tuple[str, ...]]
] = {
    "passes": (passes, ()),
    "pooled passes": (pooled_passes, (REST,)),
    "verify": (verifies, (REST, *PLANS)),
    "check": (checks, (REST, *PLANS)),
    "one command": (connect_blocking, (REST, "search_path", *PLANS)),
    "a session of a command": (open_session, ("search_path", *PLANS)),
    "a store": (stores, (REST, "search_path", *PLANS)),
}
"""Each kind of session, and the settings that it leaves: a command resolves a table's name as its
user does."""


@pytest.mark.parametrize("source", SOURCES)
def test_each_kind_of_session_sets_the_settings_that_its_sql_depends_on(
    server: PostgresServer, source: str
) -> None:
    with hostile(server, source) as it:
        assert run("init", SYNCD_DSN=it.direct).returncode == 0
        with variables(it):
            inherited = bare(it)
            for kind, (opened, left_alone) in KINDS.items():
                with opened(it.dsn) as db:
                    found = shown(db, [*inherited, *(now for now, _ in BEGINNINGS.values())])
                for name, odd in inherited.items():
                    if name in BEGINNINGS and kind != "check":
                        now, expected = BEGINNINGS[name]
                        assert found[now] == expected, (kind, name)
                    elif name not in (*left_alone, *NOT_NEEDED, *BEGINNINGS):
                        assert found[name] != odd, (kind, name)


@pytest.mark.anyio
@pytest.mark.parametrize("source", SOURCES)
async def test_the_connection_for_reports_and_the_listener_set_it_as_well(
    server: PostgresServer, source: str
) -> None:
    with hostile(server, source) as it, variables(it):
        inherited = bare(it)
        names = [name for name in inherited if name not in (*PLANS, *NOT_NEEDED, *BEGINNINGS)]
        control = Control(it.dsn, "it", lambda: True)
        async with connect(it.dsn, "it") as listener:
            await listener.execute(session.own_session_settings(listener, "service_settings"))
            await anyio.sleep(1.2)  # longer than idle_session_timeout
            for name in names:
                assert await shown_to(listener, name) != inherited[name], name
        try:
            async with control.transaction() as db:
                for name in names:
                    assert await shown_to(db, name) != inherited[name], name
                for now, expected in BEGINNINGS.values():
                    assert await shown_to(db, now) == expected, now
        finally:
            await control.close()


INGEST = ("ingest", "--clients", "2", "--seconds", "1", "--rounds", "1", "--dim", "8")

# All of it: init, attach, serve, every command, a store

NOTES = (
    "CREATE TABLE public.notes (id text PRIMARY KEY, embedding real[], at date, score float8, "
    "span interval, path text, raw bytea)",
    "INSERT INTO public.notes SELECT 'ключ ' || i, ARRAY[i, 1], DATE '2024-01-02' + i, "
    "0.1::float8 + 0.2::float8, '1 day', E'C:\\\\tmp', '\\xff' FROM generate_series(0, 9) AS i",
)
LIVE = (
    "at > DATE '2024-01-05' AND score = 0.30000000000000004 AND span = INTERVAL '1 day' "
    "AND raw = decode('ff', 'hex')"
)
DATASET_AND_COLUMN = ("--dataset", "path", "--column", "at")


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("source", "version"),
    [
        pytest.param(
            source, version, marks=() if rank % len(VERSIONS) == turn else pytest.mark.long
        )
        for rank, source in enumerate(SOURCES)
        for turn, version in enumerate(VERSIONS)
    ],
)
def test_a_service_and_every_command_work_under_odd_settings(
    servers: Servers, source: str, version: Version, tmp_path: Path
) -> None:
    tables = TABLES if has_pgvector(version) else TABLES[1:]
    with hostile(servers.of(version), source) as it, serving(it, tmp_path) as daemon:
        direct = it.direct
        command = commands(it, daemon)
        with psycopg.connect(direct, autocommit=True) as db:
            if has_pgvector(version):
                db.execute("CREATE EXTENSION vector")
            assert command("init").returncode == 0
            assert "nothing was changed" in command("init").stderr
            attach_tables(direct, tables)
            for each in NOTES:
                db.execute(each.encode())
            attach = ["attach", "public.notes", "--live", LIVE, *DATASET_AND_COLUMN, "--json"]
            counts = {"rows": 10, "live_rows": 6, "datasets": 1}
            assert printed_json(command(*attach)) == counts
            assert printed_json(command(*attach))
            daemon.start()
            for seed in range(2, 8):
                applied(daemon, change(direct, seed, tables))
            db.execute("UPDATE public.notes SET embedding = '{NaN,1}' WHERE id = 'ключ 9'")
            db.execute(
                "INSERT INTO public.notes SELECT '日本', ARRAY[1, 2], '2030-01-01', "
                "0.1::float8 + 0.2::float8, '1 day', E'C:\\\\tmp', '\\xff'"
            )
            applied(daemon, value(db, "SELECT syncd.token()"))
            assert_in_step(direct, daemon, tables)
            with daemon.client() as client:
                keys = {hit.key for hit in client.search("C:\\tmp", [1, 2], k=20)}
                assert keys == {"日本", *(f"ключ {number}" for number in range(4, 9))}
                assert (
                    len(client.search("C:\\tmp", [1, 2], k=20, filter={"at": {"gt": "2024-01-08"}}))
                    == 3
                )
                client.checkpoint()
                assert client.verify(deep=True).datasets
                assert all(row.in_sync for row in client.verify(deep=True).datasets)
            until(
                lambda: (
                    value(db, "SELECT count(*) FROM syncd.quarantine WHERE key = 'ключ 9'") == 1
                ),
                "the row is listed in the quarantine",
            )
            until(
                lambda: value(
                    db, "SELECT bool_and(reported_at > now() - interval '10 s') FROM syncd.status"
                ),
                "reports",
            )
            for words in (
                ("status", "--json"),
                ("datasets", "--json"),
                ("verify", "--json"),
                ("checkpoint",),
                ("rebuild", "C:\\tmp"),
                ("why", "C:\\tmp"),
                ("search", "C:\\tmp", "--key", "日本"),
                ("check", "--json"),
            ):
                done = command(*words)
                assert done.returncode == 0, (words, done.stdout, done.stderr)
            with (
                variables(it),
                Documents(
                    it.dsn, table="public.documents", collection="ž", address=daemon.socket
                ) as documents,
            ):
                documents.write(
                    [Document("日", "text", {"é": [None]}), Document("b", "text")],
                    np.eye(2).tolist(),
                )
                assert [each.document.id for each in documents.search([1, 0], 2)] == ["日", "b"]
                documents.delete(["b"])
                assert [each.document for each in documents.search([1, 0], 2)] == [
                    Document("日", "text", {"é": [None]})
                ]
            daemon.stop()
            for trouble in (
                "listener_lost",
                "database_lost",
                "report_failed",
                "verify_failed",
                "triggers_not",
                "Traceback",
            ):
                assert trouble not in daemon.log.read_text()
            daemon.start()  # from the checkpoint
            assert_in_step(direct, daemon, tables)
            assert command("detach", "public.notes").returncode == 0
            daemon.stop()
            assert command("uninstall", "--yes").returncode == 0


@pytest.mark.timeout(240)
@pytest.mark.parametrize("source", ["role", pytest.param("environment", marks=pytest.mark.long)])
def test_benchmarks_work_under_odd_settings(
    server: PostgresServer, source: str, tmp_path: Path
) -> None:
    with hostile(server, source) as it:
        environment = {"SYNCD_DSN": it.dsn, "SYNCD_DATA_DIR": str(tmp_path), **it.environment}
        for words in (INGEST, ("fresh", "--commits", "5", "--writers", "2", "--dim", "8")):
            done = run("bench", *words, "--json", **environment)  # type: ignore[arg-type]
            assert printed_json(done), done.stderr
        with psycopg.connect(it.direct) as db:
            assert value(db, "SELECT to_regnamespace('syncd')") is None, "schema syncd is gone"


@pytest.mark.timeout(240)
def test_quickstart_works_in_an_odd_environment() -> None:
    with tempfile.TemporaryDirectory(prefix="syncd-") as folder:
        variables = {
            "PGOPTIONS": as_options(HOSTILE),
            "PGCLIENTENCODING": "latin1",
            "PGDATESTYLE": "SQL, DMY",
            "PGTZ": "Asia/Kathmandu",
        }
        done = run("quickstart", "--data-dir", folder, **variables)  # type: ignore[arg-type]
        assert done.returncode == 0, done.stderr
        assert "the index had it" in done.stderr


@contextmanager
def serving(it: Hostile, folder: Path) -> Iterator[Daemon]:
    """A service, not started, that connects as the role with odd settings."""
    daemon = Daemon(it.dsn, folder / "data")
    daemon.variables.update(it.environment)
    try:
        yield daemon
    finally:
        if daemon.process is not None:
            daemon.kill()
        shutil.rmtree(folder / "data", ignore_errors=True)


def commands(it: Hostile, daemon: Daemon) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line, connected as the service is."""
    where = {
        "SYNCD_DSN": it.dsn,
        "SYNCD_DATA_DIR": str(daemon.data_dir),
        "SYNCD_SOCKET": str(daemon.socket),
    }

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return run(*words, **where, **it.environment)  # type: ignore[arg-type]

    return command


# attach in the user's own session


@pytest.fixture(scope="module")
def usual(any_server: PostgresServer) -> Iterator[tuple[str, list[tuple[Any, ...]]]]:
    """A database, and the rules after attach in a session with the usual settings."""
    for conninfo in clone(any_server):
        yield conninfo, rules_of(conninfo, {})


@pytest.mark.parametrize("name", HOSTILE)
def test_attach_keeps_the_same_rules_whatever_its_session_has_set(
    usual: tuple[str, list[tuple[Any, ...]]], name: str
) -> None:
    conninfo, expected = usual
    if name == "transaction_timeout" and not has_setting(conninfo, name):
        pytest.skip("PostgreSQL 17 and later end a transaction that takes long")
    # A busy machine may need longer for a statement than a short limit.
    text = "1min" if name.endswith("_timeout") else HOSTILE[name]
    odd = {name: text} if name != "default_transaction_read_only" else {}
    assert rules_of(conninfo, odd) == expected


def has_setting(conninfo: str, name: str) -> bool:
    with psycopg.connect(conninfo) as db:
        return value(db, f"SELECT current_setting('{name}', true)") is not None


def rules_of(conninfo: str, settings: Mapping[str, str]) -> list[tuple[Any, ...]]:
    """The rules after attach, attach again and mend in a session with these settings.

    The function also checks that the table is followed.
    """
    with psycopg.connect(conninfo, autocommit=True) as plain:
        for each in (*ODD_SCHEMA, *NOTES):
            plain.execute(each.encode())
        with psycopg.connect(conninfo, options=as_options(settings), autocommit=True) as db:
            db.execute("SET client_encoding = 'UTF8'")  # the test's own words
            arguments = [
                "public.notes",
                "path || extract(year FROM at)",
                LIVE.replace("DATE '2024-01-05'", "'20240105'::date"),
                ["at"],
            ]
            attach = "SELECT syncd.attach(%s, dataset => %s, live => %s, columns => %s)"
            db.execute(attach, arguments)
            (before,) = plain.execute(
                "SELECT id FROM syncd.sources WHERE source = 'public.notes'::regclass"
            ).fetchone() or (0,)
            db.execute(attach, arguments)
            plain.execute(
                f"ALTER TABLE public.notes DISABLE TRIGGER syncd_{before}_insert".encode()
            )
            assert value(db, "SELECT syncd.mend('public.notes')") is True
            assert value(db, f"SELECT count(*) FROM syncd.missing_triggers({before})") == 0
            found = plain.execute(
                "SELECT a.key, a.vector, a.project, a.dataset, a.live, a.columns, a.column_kinds, "
                "a.key_types FROM syncd.attachments AS a WHERE a.id = %s",
                [before],
            ).fetchall()
            assert found, "attached again, it is as it was"
            db.execute(
                "UPDATE public.notes SET embedding = '{5,5}' WHERE path LIKE '%tmp' AND score > 0"
            )
            changed = "SELECT count(DISTINCT key) FROM syncd.outbox"
            assert value(plain, f"{changed} WHERE source = {before} AND op = 'k'") == 10
            assert value(db, "SELECT syncd.detach('public.notes')") is True
        plain.execute("DROP TABLE public.notes; DROP SCHEMA odd CASCADE; TRUNCATE syncd.outbox")
    return found
