"""Codes of larger datasets: when they are built again, promised recall, and cancellation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from syncd.index.build import joining
from syncd.index.build import plan as building
from syncd.index.codes.calibration import Calibration, Point
from syncd.index.codes.codes import LiveCodes
from syncd.index.dataset import DatasetIndex
from syncd.index.filter.language import parse_filter
from syncd.index.search import approximate
from syncd.index.search.exact import search_exact
from syncd.index.search.plan import point_for
from syncd.index.storage.stopping import Cancelled
from syncd.types import AttachedColumn, Metric
from tests.unit.index.coded import DIM, assert_as_exact, build_all, everything, part_rows, put
from tests.unit.index.rows import random_vectors

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "sift-1m-128-l2.npz"

pytestmark = pytest.mark.usefixtures("small_codes")


def test_a_dataset_is_exact_then_building_then_codes_and_exact_again_when_little_is_left(
    index: DatasetIndex,
) -> None:
    assert index.kind() is None or index.kind() == "exact"
    put(index, 0, 300)
    assert (index.kind(), index.plan_build()) == ("exact", None)
    put(index, 300, 600)
    assert index.kind() == "building"
    assert build_all(index) == ["train", "measure"]
    assert index.kind() == "codes"
    index.apply([], np.empty((0, DIM), dtype=np.float32), range(50, 600))
    assert build_all(index) == ["drop"]
    assert index.kind() == "exact"


def test_new_codes_serve_the_ten_nearest_at_once_and_more_when_that_is_measured(
    index: DatasetIndex,
) -> None:
    put(index, 0, 2000)
    plan = index.plan_build()
    assert plan is not None
    assert index.build(plan)
    queries = random_vectors(5, DIM, seed=9)
    assert point_for(index.view, 10, 0.95) is not None
    assert point_for(index.view, 100, 0.95) is None, "it is exact until then"
    for found, exact in zip(
        index.search(queries, 100), index.search(queries, 100, exact=True), strict=True
    ):
        assert found.keys == exact.keys
    assert build_all(index) == ["measure"]
    assert point_for(index.view, 100, 0.95) is not None


def test_each_kind_of_build_has_its_condition(index: DatasetIndex) -> None:
    put(index, 0, 2000)
    assert build_all(index) == ["train", "measure"]
    put(index, 2000, 2090)
    assert (build_all(index), part_rows(index)) == ([], [2000])  # the tail is not full
    put(index, 2090, 2104)
    assert (build_all(index), part_rows(index)) == (["extend"], [2000, 104])
    put(index, 2104, 2304)
    # merged with the small part
    assert (build_all(index), part_rows(index)) == (
        ["extend"],
        [2000, 304],
    )
    index.apply([], np.empty((0, DIM), dtype=np.float32), range(401))
    # a fifth of the first part was dead
    assert (build_all(index), part_rows(index)) == (
        ["purge"],
        [1599, 304],
    )
    put(index, 2304, 2600)
    # a quarter is new, and a fifth is dead
    assert (build_all(index), part_rows(index)) == (
        ["extend", "measure"],
        [2199],
    )
    put(index, 3000, 9000)
    # four times the rows
    assert (build_all(index), part_rows(index)) == (
        ["train", "measure"],
        [8199],
    )


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("loaded", [False, True])
def test_joined_codes_are_those_that_encoding_all_rows_would_give(
    metric: Metric, loaded: bool, tmp_path: Path
) -> None:
    index = DatasetIndex.create(tmp_path / "p" / "d", metric=metric, key_kind="integer", dim=DIM)
    put(index, 0, 1003)
    build_all(index)
    for stop in (1111, 1260, 1405):  # lists of which the last block is not full
        put(index, stop - 105, stop)
        with patch.object(building, "TIER_FACTOR", 0):
            assert build_all(index) in (["extend"], ["extend", "measure"])
    index.apply([], np.empty((0, DIM), dtype=np.float32), range(0, 1300, 13))
    if loaded:
        index = DatasetIndex.load(tmp_path / "p" / "d", index.save().saved)
    view = index.view
    assert view.codes is not None
    codes = view.codes.codes
    assert len(codes.parts) > 2
    joined = joining.joined(codes.codebook, codes.parts, view.live.bits, 98, lambda: False)
    encoded = building.encode(view, codes.codebook, 0, codes.stop, 99, lambda: False)
    point = Point(10, 4, 5000, 1.0, 1.0, 1.0)  # all rows of four lists
    queries = random_vectors(30, DIM, seed=11)
    found = [
        LiveCodes(replace(codes, parts=(part,)), view.live.bits).candidates(queries, point)
        for part in (joined, encoded)
    ]
    for (distances, slots), (wanted_distances, wanted_slots) in zip(
        *(zip(*one, strict=True) for one in found), strict=True
    ):
        assert distances[slots >= 0].tolist() == wanted_distances[wanted_slots >= 0].tolist()
        assert set(slots.tolist()) == set(wanted_slots.tolist())
    assert (joined.start, joined.stop, joined.rows) == (0, codes.stop, encoded.rows)


@pytest.mark.parametrize("first", [120, 128, 136, 256])
def test_a_list_of_any_length_takes_more(index: DatasetIndex, first: int) -> None:
    with patch("syncd.index.build.training.ROWS_PER_LIST", 10_000):
        put(index, 0, 600)
        build_all(index)
    view = index.view
    assert view.codes is not None
    codebook = view.codes.codes.codebook
    assert codebook.lists == 1
    one, two, both = (
        building.encode(view, codebook, start, stop, 9, lambda: False)
        for start, stop in ((0, first), (first, 600), (0, 600))
    )
    found = joining.joined(codebook, (one, two), view.live.bits, 9, lambda: False)
    slots, codes = zip(
        *(joining._rows(part, 0, view.live.bits) for part in (found, both)),
        strict=True,
    )
    np.testing.assert_array_equal(*slots)
    np.testing.assert_array_equal(*codes)
    assert found.rows == 600
    assert len(np.unique(codes[0], axis=0)) > 100
    assert (
        joining.joined(codebook, (one, two), np.zeros_like(view.live.bits), 9, lambda: False).rows
        == 0
    )


def test_there_are_never_more_than_five_parts(index: DatasetIndex) -> None:
    with patch.object(building, "TIER_FACTOR", 0), patch.object(building, "RETRAIN_GROWTH", 1e9):
        for start in range(0, 2000, 200):
            put(index, start, start + 200)
            build_all(index)
            codes = index.view.codes
            assert codes is None or len(codes.codes.parts) <= building.MOST_PARTS
    everything(index)
    assert_as_exact(index, random_vectors(20, DIM, seed=1))


def test_lists_that_have_become_uneven_are_trained_again_once(index: DatasetIndex) -> None:
    put(index, 0, 1000)
    build_all(index)
    put(index, 0, 1, version=3)
    one_place = random_vectors(1, DIM, seed=5) + 0.01 * random_vectors(1000, DIM, seed=6)
    index.apply(range(1000, 2000), one_place, [])
    assert build_all(index)[:2] == ["extend", "train"]
    assert index.plan_build() is None


def test_a_recall_out_of_reach_is_answered_exactly_and_trained_for_again_only_when_a_quarter_is_new(
    index: DatasetIndex,
) -> None:
    put(index, 0, 1000)
    build_all(index)
    with patch.object(Calibration, "choose", lambda *_: None):
        assert index.kind() == "exact"
        assert index.recall() == 1.0
        queries = random_vectors(5, DIM, seed=9)
        for found, exact in zip(
            index.search(queries, 10), index.search(queries, 10, exact=True), strict=True
        ):
            assert found.keys == exact.keys
        assert build_all(index) == []
        put(index, 0, 260, version=1)  # as many rows, but different ones
        assert build_all(index) == ["extend", "measure", "train", "measure"]
        codes = index.view.codes
        assert codes is not None
        assert codes.codes.codebook.trained_slots == 1260


def test_the_recall_of_other_rows_is_at_or_above_each_target(tmp_path: Path) -> None:
    if not DATA.exists():
        pytest.skip(f"needs {DATA.name}, which is not part of the project")
    with np.load(DATA) as data, patch("syncd.index.build.measuring.CHEAPER_THAN_EXACT", 0.9):
        rows = data["base"][:62_000].astype(np.float32)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    held_out, rows = rows[:2000], rows[2000:]
    index = DatasetIndex.create(tmp_path / "p" / "d", metric="l2", key_kind="integer", dim=128)
    index.apply(range(len(rows)), rows, [])
    with patch("syncd.index.build.measuring.QUERIES", {10: 600, 40: 15, 100: 60, 1000: 5}):
        build_all(index)
    exact = index.search(held_out, 10, exact=True)
    for target in (0.8, 0.9, 0.95, 0.98, 0.99):
        assert index.kind(target) == "codes"
        found = index.search(held_out, 10, recall=target)
        limits = [one.distances[-1] * (1 + 1e-6) for one in exact]
        recall = np.mean(
            [(one.distances <= limit).mean() for one, limit in zip(found, limits, strict=True)]
        )
        assert recall >= target
        assert index.recall(target) >= target
        for one in found[:100]:
            held = rows[np.array(one.keys)].astype(np.float64)
            assert one.distances.tolist() == sorted(one.distances)
            assert len(held) == 10
    codes = index.view.codes
    assert codes is not None
    assert codes.codes.nbytes / len(rows) < 50


@pytest.mark.parametrize("kind", ["train", "compact"])
def test_codes_of_rows_that_were_cleared_during_the_build_are_not_used(
    kind: str, index: DatasetIndex
) -> None:
    put(index, 0, 1000)
    cleared = iter([True])

    def stop() -> bool:
        if next(cleared, False):
            index.clear()
            put(index, 0, 500, version=2)
        return False

    assert not index.build(building.Plan(kind), stop)  # type: ignore[arg-type]
    assert index.view.codes is None
    now = [row for _, row in index.view.get(range(500), vectors=True)]
    np.testing.assert_array_equal(now, random_vectors(500, DIM, seed=7919 * 2))


@pytest.mark.parametrize("kind", ["train", "compact"])
def test_a_build_can_be_given_up_anywhere(kind: str, index: DatasetIndex, tmp_path: Path) -> None:
    plan = building.Plan(kind)  # type: ignore[arg-type]
    put(index, 0, 1000)
    build_all(index)
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    with (
        patch("syncd.index.generation.compaction.BLOCK_BYTES", 1 << 13),
        patch("syncd.index.build.encoding.BLOCK_BYTES", 128 * DIM * 4),
        patch("syncd.index.build.encoding.LEAST_BLOCK_ROWS", 128),
    ):
        index.build(plan, count)
        files, before = sorted((tmp_path / "p" / "d").glob("*")), index.view
        # the duration of a measurement depends on the data
        for moment in range(0, asked // 2, max(1, asked // 40)):
            left = iter([False] * moment)
            with pytest.raises(Cancelled):
                index.build(plan, lambda left=left: next(left, True))  # type: ignore[misc]
            assert index.view is before
            assert sorted((tmp_path / "p" / "d").glob("*")) == files


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_unselective_filters_use_the_codes_and_reach_the_recall(
    metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filters pass random rows, rows near the queries, and rows far from them.

    No row that an exact search finds is missed.
    """
    rows, columns = 20_000, (AttachedColumn("chance", "integer"), AttachedColumn("side", "integer"))
    index = DatasetIndex.create(
        tmp_path / "f", metric=metric, key_kind="integer", dim=DIM, columns=columns
    )
    vectors = random_vectors(rows, DIM)
    chances = np.random.default_rng(5).integers(0, 100, rows)
    sides = (vectors[:, 0].argsort().argsort() * 100) // rows
    index.apply(
        range(rows), vectors, [], None, [f"[{a},{b}]" for a, b in zip(chances, sides, strict=True)]
    )
    build_all(index)
    index.apply(range(500), random_vectors(500, DIM, seed=1), [], None, ["[50,50]"] * 500)
    queries = random_vectors(60, DIM, seed=2)
    exact_searches: list[int] = []
    # for so few rows exact search would be cheaper
    monkeypatch.setattr("syncd.index.search.plan.exact_elements", lambda _: 1 << 60)

    def counted(*given: Any) -> object:
        exact_searches.append(1)
        return search_exact(*given)

    monkeypatch.setattr(approximate, "search_exact", counted)
    for column in ("chance", "side"):
        for below in (50, 10, 1):
            view = index.view.where(parse_filter({column: {"lt": below}}, columns, "d"))
            truth = index.search(queries, 10, view=view, exact=True)
            exact_searches.clear()
            found = index.search(queries, 10, view=view, recall=0.95)
            shares = [len({*a.keys} & {*b.keys}) / 10 for a, b in zip(found, truth, strict=True)]
            assert np.mean(shares) >= 0.94, (column, below)
            if (column, below) == ("chance", 50):
                assert point_for(view, 10, 0.95) is not None
                assert len(exact_searches) < len(queries) // 10
