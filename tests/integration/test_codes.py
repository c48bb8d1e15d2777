"""A large dataset is searched by codes and stays in step: its report, its files, damaged files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psycopg
import pytest

from syncd.client.client import Client
from syncd.protocol.status_messages import DatasetStatus
from tests.daemon import Daemon
from tests.faults.following import logged, until

DIM, ROWS = 16, 3000
SMALL = {
    "syncd.index.build.plan.EXACT_ROWS": (1000, 1000),
    "syncd.index.build.plan.TAIL_ELEMENTS": 1,
    "syncd.index.build.plan.TAIL_ROWS": 200,
    "syncd.index.build.plan.LEAST_DEAD_SLOTS": 500,
    "syncd.index.build.measuring.CHEAPER_THAN_EXACT": 1e9,  # no settings would be with few rows
    "syncd.rpc.in_place.SHORT_ELEMENTS": 0,
    "syncd.rpc.in_place.LONGER_ELEMENTS": 0,
    "syncd.index.build.measuring.QUERIES": {10: 150, 40: 15, 100: 15, 1000: 5},
    "syncd.sync.background.builder.LOOK_SECONDS": 0.02,
    "syncd.sync.background.builder.NICENESS": 0,  # a test waits for it
}


@pytest.fixture
def small(daemon: Daemon, db: psycopg.Connection) -> Daemon:
    """A syncd, not started: codes from a thousand rows on, each search through the queue."""
    for name, value in SMALL.items():
        daemon.with_constant(name, value)
    db.execute(f"CREATE TABLE items (id int PRIMARY KEY, v vector({DIM}))")
    db.execute("SELECT syncd.attach('items', metric => 'l2')")
    return daemon


def put(db: psycopg.Connection, start: int, stop: int, version: int = 0) -> str:
    """Write rows; returns the token of the transaction."""
    vectors = np.random.default_rng([start, stop, version]).standard_normal((stop - start, DIM))
    rows = [f"[{','.join(f'{number:.6f}' for number in vector)}]" for vector in vectors.tolist()]
    found = db.execute(
        "WITH put AS (INSERT INTO items SELECT * FROM unnest(%s::int[], %s::text[]::vector[]) "
        "ON CONFLICT (id) DO UPDATE SET v = excluded.v) SELECT syncd.token()",
        [list(range(start, stop)), rows],
    ).fetchone()
    assert found is not None
    return str(found[0])


def status(client: Client) -> DatasetStatus:
    (dataset,) = client.datasets()
    return dataset


def until_index(client: Client, kind: str) -> None:
    until(lambda: status(client).index == kind, kind)


def recall(client: Client, queries: int = 200, wanted: float | None = None) -> float:
    """Recall@10 of the service's answers to vectors that are not rows."""
    vectors = np.random.default_rng(99).standard_normal((queries, DIM)).astype(np.float32)
    found = client.search("items", vectors=vectors, k=10, recall=wanted)
    exact = client.search("items", vectors=vectors, k=10, exact=True)
    shares = [
        len({hit.key for hit in one} & {hit.key for hit in other})
        for one, other in zip(found, exact, strict=True)
    ]
    return float(np.mean(shares)) / 10


def test_a_dataset_grows_into_codes_and_every_change_counts_at_once(
    small: Daemon, db: psycopg.Connection
) -> None:
    put(db, 0, 900)
    small.start()
    with small.client() as client:
        assert (status(client).index, status(client).recall) == ("exact", 1.0)
        client.wait(put(db, 900, ROWS))
        until_index(client, "codes")
        there = status(client)
        assert there.recall is not None
        assert 0.95 <= there.recall <= 1.0
        assert there.bytes > ROWS * DIM * 4
        assert recall(client) >= 0.95
        assert recall(client, wanted=0.5) < 1.0
        assert recall(client, wanted=1.0) == 1.0
        # An update and a deletion count right after their commit.
        client.wait(put(db, 7, 8, version=1))
        (moved,) = client.get("items", [7], vectors=True)
        assert client.search("items", moved.vector, k=1)[0].key == 7
        (old,) = client.get("items", [8], vectors=True)
        db.execute("DELETE FROM items WHERE id = 8")
        assert client.search("items", old.vector, k=1, consistency="strong")[0].key != 8
        assert [hit.key for hit in client.search("items", key=7, k=5) if hit.key == 7] == []
        assert len(client.search("items", moved.vector, k=ROWS)) == ROWS - 1
        assert client.verify(deep=True).datasets[0].in_sync
        small.stop()
    small.start()
    with small.client() as client:
        assert status(client).index == "codes"
        assert recall(client) >= 0.95
    assert (
        sum(
            "what=train" in line or '"what": "train"' in line
            for line in small.log.read_text().splitlines()
        )
        == 1
    )


