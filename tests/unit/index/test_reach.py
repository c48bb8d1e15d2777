"""How many lists a query searches, and whether dead rows are tested for."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from syncd.index.codes.calibration import Point
from syncd.index.codes.codes import LiveCodes, lists_within
from syncd.index.dataset import DatasetIndex
from syncd.types import Metric
from tests.unit.index.coded import DIM, build_all, put
from tests.unit.index.rows import Create, random_vectors

pytestmark = pytest.mark.usefixtures("small_codes")


def test_a_query_between_many_lists_searches_more_of_them() -> None:
    close = [0.1] * 8 + [0.5] * 8
    between = [0.4] * 8 + [0.44] * 4 + [0.6] * 4
    unreadable = [np.nan] * 16
    distances = np.array([close, between, unreadable], dtype=np.float32)
    assert lists_within(distances, 1.2).tolist() == [8, 12, 1]
    assert lists_within(distances, 0.5).tolist() == [1, 1, 1]
    assert lists_within(distances[:, :3], 1.2).tolist() == [3, 3, 1]


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_a_reach_leaves_out_only_far_lists_alone_and_in_a_batch(
    metric: Metric, create: Create
) -> None:
    index = create(metric)
    put(index, 0, 2000)
    build_all(index)
    codes = index.view.codes
    assert codes is not None
    lists = codes.codes.codebook.lists
    queries = index.view.format.queries(
        random_vectors(20, DIM, seed=3) * np.linspace(0.1, 9, 20, dtype=np.float32)[:, None]
    )
    everywhere = Point(10, lists, 5000, 1.0, 1.0, 1.0)
    near = msgspec.structs.replace(everywhere, reach=1.0)
    all_slots = codes.candidates(queries, everywhere)[1]
    batch = codes.candidates(queries, near)[1]
    assert ((all_slots >= 0).sum(axis=1) == 2000).all()
    found = (batch >= 0).sum(axis=1)
    assert found.min() > 0
    assert found.max() < 2000
    assert len(set(found.tolist())) > 3
    for row in range(len(queries)):
        alone = codes.candidates(queries[row : row + 1], near)[1][0]
        assert alone[alone >= 0].tolist() == batch[row][batch[row] >= 0].tolist()


def test_settings_have_a_reach_only_when_real_queries_chose_them(index: DatasetIndex) -> None:
    put(index, 0, 3000)
    build_all(index)
    assert {point.reach for point in points(index)} == {None}
    index.asked.note(random_vectors(300, DIM, seed=12), None, None)
    assert build_all(index) == ["measure"]
    reaches = [point.reach for point in points(index)]
    assert any(reach is not None for reach in reaches)
    queries = random_vectors(200, DIM, seed=13)
    exact = index.search(queries, 10, exact=True)
    found = index.search(queries, 10, recall=0.9)
    shares = [
        len(set(one.keys) & set(other.keys)) / 10 for one, other in zip(found, exact, strict=True)
    ]
    assert np.mean(shares) > 0.87


def test_dead_rows_are_no_candidates_and_are_tested_only_if_there_are_any(
    index: DatasetIndex,
) -> None:
    put(index, 0, 2000)
    build_all(index)
    codes = index.view.codes
    assert codes is not None
    point = Point(10, 1 << 20, 5000, 1.0, 1.0, 1.0)
    queries = random_vectors(3, DIM, seed=1)
    assert codes.parameters(1).sel is None
    index.apply([], np.empty((0, DIM), dtype=np.float32), [7, 1000])
    view = index.view
    assert view.codes is not None
    assert view.codes.parameters(1).sel is not None
    slots = view.codes.candidates(queries, point)[1]
    assert not np.isin([7, 1000], slots).any()
    assert np.isin([7, 1000], codes.candidates(queries, point)[1]).all()
    later = LiveCodes(replace(codes.codes), view.live.bits)
    assert not np.isin([7, 1000], later.candidates(queries, point)[1]).any()


def points(index: DatasetIndex) -> tuple[Point, ...]:
    codes = index.view.codes
    assert codes is not None
    return codes.codes.calibration.points
