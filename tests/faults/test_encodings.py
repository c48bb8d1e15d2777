"""Databases of other encodings, and servers that refuse to write: what works, and the messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from syncd.errors import DatabaseError, DatabaseUnreachable
from syncd.postgres.connection import open_session, translated_errors
from syncd.statements import statement
from tests.daemon import Daemon
from tests.faults.clusters import base_backup, primary
from tests.faults.following import applied
from tests.faults.rotation import value
from tests.integration.checking import about, examine
from tests.integration.commands import assert_failed, run
from tests.servers import PostgresServer

TEXTS = {
    "LATIN1": ("Müller", "façade", "ÿ"),
    "EUC_JP": ("日本", "テスト", "ъ"),
    "WIN1251": ("ключ", "Ёж", "№"),
}


@contextmanager
def encoded(server: PostgresServer, encoding: str) -> Iterator[str]:
    """A database of this encoding."""
    name = f"encoded_{encoding.lower()}"
    server.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C'")
    try:
        yield server.conninfo(name)
    finally:
        server.drop_database(name)


@pytest.mark.parametrize("encoding", TEXTS)
def test_a_database_of_another_encoding_is_followed(
    server: PostgresServer, tmp_path: Path, encoding: str
) -> None:
    key, dataset, other = TEXTS[encoding]
    with (
        encoded(server, encoding) as conninfo,
        psycopg.connect(conninfo, autocommit=True, client_encoding="UTF8") as db,
    ):
        assert run("init", SYNCD_DSN=conninfo).returncode == 0
        db.execute(
            "CREATE TABLE items (id text, part text, embedding real[], topic text, "
            "PRIMARY KEY (id, part))"
        )
        db.execute("INSERT INTO items VALUES (%s, %s, '{1,0}', %s)", [key, other, dataset])
        attach = (
            "attach",
            "items",
            "--dataset",
            "topic",
            "--column",
            "topic",
            "--live",
            f"part <> '{dataset}'",
        )
        assert run(*attach, SYNCD_DSN=conninfo).returncode == 0
        daemon = Daemon(conninfo, tmp_path / "data")
        try:
            daemon.start()
            db.execute(
                "INSERT INTO items VALUES (%s, %s, '{1,1}', %s), (%s, %s, '{1,1}', %s)",
                [other, key, dataset, key, dataset, dataset],
            )
            applied(daemon, value(db, "SELECT syncd.token()"))
            with daemon.client() as client:
                assert [hit.key for hit in client.search(dataset, [1, 0], k=5)] == [
                    (key, other),
                    (other, key),
                ]
                assert len(client.search(dataset, [1, 0], k=5, filter={"topic": dataset})) == 2
                assert all(row.in_sync for row in client.verify(deep=True).datasets)
                client.checkpoint()
            daemon.stop()
            daemon.start()
            db.execute("DELETE FROM items WHERE id = %s", [key])
            applied(daemon, value(db, "SELECT syncd.token()"))
            with daemon.client() as client:
                assert [hit.key for hit in client.search(dataset, [1, 0], k=5)] == [(other, key)]
            daemon.stop()
        finally:
            if daemon.process is not None:
                daemon.kill()


def test_a_database_without_an_encoding_is_refused_with_the_next_command(
    server: PostgresServer, tmp_path: Path
) -> None:
    with encoded(server, "SQL_ASCII") as conninfo:
        for command in ("init", "serve"):
            done = run(command, SYNCD_DSN=conninfo, SYNCD_DATA_DIR=str(tmp_path), SYNCD_HTTP="off")
            assert_failed(
                done,
                1,
                "the database's encoding is SQL_ASCII",
                "createdb --template=template0 --encoding=UTF8",
            )
        printed = run("init", "--show-sql").stdout
        with psycopg.connect(conninfo, autocommit=True) as db:
            with pytest.raises(psycopg.Error, match="SQL_ASCII"):
                db.execute(printed.encode())
            db.execute("ROLLBACK")
            found = about(examine(db, tmp_path), "encoding")
            assert found.level == "fail"
            assert "--encoding=UTF8" in found.fix


# Read-only


def test_check_says_which_default_keeps_others_from_writing(database: str, tmp_path: Path) -> None:
    with psycopg.connect(database, autocommit=True) as db:
        db.execute(
            f'ALTER DATABASE "{db.info.dbname}" SET default_transaction_read_only = on'.encode()
        )
    with psycopg.connect(database, autocommit=True) as db:
        found = about(examine(db, tmp_path), "read-only")
        assert found.level == "warn"
        assert "not a standby" in found.detail
        assert (
            found.fix == f'ALTER DATABASE "{db.info.dbname}" RESET default_transaction_read_only;'
        )


def refuse_to_write(database: str) -> None:
    """A command that the server refuses as a write."""
    with open_session(database) as db:
        db.execute("BEGIN READ ONLY")
        db.execute("CREATE TABLE items ()")


def test_a_server_that_refuses_to_write_is_not_called_a_standby(
    database: str, tmp_path: Path
) -> None:
    with pytest.raises(DatabaseError) as refused:
        refuse_to_write(database)
    assert "refuses to write, and is not a standby" in refused.value.message
    assert "standby" not in refused.value.hint
    with primary(tmp_path) as server, base_backup(server, follows=True) as standby:
        with pytest.raises(DatabaseUnreachable) as unreachable:
            refuse_to_write(standby.conninfo())
        assert "the server is a standby: name the primary" in unreachable.value.hint
        with (
            pytest.raises(DatabaseUnreachable) as told,
            translated_errors(),
            psycopg.connect(standby.conninfo(), autocommit=True) as db,
        ):
            db.execute(statement("session", "begin"))
        assert told.value.message.startswith("the server is a standby")
        assert "name the primary" in told.value.hint