def test_recall_is_that_of_the_queries_that_are_asked(
    small: Daemon, db: psycopg.Connection
) -> None:
    small.with_constant("syncd.index.build.measuring.QUERIES", {10: 300, 40: 9, 100: 9, 1000: 3})
    put(db, 0, ROWS)
    small.start()
    with small.client() as client:
        until_index(client, "codes")
        assert status(client).recall_of == "rows"
        assert client.recall("items").of == "rows"
        queries = np.random.default_rng(5).standard_normal((350, DIM)).astype(np.float32) * 0.2
        for query in queries[:150]:
            client.search("items", query)
        client.search("items", vectors=queries[150:], recall=0.9)
        until(lambda: status(client).recall_of == "queries", "measured on the queries")
        there = status(client)
        assert there.recall is not None
        assert there.recall >= 0.95
        measured = client.recall("items")
        assert (measured.of, measured.queries) == ("queries", 350)
        for each in measured.targets:
            assert each.mean >= each.target
            assert each.least <= each.p5 <= 1.0
        others = np.random.default_rng(6).standard_normal((300, DIM)).astype(np.float32) * 0.2
        found = client.search("items", vectors=others, recall=0.95)
        exact = client.search("items", vectors=others, exact=True)
        shares = [
            len({hit.key for hit in one} & {hit.key for hit in other}) / 10
            for one, other in zip(found, exact, strict=True)
        ]
        assert np.mean(shares) >= 0.95
        assert abs(np.mean(shares) - there.recall) < 0.03
    assert logged(small, "recall_missed") == 0


def test_damaged_codes_are_never_served(small: Daemon, db: psycopg.Connection) -> None:
    put(db, 0, ROWS)
    small.start()
    with small.client() as client:
        until_index(client, "codes")
    small.stop()
    for path in small.data_dir.glob("*/*/*/*-codes-*.ivf"):
        content = bytearray(path.read_bytes())
        content[-100] ^= 1
        path.write_bytes(content)
    small.start()
    with small.client() as client:
        assert logged(small, "codes_damaged") == 1
        until_index(client, "codes")
        assert recall(client) >= 0.95
        assert client.verify().datasets[0].in_sync
    assert logged(small, "dataset_damaged") == 0


def test_large_vector_files_are_read_after_the_start_and_a_damaged_dataset_again_from_the_table(
    small: Daemon, db: psycopg.Connection
) -> None:
    put(db, 0, ROWS)
    small.with_constant("syncd.index.generation.generation.CHECK_AT_LOAD_BYTES", 0)
    # Small chunks: only full ones are read after the start.
    defaults = {"half": False, "dim": None, "name": "", "chunk_bytes": 1 << 16}
    small.with_constant("syncd.index.dataset.DatasetIndex.create.__func__.__kwdefaults__", defaults)
    small.start()
    small.stop()
    small.start()
    with small.client() as client:
        until(lambda: status(client).verified, "verified")
    small.stop()
    path = min(files(small.data_dir))
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    small.start()
    with small.client() as client:
        until(lambda: logged(small, "rebuilt") > 0, "rebuilt")
        until(lambda: status(client).verified, "verified")
        assert client.verify(deep=True).datasets[0].in_sync
    assert logged(small, "dataset_damaged") == 1


def test_exact_search_meets_a_recall_target_of_1(small: Daemon, db: psycopg.Connection) -> None:
    put(db, 0, ROWS)
    small.settings["recall"] = 1
    small.start()
    with small.client() as client:
        until_index(client, "exact")
        assert recall(client) == 1.0
        assert status(client).recall == 1.0
        assert recall(client, wanted=0.6) >= 0.6


def test_the_space_of_old_row_versions_is_given_back(small: Daemon, db: psycopg.Connection) -> None:
    put(db, 0, 1500)
    small.start()
    with small.client() as client:
        until_index(client, "codes")
        client.checkpoint()
        for version in range(1, 4):
            client.wait(put(db, 0, 1500, version))
        until(lambda: status(client).tombstones <= 1500, "fewer tombstones than rows")
        until_index(client, "codes")
        assert recall(client) >= 0.95
        assert client.verify(deep=True).datasets[0].in_sync
        until(lambda: logged(small, "compact") > 0, "a compaction in the log")
        client.checkpoint()
        client.wait(put(db, 0, 1, 9))
        client.checkpoint()
        generations = {path.name.split("-")[0] for path in files(small.data_dir)}
        assert "0001" not in generations
        small.stop()
    small.start()
    with small.client() as client:
        assert client.verify(deep=True).datasets[0].in_sync


def files(data_dir: Path) -> list[Path]:
    return list(data_dir.glob("*/*/*/*-vectors-*"))
