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
BACKUP_OPTIONS = ("--no-sync", "-c", "fast", "-R")


@cache
def pattern() -> PostgresServer:
    """A stopped server. Other servers are copies of its files, which is quicker than initdb."""
    server = PostgresServer(18, tcp=True).start()
    prepare(server, pgvector=True)
    server.create_database(DATABASE, TEMPLATE)
    server.stop()
    return server


@contextmanager
def primary(directory: Path, **settings: str) -> Iterator[PostgresServer]:
    """A server on TCP that a standby may follow; its database has schema syncd."""
    server = PostgresServer(18, directory, tcp=True, settings=settings)
    shutil.copytree(pattern().folder / "cluster", server.folder / "cluster", symlinks=True)
    give(server.folder)
    with server:
        yield server


@contextmanager
def base_backup(of: PostgresServer, *, follows: bool) -> Iterator[PostgresServer]:
    """A running server made from a base backup.

    It is a standby if it ``follows``, and else a clone with transactions of its own.
    """
    copy = PostgresServer(18, of.folder, tcp=True, settings={"hot_standby": "on"})
    try:
        cluster = copy.folder / "cluster"
        subprocess.run(
            [of.bindir / "pg_basebackup", "-d", of.conninfo(), "-D", cluster, *BACKUP_OPTIONS],
            check=True,
            capture_output=True,
        )
        if not follows:
            (cluster / "standby.signal").unlink()
        give(copy.folder)
        yield copy.start()
    finally:
        copy.remove()


def give(folder: Path) -> None:
    """Give a cluster's files to the account that owns its folder.

    Root may run the tests, but not PostgreSQL.
    """
    owner = folder.stat()
    for path in (folder / "cluster", *(folder / "cluster").rglob("*")):
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def set_aside(server: PostgresServer) -> Path:
    """A cold backup: a copy of a server's files. The server runs again afterwards."""
    server.stop()
    copy = server.folder / "backup"
    shutil.copytree(server.folder / "cluster", copy, symlinks=True)
    server.start()
    return copy


def put_back(server: PostgresServer, copy: Path) -> None:
    """Restore a cold backup into its server."""
    server.stop("immediate")
    cluster = server.folder / "cluster"
    for path in list(cluster.iterdir()):  # the directory stays: a running server is known by it
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.copytree(copy, cluster, symlinks=True, dirs_exist_ok=True)
    give(server.folder)
    server.start()


def caught_up(standby: PostgresServer, server: PostgresServer) -> None:
    """Return once a standby has replayed all WAL of its primary."""
    [(wanted,)] = server.execute("SELECT pg_current_wal_lsn()::text")
    until(
        lambda: (
            standby.execute(f"SELECT pg_last_wal_replay_lsn() >= '{wanted}'::pg_lsn") == [(True,)]
        ),
        "the standby has replayed all WAL of the primary",
    )


def stop_following(standby: PostgresServer) -> None:
    """Cut the standby off from its primary."""
    standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
    standby.execute("SELECT pg_reload_conf()")
    until(
        lambda: standby.execute("SELECT count(*) FROM pg_stat_wal_receiver") == [(0,)],
        "the standby is cut off",
    )


def promote(standby: PostgresServer) -> None:
    """Make the standby a primary."""
    with psycopg.connect(standby.conninfo(), autocommit=True) as connection:
        connection.execute("SELECT pg_promote()")
