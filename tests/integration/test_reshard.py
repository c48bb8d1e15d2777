"""Another number of shards, and back, while rows are written and searched for."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from tests.faults.resharding import Load, reshard_killed
from tests.oracle.sharded import Cluster, start_all, until_layout

WRITES_PER_SECOND = 500


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(3))
def test_two_shards_become_three_and_two_again_under_writes_and_kills(
    database: str, tmp_path: Path, seed: int
) -> None:
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("CREATE TABLE numbers (id bigint PRIMARY KEY, v real[])")
        db.execute("SELECT syncd.attach('numbers', metric => 'l2')")
        db.execute("INSERT INTO numbers SELECT i, ARRAY[i, 1] FROM generate_series(1, 10000) i")
        cluster = Cluster(database, tmp_path / "cluster", seed, of=2)
        old = cluster.shards
        load = Load(database, cluster, rate=WRITES_PER_SECOND, seed=seed)
        try:
            cluster.start()
            with cluster.client() as client, load.running():
                for of in (3, 2):
                    new = cluster.make_shards(of)
                    cluster.shards = [*old, *new]
                    start_all(new)
                    reshard_killed(database, of, tmp_path / f"steps-{of}")
                    until_layout(client, of)
                    for each in old:
                        each.stop()
                    cluster.shards = old = new
                    db.execute("DELETE FROM syncd.consumers WHERE layout <> %s", [of])
            print(f"{load.rows} rows written in {load.seconds:.0f} s, {load.reads} own ones read")
            assert load.wrong == []
            (token,) = db.execute("SELECT syncd.token()").fetchone() or ("",)
            keys = [key for (key,) in db.execute("SELECT id FROM numbers").fetchall()]
            with cluster.client() as client:
                client.wait(token, timeout_ms=60_000)
                assert sorted(client.keys("numbers")) == sorted(keys)
                assert all(row.in_sync for row in client.verify(deep=True).datasets)
        finally:
            for each in cluster.parts:
                if each.process is not None:
                    each.kill()
