"""Real vectors, loaded by COPY: exact searches find the neighbours of brute force.

Other searches find the share of them that they ask for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
from numpy.typing import NDArray
from psycopg import sql

from syncd.bench.environment import copy_vectors
from tests.daemon import Daemon
from tests.faults.following import until

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
BLOCK_ROWS = 2000


@pytest.mark.parametrize(
    ("name", "queries"),
    [
        ("mnist-784-l2", 200),
        pytest.param("sift-1m-128-l2", 200, marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_the_exact_top_ten_is_that_of_the_ground_truth(
    name: str, queries: int, db: psycopg.Connection, daemon: Daemon
) -> None:
    base, wanted, neighbors, distances = load(name, queries)
    copy(db, base)
    daemon.start()
    with daemon.client() as client:
        found = client.search("items", vectors=wanted, k=10, exact=True, timeout_ms=600_000)
    assert len(found) == queries
    for hits, keys, exact in zip(found, neighbors, distances, strict=True):
        np.testing.assert_allclose([hit.distance for hit in hits], exact, rtol=1e-5)
        # Any of the rows as far away as the tenth may be in the answer.
        beyond_ties = exact[-1] * (1 - 1e-5)
        nearer = {
            int(key) for key, distance in zip(keys, exact, strict=True) if distance < beyond_ties
        }
        assert nearer == {hit.key for hit in hits if hit.distance < beyond_ties}


@pytest.mark.long
def test_codes_reach_the_target_recall_with_other_vectors(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    base, wanted, _, distances = load("mnist-784-l2", 2000)
    copy(db, base)
    daemon.start()
    with daemon.client() as client:
        until(lambda: client.datasets()[0].index == "codes", "codes")
        for recall in (0.9, 0.95, 0.98):
            found = [
                hits
                for part in np.split(wanted, 20)
                for hits in client.search("items", vectors=part, recall=recall)
            ]
            shares = [
                np.mean([hit.distance <= limit * (1 + 1e-5) for hit in hits])
                for hits, limit in zip(found, distances[:, -1], strict=True)
            ]
            assert np.mean(shares) >= recall


def load(
    name: str, queries: int
) -> tuple[NDArray[Any], NDArray[np.float32], NDArray[Any], NDArray[Any]]:
    """Rows, query vectors, and the ten nearest rows of each query with their distances."""
    path = DATA / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"needs {path.name}, which is not part of the project")
    with np.load(path) as data:
        wanted = data["queries"][:queries].astype(np.float32)
        return (
            data["base"],
            wanted,
            data["neighbors"][:queries, :10],
            data["distances"][:queries, :10],
        )


def copy(db: psycopg.Connection, base: NDArray[Any]) -> None:
    """Put the rows into an attached table."""
    dimension = base.shape[1]
    db.execute(
        "CREATE TABLE items (id int GENERATED ALWAYS AS IDENTITY (MINVALUE 0) PRIMARY KEY, v "
        f"vector({dimension}))"
    )
    blocks = (
        base[start : start + BLOCK_ROWS].astype(np.float32)
        for start in range(0, len(base), BLOCK_ROWS)
    )
    copy_vectors(db, sql.SQL("COPY items (v) FROM STDIN (FORMAT BINARY)"), blocks, "vector")
    assert db.execute("SELECT rows FROM syncd.attach('items', metric => 'l2')").fetchone() == (
        len(base),
    )
