"""pg_upgrade makes a cluster of a newer version from an older one, and the service resumes.

xids, sequences and table identifiers stay the same.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from syncd.postgres.embedded.account import as_account, server_account
from tests.conftest import TEMPLATE, has_pgvector, prepare
from tests.daemon import Daemon
from tests.faults.following import applied, assert_in_step, attach_tables, change, logged
from tests.oracle.tables import DOCS, ITEMS, Table
from tests.servers import PostgresServer, Version, bindir
from tests.tools.following import skip_unless_runnable

DATABASE = "app"


@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
@pytest.mark.parametrize(("old", "new"), [(15, 16), (15, 18), (16, 18)])
def test_a_service_resumes_on_a_cluster_that_pg_upgrade_has_made(
    tmp_path: Path, old: Version, new: Version, restarted: bool
) -> None:
    skip_unless_runnable(old, "pg_upgrade")
    skip_unless_runnable(new, "pg_upgrade")
    tables = (ITEMS, DOCS) if has_pgvector(old) else (DOCS,)
    with (
        PostgresServer(old, tmp_path, tcp=True) as before,
        following(before, tables, tmp_path) as daemon,
    ):
        address = daemon.conninfo
        with daemon.client() as client:
            client.checkpoint()
        applied(daemon, change(address, seed=2, tables=tables))  # the checkpoint lacks it
        if restarted:
            daemon.kill()
            change(address, seed=3, tables=tables)
        xid = next_xid(before)
        skip_unless_dumped(before, new)
        before.stop()
        after = PostgresServer(new, tmp_path, tcp=True, port=before.port)
        try:
            upgrade(before, after)
            after.start()
            assert next_xid(after) >= xid
            if restarted:
                daemon.start()
            assert_in_step(address, daemon, tables)
            change(address, seed=4, tables=tables)
            assert_in_step(address, daemon, tables)
            with daemon.client() as client:
                verified = client.verify().datasets
            assert verified
            assert [each for each in verified if not each.in_sync] == []
            assert logged(daemon, "reconciling") == 0
            daemon.stop()
        finally:
            after.remove()


@contextmanager
def following(server: PostgresServer, tables: Sequence[Table], folder: Path) -> Iterator[Daemon]:
    """A service in step with a database of the server."""
    prepare(server, pgvector=has_pgvector(server.version))
    attach_tables(server.create_database(DATABASE, TEMPLATE), tables)
    daemon = Daemon(server.conninfo(DATABASE, tcp=True), folder / "data", verify_seconds=0)
    try:
        yield daemon.start()
    finally:
        if daemon.process is not None:
            daemon.kill()


def next_xid(server: PostgresServer) -> int:
    [(xmax,)] = server.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text", DATABASE)
    return int(xmax)


def upgrade(before: PostgresServer, after: PostgresServer) -> None:
    """Make the newer cluster from the older one, both stopped."""
    # version 18 has checksums by default, and pg_upgrade needs the same in both clusters
    after.create(*(["--no-data-checksums"] if after.version >= 18 else []))
    programs = ["-b", before.bindir, "-B", after.bindir]
    clusters = ["-d", before.folder / "cluster", "-D", after.folder / "cluster"]
    options = ["-U", "postgres", "-s", after.folder, "-p", after.port]
    done = subprocess.run(
        [after.bindir / "pg_upgrade", *map(str, [*programs, *clusters, *options])],
        capture_output=True,
        text=True,
        check=False,
        **as_account(server_account(after.folder), after.folder),
    )
    logs = (after.folder / "cluster" / "pg_upgrade_output.d").rglob("*.log")
    assert done.returncode == 0, "\n".join(
        [done.stdout, done.stderr, *(log.read_text()[-2000:] for log in logs)]
    )


def skip_unless_dumped(server: PostgresServer, new: Version) -> None:
    """Skip the test if the new version's ``pg_dump`` does not know the option ``pg_attver``.

    From 15.20 on, each column has it, and such a ``pg_dump`` makes dumps that no server restores.
    """
    [(marked,)] = server.execute(
        "SELECT count(*) FROM pg_attribute WHERE attoptions::text LIKE '%pg_attver=%'", DATABASE
    )
    if marked and b"pg_attver" not in (bindir(new) / "pg_dump").read_bytes():
        pytest.skip(
            f"pg_dump of this PostgreSQL {new} does not know the option pg_attver that this "
            f"{server.version} gives columns"
        )
