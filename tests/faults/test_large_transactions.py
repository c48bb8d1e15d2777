"""One very large transaction is applied in bounded memory, and resumes after a kill."""

from __future__ import annotations

import re
from pathlib import Path

import psycopg
import pytest

from syncd.client.client import Client
from tests.conftest import clone
from tests.daemon import Daemon
from tests.faults.following import until
from tests.faults.rotation import assert_in_step, following, make_items, value
from tests.servers import PostgresServer


def peak_bytes(daemon: Daemon) -> int:
    """Peak memory of the process, in bytes."""
    assert daemon.process is not None
    lines = Path(f"/proc/{daemon.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def count(client: Client) -> int:
    return sum(each.count for each in client.datasets() if each.dataset == "default/items")


@pytest.mark.parametrize(
    "rows", [100_000, pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
def test_one_large_transaction_goes_on_where_a_kill_left_it(
    server: PostgresServer, database: str, items: psycopg.Connection, tmp_path: Path, rows: int
) -> None:
    with following(database, tmp_path / "data", checkpoint_seconds=3600) as daemon:
        daemon.with_constant("syncd.postgres.outbox.PAGE_ROWS", 1000)
        daemon.start()
        items.execute(
            "INSERT INTO items SELECT i, ARRAY[i, 1] FROM generate_series(1, %s::int) AS i", [rows]
        )
        with daemon.client() as client:
            waiting: set[int | None] = set()

            def has_an_eighth() -> bool:
                waiting.add(client.status().lag_rows)
                return count(client) > rows / 8

            until(has_an_eighth, "an eighth of the rows is indexed", seconds=300)
            client.checkpoint()
            assert any(0 < each < rows for each in waiting if each is not None), waiting
        daemon.kill()
        first = value(
            items,
            "SELECT min(id) FROM syncd.outbox "
            "WHERE xid = (SELECT max(xid) FROM syncd.outbox WHERE op = 'k')",
        )
        items.execute(
            f"ALTER DATABASE {value(items, 'SELECT current_database()')} SET log_statement = 'all'"
        )
        logged = server.log.stat().st_size
        daemon.start()
        page = re.search(
            r"SELECT o\.xid::text::bigint(.*?)LIMIT.*?DETAIL: +(?:P|p)arameters: (.*?)$",
            server.log.read_text()[logged:],
            re.DOTALL | re.MULTILINE,
        )
        assert page is not None
        place = re.search(r"\(o\.xid, o\.id\) > \(\$\d+::xid8, \$(\d+)::bigint\)", page[1])
        assert place is not None, "the start resumes from the checkpoint"
        after = re.search(rf"\${place[1]} = '(\d+)'", page[2])
        assert after is not None
        assert int(after[1]) > first + rows / 10
        with daemon.client() as client:
            assert_in_step(client, items)
        daemon.stop()


@pytest.mark.parametrize(
    "rows", [100_000, pytest.param(1_000_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
def test_one_large_transaction_takes_no_more_memory_than_many_small_ones(
    server: PostgresServer, tmp_path: Path, rows: int
) -> None:
    peaks = []
    for transactions in (rows // 1000, 1):
        for database in clone(server):
            with psycopg.connect(database, autocommit=True) as db:
                make_items(db)
                with following(
                    database, tmp_path / f"data{transactions}", checkpoint_seconds=3600
                ) as daemon:
                    daemon.start()
                    each = rows // transactions
                    for first in range(1, rows, each):
                        db.execute(
                            "INSERT INTO items SELECT i, ARRAY[i, 1] "
                            "FROM generate_series(%s::int, %s::int) AS i",
                            [first, first + each - 1],
                        )
                    with daemon.client() as client:
                        assert_in_step(client, db, seconds=300)
                    peaks.append(peak_bytes(daemon))
    print(f"many small transactions: {peaks[0] >> 20} MiB at most, one large: {peaks[1] >> 20} MiB")
    assert peaks[1] < peaks[0] * 1.2
