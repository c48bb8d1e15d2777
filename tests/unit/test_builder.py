"""Datasets that the builder takes up, and the order."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest

from syncd.index.build import plan as building
from syncd.index.build.reached import Measured, Reached
from syncd.index.dataset import DatasetIndex
from syncd.sync.background.builder import CALM, LOOK_SECONDS, Builder
from syncd.sync.registry.alerts import Alerts
from syncd.sync.registry.datasets import Dataset
from syncd.types import DatasetName
from tests.unit.index.rows import random_vectors

DIM = 16


@pytest.fixture
def index(tmp_path: Path) -> Iterator[DatasetIndex]:
    """Two thousand rows with codes."""
    with ExitStack() as stack:
        for name, value in {
            "EXACT_ROWS": (300, 300),
            "TAIL_ELEMENTS": 1,
            "TAIL_ROWS": 10_000,
        }.items():
            stack.enter_context(patch.object(building, name, value))
        stack.enter_context(patch("syncd.index.build.measuring.CHEAPER_THAN_EXACT", 1000.0))
        stack.enter_context(
            patch("syncd.index.build.measuring.QUERIES", {10: 60, 40: 15, 100: 15, 1000: 5})
        )
        index = DatasetIndex.create(tmp_path / "p" / "d", metric="l2", key_kind="integer", dim=DIM)
        put(index, 0, 2000)
        yield index


def put(index: DatasetIndex, start: int, stop: int) -> None:
    index.apply(range(start, stop), random_vectors(stop - start, DIM, seed=start), [])


def take_up(builder: Builder, index: DatasetIndex) -> list[str]:
    """Look once, and do the work that is found."""
    datasets = [cast(Dataset, SimpleNamespace(name="p/d", index=index))]
    done: list[str] = []
    for dataset, plan in builder.look(datasets, []):
        assert plan is not None
        assert builder.work(dataset.name, dataset.index, plan) == "done"
        done.append(plan.kind)
    return done


def builder() -> Builder:
    nothing = cast(Any, None)
    return Builder(nothing, nothing, nothing, 0.95)


def test_recall_is_measured_again_when_rows_have_stopped_coming(index: DatasetIndex) -> None:
    building_it = builder()
    with patch("syncd.sync.background.builder.MEASURING_REST", 1e9):
        assert take_up(building_it, index) == ["train"]
        put(index, 2000, 2600)  # rows come: a quarter of the dataset
        assert take_up(building_it, index) == ["measure"], (
            "a quick measurement is repeated, although rows come"
        )
        for start in (2600, 3400, 4400):
            put(index, start, start + 1000)
            assert take_up(building_it, index) == []
        assert take_up(building_it, index) == ["measure"]
        assert take_up(building_it, index) == []


def test_recall_is_measured_while_rows_come_after_a_pause(index: DatasetIndex) -> None:
    building_it = builder()
    with patch("syncd.sync.background.builder.MEASURING_REST", 0.0):
        assert take_up(building_it, index) == ["train"]
        assert take_up(building_it, index) == ["measure"]
        for start in (2000, 2600, 3400):
            put(index, start, start + 1000)
            assert take_up(building_it, index) == ["measure"]


def test_other_queries_are_measured_at_most_every_five_minutes(index: DatasetIndex) -> None:
    building_it = builder()
    while take_up(building_it, index):
        pass
    index.asked.note(random_vectors(300, DIM, seed=3), None, None)
    assert take_up(building_it, index) == ["measure"]
    assert index.recall_of == "queries"
    index.asked.note(3 * random_vectors(3000, DIM, seed=4), None, None)
    assert index.queries_changed
    assert take_up(building_it, index) == []
    building_it.queries_at[index] = 0.0
    assert take_up(building_it, index) == ["measure"]
    assert take_up(building_it, index) == []


def test_missed_recall_is_an_alert_once_without_a_query_in_it(index: DatasetIndex) -> None:
    building_it = builder()
    alerts = Alerts()
    building_it.registry = cast(Any, SimpleNamespace(alerts=alerts))
    while take_up(building_it, index):
        pass
    index.asked.note(random_vectors(300, DIM, seed=3), None, None)
    bad = Measured("queries", 300, (Reached(0.95, 0.9, 0.01, 0.5, 0.1, 0, 0.001),))
    for measured, number in ((bad, 1), (bad, 1), (None, 1), (bad, 2)):
        with ExitStack() as stack:
            if measured is not None:
                stack.enter_context(
                    patch.object(DatasetIndex, "measure_reached", lambda *_, m=measured: m)
                )
            building_it.judge(DatasetName("p/d"), index)
        assert len(alerts.waiting) == number
    assert alerts.waiting[0].facts == {"dataset": "p/d", "recall": 0.9, "wanted": 0.95}


def test_a_change_of_one_row_measures_nothing(index: DatasetIndex) -> None:
    building_it = builder()
    assert [*take_up(building_it, index), *take_up(building_it, index)] == ["train", "measure"]
    index.apply([1], np.ones((1, DIM), dtype=np.float32), [])
    assert take_up(building_it, index) == []


def test_a_builder_looks_less_often_while_nothing_is_new(index: DatasetIndex) -> None:
    building_it = builder()
    while take_up(building_it, index):
        pass
    for _ in range(3):
        assert take_up(building_it, index) == []
    assert building_it.pause_seconds == LOOK_SECONDS * CALM
    put(index, 2000, 2001)
    take_up(building_it, index)
    assert building_it.pause_seconds == LOOK_SECONDS
