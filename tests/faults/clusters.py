"""Servers that are copied, restored and promoted."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psycopg

from tests.conftest import TEMPLATE, prepare
from tests.faults.following import until
from tests.servers import PostgresServer

DATABASE = "app"


@cache
def pattern() -> PostgresServer:
    """A server that is not running; the others are copies of its files, which is quicker than making them anew."""
    server = PostgresServer(18, tcp=True).start()
    prepare(server, pgvector=True)
    server.create_database(DATABASE, TEMPLATE)
    server.stop()
    return server


@contextmanager
def primary(directory: Path, **settings: str) -> Iterator[PostgresServer]:
    """A server on TCP with a database of schema syncd, which a standby may follow."""
    server = PostgresServer(18, directory, tcp=True, settings=settings)
    shutil.copytree(pattern().folder / "cluster", server.folder / "cluster", symlinks=True)
    give(server.folder)
    with server:
        yield server


@contextmanager
def base_backup(of: PostgresServer, *, follows: bool) -> Iterator[PostgresServer]:
    """A server made from a base backup, started: a standby where it ``follows``, else a clone that goes its own way."""
    copy = PostgresServer(18, of.folder, tcp=True, settings={"hot_standby": "on"})
    try:
        cluster = copy.folder / "cluster"
        subprocess.run(
            [of.bindir / "pg_basebackup", "-d", of.conninfo(), "-D", cluster, "--no-sync", "-c", "fast", "-R"],
            check=True, capture_output=True,
        )  # fmt: skip
        if not follows:
            (cluster / "standby.signal").unlink()
        give(copy.folder)
        yield copy.start()
    finally:
        copy.remove()


def give(folder: Path) -> None:
    """Hand a cluster's files to the account that owns its folder: the tests may be root's, PostgreSQL must not be."""
    owner = folder.stat()
    for path in (folder / "cluster", *(folder / "cluster").rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def set_aside(server: PostgresServer) -> Path:
    """A cold copy of a server's files, as a backup would have them; the server runs on."""
    server.stop()
    copy = server.folder / "backup"
    shutil.copytree(server.folder / "cluster", copy, symlinks=True)
    server.start()
    return copy


def put_back(server: PostgresServer, copy: Path) -> None:
    """The server becomes what it was when the copy was made."""
    server.stop("immediate")
    cluster = server.folder / "cluster"
    for path in list(
        cluster.iterdir()
    ):  # the directory itself stays: a running server is known by it
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(copy, cluster, symlinks=True, dirs_exist_ok=True)
    give(server.folder)
    server.start()


def caught_up(standby: PostgresServer, server: PostgresServer) -> None:
    """Return once a standby has replayed all that its primary has written."""
    [(wanted,)] = server.execute("SELECT pg_current_wal_lsn()::text")
    until(
        lambda: (
            standby.execute(f"SELECT pg_last_wal_replay_lsn() >= '{wanted}'::pg_lsn") == [(True,)]
        ),
        "the standby has all of the primary",
    )


def stop_following(standby: PostgresServer) -> None:
    """The standby hears nothing from its primary any more."""
    standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
    standby.execute("SELECT pg_reload_conf()")
    until(
        lambda: standby.execute("SELECT count(*) FROM pg_stat_wal_receiver") == [(0,)],
        "the standby is cut off",
    )


def promote(standby: PostgresServer) -> None:
    """The standby becomes a primary."""
    with psycopg.connect(standby.conninfo(), autocommit=True) as connection:
        connection.execute("SELECT pg_promote()")
