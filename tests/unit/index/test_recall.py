"""Promised recall for queries that are unlike the rows: before any was asked, and after."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import msgspec
import numpy as np
import pytest

from syncd.index.build import measuring
from syncd.index.build.reached import filtered_limit
from syncd.index.codes.calibration import Calibration, Point
from syncd.index.dataset import DatasetIndex
from syncd.index.filter.language import parse_filter
from syncd.index.rows.vectors import Vectors
from syncd.index.search.plan import point_for
from syncd.types import AttachedColumn
from tests.unit.index.coded import DIM, build_all, put
from tests.unit.index.rows import random_vectors

pytestmark = pytest.mark.usefixtures("small_codes", "more_queries")

COLUMNS = (AttachedColumn("side", "integer"),)


@pytest.fixture
def more_queries() -> Iterator[None]:
    with patch.object(measuring, "QUERIES", {10: 300, 40: 30, 100: 30, 1000: 5}):
        yield


@pytest.fixture
def copies(tmp_path: Path) -> DatasetIndex:
    """400 rows with nine near copies each: easy to find for a row, not for another query."""
    index = DatasetIndex.create(
        tmp_path / "p" / "d", metric="l2", key_kind="integer", dim=DIM, columns=COLUMNS
    )
    rows = np.repeat(random_vectors(400, DIM, seed=1), 10, axis=0)
    rows += 0.05 * random_vectors(4000, DIM, seed=2)
    index.apply(range(4000), rows, [], None, [f"[{number % 2}]" for number in range(4000)])
    return index


def reached(index: DatasetIndex, queries: Vectors, target: float) -> float:
    found, exact = index.search(queries, 10, recall=target), index.search(queries, 10, exact=True)
    shares = [len({*a.keys} & {*b.keys}) / 10 for a, b in zip(found, exact, strict=True)]
    return float(np.mean(shares))


def ask(index: DatasetIndex, queries: Vectors, *, side: int | None = None) -> None:
    wanted = None if side is None else parse_filter({"side": side}, COLUMNS, "d")
    for query in queries:
        index.asked.note(query[None, :], wanted, None)


def test_the_promise_is_kept_for_queries_that_have_no_near_copies(copies: DatasetIndex) -> None:
    queries = random_vectors(400, DIM, seed=3)
    with (
        patch.object(
            measuring,
            "_noisy",
            lambda view, slots, *_: measuring.rows_as_queries(view, slots[:200]),
        ),
        patch.object(measuring, "_between", measuring._noisy),
    ):
        assert build_all(copies) == ["train", "measure"]
    assert copies.recall(0.9) >= 0.9
    assert reached(copies, queries, 0.9) < 0.8, "rows alone overstate it"
    codes = copies.view.codes
    assert codes is not None
    old = replace(
        codes.codes, calibration=msgspec.structs.replace(codes.codes.calibration, version=0)
    )
    assert copies.swap_codes(codes.codes, old)
    assert build_all(copies) == ["measure"]
    for target in (0.8, 0.9, 0.95):
        assert reached(copies, queries, target) >= target, "before any query was asked"
    assert copies.recall_of == "rows"


def test_real_queries_are_measured_as_soon_as_there_are_enough(copies: DatasetIndex) -> None:
    build_all(copies)
    queries = random_vectors(900, DIM, seed=3)
    ask(copies, queries[:199])
    assert build_all(copies) == []
    ask(copies, queries[199:500])
    assert copies.queries_changed
    assert copies.plan_build(for_queries=False) is None
    assert build_all(copies) == ["measure"]
    assert copies.recall_of == "queries"
    for target in (0.8, 0.9, 0.95):
        held_back = reached(copies, queries[500:], target)
        assert held_back >= target
        assert abs(copies.recall(target) - held_back) < 0.03
        p5 = copies.recall_p5(target)
        assert p5 is not None
        assert p5 <= copies.recall(target)
    ask(copies, 3 * random_vectors(2000, DIM, seed=4))
    assert build_all(copies) == ["measure"], "other queries are asked now"
    assert build_all(copies) == []


def test_the_harder_of_rows_and_queries_counts(copies: DatasetIndex) -> None:
    build_all(copies)
    ask(
        copies,
        np.concatenate([row for _, row in copies.view.get(range(0, 4000, 10), True)]).reshape(
            -1, DIM
        ),
    )
    assert build_all(copies) == ["measure"]
    rows = copies.view.vectors_of(np.arange(1, 4000, 13))
    assert reached(copies, rows, 0.9) >= 0.9


def test_the_recall_that_is_reached_is_told_for_each_target(copies: DatasetIndex) -> None:
    build_all(copies)
    found = copies.measure_reached(10, [0.5, 0.9, 1.0])
    assert (found.of, found.queries) == ("rows", 200)
    for each in found.targets:
        assert each.mean >= each.target
        assert each.least <= each.p5 <= 1.0
        assert each.seconds > 0
    exact = found.targets[-1]
    assert (exact.exact, exact.mean, exact.least) == (200, 1.0, 1.0)
    ask(copies, random_vectors(150, DIM, seed=5))
    ask(copies, random_vectors(150, DIM, seed=6), side=1)
    found = copies.measure_reached(10, [0.5, 0.9])
    assert (found.of, found.queries) == ("queries", 300)
    assert found.targets[0].mean < 1.0
    with patch("syncd.index.search.plan.exact_elements", lambda _: 0):
        (only,) = copies.measure_reached(10, [0.5]).targets
    assert only.exact == 150, "with their filter these queries are answered exactly"


def test_filtered_searches_that_miss_a_recall_are_exact(
    copies: DatasetIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    # for so few rows exact search would be cheaper
    monkeypatch.setattr("syncd.index.search.plan.exact_elements", lambda _: 1 << 60)
    build_all(copies)
    ask(copies, random_vectors(300, DIM, seed=3), side=1)
    sample, codes = copies.sampled(copies.view), copies.view.codes
    assert sample is not None
    assert codes is not None

    def limit(*points: Point) -> float:
        calibration = msgspec.structs.replace(codes.codes.calibration, points=points)
        made = replace(codes.codes, calibration=calibration)
        return filtered_limit(copies.view, made, sample, lambda: False)

    good, poor = Point(40, 1000, 3000, 1.0, 1.0, 1.0), Point(40, 8, 60, 0.9, 0.9, 0.5)
    assert limit(good) == 1.0
    assert limit(poor, good) < 0.9
    assert build_all(copies) == ["measure"]
    view = copies.view.where(parse_filter({"side": 1}, COLUMNS, "d"))
    assert point_for(view, 10, 0.9) is not None
    assert copies.view.codes is not None
    now = copies.view.codes.codes
    low = replace(now, calibration=msgspec.structs.replace(now.calibration, filtered=0.8))
    assert copies.swap_codes(now, low)
    view = copies.view.where(parse_filter({"side": 1}, COLUMNS, "d"))
    assert point_for(view, 10, 0.9) is None
    assert point_for(view, 10, 0.8) is not None
    assert point_for(copies.view, 10, 0.9) is not None, "without a filter nothing was missed"


def test_a_row_that_is_the_query_does_not_count_as_an_answer(copies: DatasetIndex) -> None:
    build_all(copies)
    for key in range(0, 4000, 13):
        copies.asked.note(copies.view.get([key], True)[0][1][None, :], None, key)  # type: ignore[index]
    sample = copies.sampled(copies.view)
    assert sample is not None
    asked = measuring.real_queries(copies.view, sample)
    assert sorted(asked.own.tolist()) == list(range(0, 4000, 13))


def test_saved_codes_of_an_earlier_version_are_measured_again(index: DatasetIndex) -> None:
    put(index, 0, 1000)
    build_all(index)
    saved = index.save().saved
    assert saved.codes is not None
    old = msgspec.json.decode(msgspec.json.encode(saved.codes.calibration))
    del old["version"], old["of"]
    old["points"] = [point[:6] for point in old["points"]]
    read = msgspec.json.decode(msgspec.json.encode(old), type=Calibration)
    earlier = msgspec.structs.replace(
        saved, codes=msgspec.structs.replace(saved.codes, calibration=read)
    )
    loaded = DatasetIndex.load(index.capture().directory, earlier)
    assert loaded.recall() >= 0.95
    assert loaded.recall_p5() is None
    assert build_all(loaded) == ["measure"]
    assert loaded.recall_p5() is not None


def test_after_a_restart_the_figures_are_still_those_of_the_queries(index: DatasetIndex) -> None:
    put(index, 0, 1000)
    build_all(index)
    ask(index, random_vectors(300, DIM, seed=3))
    build_all(index)
    loaded = DatasetIndex.load(index.capture().directory, index.save().saved)
    assert (loaded.recall_of, loaded.recall()) == ("queries", index.recall())
    assert build_all(loaded) == []
