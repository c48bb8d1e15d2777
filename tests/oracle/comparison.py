"""One table and its indexes at the same position: the same keys, vectors and nearest rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import psycopg

from syncd.client.calls import Key
from syncd.client.client import Client
from syncd.errors import UnknownDataset
from tests.oracle.tables import DIMENSION, Expected, Table, Vectors, distances

SETTLE_MS = 30_000
"""Time limit of an index to include a token: restarts of both sides and their back-off count."""

K = 10
TOLERANCE = 1e-4
"""Tolerance of a distance: float64 here, float32 in the index."""


@dataclass
class Comparison:
    """The table's rows, read after the wait for ``token``, with no write in between."""

    connection: psycopg.Connection
    client: Client
    table: Table
    expected: Expected
    token: str
    seed: int
    rng: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def run(self, seen: set[str]) -> None:
        """Compare datasets that have rows or were ``seen`` since syncd started, and add to
        ``seen``.
        """
        mine = {dataset for dataset in seen if dataset.startswith(f"{self.table.name}/")}
        for dataset in sorted(mine | self.expected.datasets.keys()):
            rows = self.expected.datasets.get(dataset, {})
            try:
                self.compare_rows(dataset, rows)
            except UnknownDataset:
                assert not rows, f"{dataset} is unknown and has rows: {sorted(rows, key=str)}"
                assert dataset not in seen, f"{dataset} was there before it was empty"
                continue
            seen.add(dataset)
            queries = self.rng.standard_normal((2, DIMENSION)).astype(np.float32).astype(np.float64)
            for query in queries:
                self.compare_nearest(dataset, rows, query)

    def compare_rows(self, dataset: str, rows: dict[Key, Vectors]) -> None:
        """Compare keys, read in small or large pages, and vectors."""
        keys = list(self.client.keys(dataset, limit=int(self.rng.choice([7, 1000]))))
        assert len(set(keys)) == len(keys), f"{dataset} lists a key twice: {keys}"
        missing, extra = rows.keys() - set(keys), set(keys) - rows.keys()
        assert not missing, f"{dataset} lacks {sorted(missing, key=str)[:20]}"
        assert not extra, f"{dataset} still has {sorted(extra, key=str)[:20]}"
        found = {row.key: row.vector for row in self.client.get(dataset, keys, vectors=True)}
        assert found.keys() == rows.keys(), dataset
        for key, vector in found.items():
            assert vector is not None
            np.testing.assert_allclose(
                vector, rows[key], rtol=1e-5, atol=1e-6, err_msg=f"{dataset} {key}"
            )

    def compare_nearest(self, dataset: str, rows: dict[Key, Vectors], query: Vectors) -> None:
        """Compare distances with those of the nearest rows, and with each found key's own distance.

        Which of equally near rows are found is not defined.
        """
        hits = self.client.search(dataset, query, k=K, after=self.token, timeout_ms=SETTLE_MS)
        found = [hit.distance for hit in hits]
        true = distances(
            self.table.metric, np.array(list(rows.values())).reshape(-1, DIMENSION), query
        )
        of_key = dict(zip(rows, true.tolist(), strict=True))
        assert len({hit.key for hit in hits}) == len(hits), f"{dataset}: a key twice in {hits}"
        np.testing.assert_allclose(found, np.sort(true)[:K], atol=TOLERANCE, err_msg=dataset)
        np.testing.assert_allclose(
            found, [of_key[hit.key] for hit in hits], atol=TOLERANCE, err_msg=dataset
        )
        pgvectors = self.table.nearest(self.connection, dataset.partition("/")[2], query, K)
        if pgvectors is not None:
            np.testing.assert_allclose(found, pgvectors, atol=TOLERANCE, err_msg=dataset)
