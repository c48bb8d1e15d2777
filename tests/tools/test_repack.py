"""pg_repack copies a table, applies changes to the copy by its own trigger, and swaps the files."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.daemon import Daemon
from tests.faults.altered import Followed, writers
from tests.faults.following import logged
from tests.servers import PostgresServer
from tests.tools.following import WRITES, assert_in_sync


@pytest.mark.parametrize(
    "options",
    [["--table=items"], ["--table=items", "--order-by=v"], ["--table=items", "--only-indexes"]],
    ids=["by primary key", "in another order", "only indexes"],
)
def test_a_table_that_pg_repack_repacks_under_writers_is_followed(
    debian: PostgresServer,
    database: str,
    extension: Callable[[str, str], None],
    followed: Followed,
    options: list[str],
) -> None:
    extension("pg_repack", "postgresql-15-repack")
    with writers(database, WRITES):
        for _ in range(3):
            before = files(followed)
            repack(debian, database, *options)
            now = files(followed)
            assert before["items_pkey"] != now["items_pkey"]
            assert (before["items"] != now["items"]) == ("--only-indexes" not in options)
    assert_in_sync(followed)


def test_pg_repack_of_the_whole_database_takes_syncd_s_own_tables_along_and_the_next_start_compares(
    debian: PostgresServer,
    database: str,
    extension: Callable[[str, str], None],
    followed: Followed,
    daemon: Daemon,
) -> None:
    """pg_repack's transaction wrote the copy of ``syncd.checkpoints``: it proves no checkpoint."""
    extension("pg_repack", "postgresql-15-repack")
    followed.client.checkpoint()
    with writers(database, WRITES):
        repack(debian, database)
    assert_in_sync(followed)
    daemon.kill()
    repack(debian, database)
    followed.db.execute("UPDATE items SET v = '{3,3,3}' WHERE id = 3")
    daemon.start()
    assert_in_sync(followed)
    assert logged(daemon, "does not hold the checkpoint's nonce") > 0


def repack(server: PostgresServer, conninfo: str, *options: str) -> None:
    to = conninfo_to_dict(conninfo)
    command = [
        server.bindir / "pg_repack",
        "-h",
        to["host"],
        "-p",
        to["port"],
        "-U",
        to["user"],
        "-d",
        to["dbname"],
    ]
    done = subprocess.run(
        [*map(str, command), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr


def files(followed: Followed) -> dict[str, int]:
    """The file of the table and of its index."""
    return dict(
        followed.db.execute(
            "SELECT relname, relfilenode::int8 FROM pg_class WHERE relname IN ('items', "
            "'items_pkey')"
        ).fetchall()
    )
