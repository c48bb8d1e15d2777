"""The neighbors that recall is measured against are exact, also if a product loses digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from syncd.index.build.neighbors import nearest_others
from syncd.index.dataset import DatasetIndex
from syncd.index.storage.bitmap import live_slots
from syncd.types import Metric
from tests.unit.index.rows import random_vectors

DIM, ROWS, K = 64, 3000, 20


@pytest.mark.parametrize("far", [0, 3000], ids=["around the origin", "far from it"])
@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_they_are_those_of_an_exact_search(metric: Metric, far: float, tmp_path: Path) -> None:
    """Far from the origin, squared norms are 600 million and squared distances are 100.

    The difference of such norms in float32 is accurate only to 64.
    """
    index = DatasetIndex.create(
        tmp_path / "p" / "d", metric=metric, key_kind="integer", dim=DIM, chunk_bytes=1 << 18
    )
    index.apply(
        range(ROWS), random_vectors(ROWS, DIM) + np.float32(far if metric == "l2" else 0), []
    )
    index.apply([], np.empty((0, DIM), dtype=np.float32), range(0, 200, 7))
    view = index.view
    own = live_slots(view.live.bits, view.count)[-300:]
    queries = np.ascontiguousarray(view.vectors.take(own))
    distances, slots = nearest_others(view, queries, own, K, lambda: False)
    for row, query in enumerate(view.vectors_of(own)):
        exact = index.search(query[None], K, exclude=int(own[row]), exact=True)[0]
        np.testing.assert_allclose(distances[row], exact.distances, rtol=1e-5, atol=1e-6)
        assert own[row] not in slots[row]
