"""Maintenance of whole tables and databases while a service follows them.

Administrators and PostgreSQL's own programs do it.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.daemon import Daemon
from tests.faults.altered import Followed, eventually, make_items, serving, writers
from tests.faults.following import logged
from tests.servers import PostgresServer
from tests.tools.following import WRITES, assert_in_sync

PGBENCH = r"""
\set n random(1, 400)
INSERT INTO items (id, v) VALUES (:n, ARRAY[:n, 1, 1])
    ON CONFLICT (id) DO UPDATE SET v = excluded.v;
UPDATE items SET v = ARRAY[:n, 2, 3], deleted_at = NULL WHERE id = :n + 1;
DELETE FROM items WHERE id = :n + 2;
"""


def run(server: PostgresServer, conninfo: str, program: str, *options: str | Path) -> None:
    """Run one of PostgreSQL's programs on this database; it must succeed."""
    to = conninfo_to_dict(conninfo)
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
    places = {variable: str(to[name]) for name, variable in names.items()}
    done = subprocess.run(
        [server.bindir / program, *options],
        env=places | {"PATH": os.defpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_reindex_concurrently_cluster_and_vacuum_full_under_writers_are_followed(
    database: str, followed: Followed
) -> None:
    with writers(database, WRITES):
        for statement in (
            "REINDEX TABLE CONCURRENTLY items",
            "REINDEX INDEX CONCURRENTLY items_pkey",
            "CLUSTER items USING items_pkey",
            "VACUUM FULL items",
            "REINDEX TABLE CONCURRENTLY items",
        ):
            followed.db.execute(statement.encode())
    assert_in_sync(followed)


def test_a_service_resumes_after_vacuum_full_of_the_whole_database(
    debian: PostgresServer, database: str, followed: Followed, daemon: Daemon
) -> None:
    followed.client.checkpoint()
    with writers(database, WRITES):
        run(debian, database, "vacuumdb", "--full", "--freeze")
        run(debian, database, "reindexdb")
    assert_in_sync(followed)
    daemon.kill()
    run(debian, database, "vacuumdb", "--full", "--freeze")
    daemon.start()
    assert_in_sync(followed)
    assert logged(daemon, "reconciling") == 0


def test_data_that_pg_restore_loads_with_triggers_disabled_is_compared(
    debian: PostgresServer, database: str, followed: Followed, tmp_path: Path
) -> None:
    run(
        debian,
        database,
        "pg_dump",
        "--format=custom",
        "--table=items",
        f"--file={tmp_path / 'dump'}",
    )
    followed.db.execute("TRUNCATE items")
    followed.in_step()
    options = ["--data-only", "--disable-triggers", "--table=items"]
    run(debian, database, "pg_restore", *options, f"--dbname={database}", tmp_path / "dump")
    assert_in_sync(followed)


def test_rows_that_copy_freeze_writes_are_followed(followed: Followed) -> None:
    with followed.db.transaction():
        followed.db.execute("TRUNCATE items")
        with followed.db.cursor().copy("COPY items (id, v) FROM STDIN WITH (FREEZE)") as copy:
            for number in range(200):
                copy.write_row([number, [number, 1, 2]])
    assert_in_sync(followed)


def test_a_table_that_moves_to_another_tablespace_under_writers_is_followed(
    debian: PostgresServer, database: str, followed: Followed
) -> None:
    space = debian.folder / "elsewhere"
    space.mkdir()
    os.chown(space, debian.folder.stat().st_uid, debian.folder.stat().st_gid)
    followed.db.execute(f"CREATE TABLESPACE elsewhere LOCATION '{space}'".encode())
    try:
        with writers(database, WRITES):
            followed.db.execute("ALTER TABLE items SET TABLESPACE elsewhere")
        assert_in_sync(followed)
    finally:
        followed.db.execute("ALTER TABLE items SET TABLESPACE pg_default")
        followed.db.execute("DROP TABLESPACE elsewhere")
    assert_in_sync(followed)


def test_writes_through_a_new_parent_are_followed(followed: Followed) -> None:
    db = followed.db
    db.execute("CREATE TABLE parent (LIKE items)")
    db.execute(
        "BEGIN; ALTER TABLE items INHERIT parent; UPDATE parent SET v = '{9,9,9}' WHERE id = 1; "
        "COMMIT"
    )
    db.execute("DELETE FROM parent WHERE id = 2")
    assert_in_sync(followed)
    db.execute("UPDATE parent SET v = '{9,9,7}' WHERE id = 3")
    assert_in_sync(followed)
    db.execute("ALTER TABLE items NO INHERIT parent")
    db.execute("UPDATE items SET v = '{9,9,8}' WHERE id = 1")
    assert_in_sync(followed)


@pytest.mark.parametrize("protocol", ["simple", "extended", "prepared"])
def test_writes_of_pgbench_are_followed(
    debian: PostgresServer, database: str, followed: Followed, tmp_path: Path, protocol: str
) -> None:
    script = tmp_path / "script"
    script.write_text(PGBENCH)
    options = [
        "--no-vacuum",
        f"--protocol={protocol}",
        "--client=4",
        "--transactions=50",
        "--random-seed=1",
    ]
    run(debian, database, "pgbench", *options, f"--file={script}")
    assert_in_sync(followed)


def test_writes_through_a_foreign_table_of_another_database_are_followed(
    debian: PostgresServer, database: str, followed: Followed
) -> None:
    to = conninfo_to_dict(database)
    other = debian.create_database(f"foreign_{os.getpid()}")
    try:
        with psycopg.connect(other, autocommit=True) as db:
            if (
                db.execute(
                    "SELECT FROM pg_available_extensions WHERE name = 'postgres_fdw'"
                ).fetchone()
                is None
            ):
                pytest.skip("needs postgres_fdw: apt-get install postgresql-contrib")
            db.execute("CREATE EXTENSION postgres_fdw")
            place = (
                f"host '{to['host']}', port '{to['port']}', dbname '{to['dbname']}', batch_size "
                "'10'"
            )
            db.execute(
                f"CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({place})".encode()
            )
            db.execute(
                "CREATE USER MAPPING FOR postgres SERVER far OPTIONS (password_required 'false')"
            )
            db.execute("CREATE FOREIGN TABLE items (id int, v real[], deleted_at date) SERVER far")
            db.execute(
                "INSERT INTO items SELECT i, ARRAY[i, 1, 1] FROM generate_series(5000, 5030) AS i"
            )
            db.execute("UPDATE items SET v = ARRAY[id, 7, 7] WHERE id < 50")
            db.execute("UPDATE items SET id = id + 6000 WHERE id BETWEEN 51 AND 55")
            db.execute("DELETE FROM items WHERE id BETWEEN 60 AND 70")
            assert_in_sync(followed)
            db.execute("TRUNCATE items")
            with db.cursor().copy("COPY items (id, v) FROM STDIN") as copy:
                for number in range(200):
                    copy.write_row([number, [number, 1, 2]])
            assert_in_sync(followed)
    finally:
        debian.drop_database(f"foreign_{os.getpid()}")


def test_a_service_resumes_in_a_database_that_was_renamed(
    debian: PostgresServer, db: psycopg.Connection, daemon: Daemon
) -> None:
    """The service answers and logs an error with the old name, and resumes with the new one."""
    name, renamed = str(conninfo_to_dict(daemon.conninfo)["dbname"]), f"renamed_{os.getpid()}"
    make_items(db, vector="real[]")
    with serving(db, daemon) as followed:
        followed.in_step()
        followed.client.checkpoint()
        rename(debian, name, renamed)
        try:
            followed.logged("does not exist")
            assert followed.client.search("items", [1, 1, 1])
            daemon.kill()
            daemon.conninfo = make_conninfo(daemon.conninfo, dbname=renamed)
            daemon.start()
            with psycopg.connect(daemon.conninfo, autocommit=True) as followed.db:
                followed.db.execute("UPDATE items SET v = '{4,4,4}' WHERE id = 4")
                assert_in_sync(followed)
            assert logged(daemon, "reconciling") == 0
        finally:
            rename(debian, renamed, name)


def rename(server: PostgresServer, name: str, to: str) -> None:
    """Rename a database, after all clients are cut off."""

    def attempt() -> None:
        server.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
        )
        try:
            server.execute(f"ALTER DATABASE {name} RENAME TO {to}")
        except psycopg.errors.ObjectInUse as error:
            raise AssertionError(str(error)) from error

    eventually(attempt)
