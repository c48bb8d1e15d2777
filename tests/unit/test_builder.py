"""Datasets that the builder takes up, and the order."""

from __future__ import annotations

import os
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
from syncd.sync.background.waiting import WAITING_SEARCHES, Cores
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


def builder(*, busy: bool = False) -> Builder:
    """A builder on cores that are always busy, or never."""
    nothing = cast(Any, None)
    made = Builder(nothing, nothing, nothing, 0.95)
    made.waiting.cores = cast(Any, SimpleNamespace(busy=busy, look=lambda: None))
    made.waiting.searches = lambda _: 0
    return made


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


def test_codes_wait_while_rows_come_and_cores_are_busy(index: DatasetIndex) -> None:
    building_it = builder(busy=True)
    assert take_up(building_it, index) == [], "the first look cannot know that rows have stopped"
    put(index, 2000, 2100)
    assert take_up(building_it, index) == []
    assert take_up(building_it, index) == ["train"], "no row came since the last look"
    put(index, 2100, 13_000)
    assert take_up(building_it, index) == []
    assert index.view.codes is not None
    assert index.view.count - index.view.codes.codes.stop > building.tail_rows(DIM)
    assert take_up(building_it, index) == ["train"]


def test_codes_that_wait_leave_a_bounded_tail(index: DatasetIndex) -> None:
    building_it = builder(busy=True)
    with patch.object(building, "TAIL_ROWS", 200), patch.object(building, "WAITING_TAILS", 8):
        assert take_up(building_it, index) == ["train"], "2,000 rows are more than 8 tails of 200"
        for stop in range(2400, 3600, 400):
            put(index, stop - 400, stop)
            assert take_up(building_it, index) == []
        put(index, 3200, 3700)
        assert take_up(building_it, index) == ["extend"]


@pytest.mark.parametrize("dim", [1, 8, 128, 768])
def test_few_dimensions_make_no_longer_tail_wait(dim: int) -> None:
    longest = min(building.WAITING_TAILS * building.tail_rows(dim), 131_072)
    for rows, waits in ((longest - 1, True), (longest, False)):
        view = cast(Any, SimpleNamespace(dim=dim, count=rows, codes=None))
        assert building.may_wait(view, building.Plan("train")) is waits


def test_codes_do_not_wait_while_cores_are_free(index: DatasetIndex) -> None:
    assert take_up(builder(busy=False), index) == ["train"]


def test_codes_of_a_dataset_that_is_searched_do_not_wait_for_long(index: DatasetIndex) -> None:
    building_it = builder(busy=True)
    searches = 1_000_000
    building_it.waiting.searches = lambda _: searches
    for number in range(3):
        put(index, 2000 + number, 2001 + number)
        searches += WAITING_SEARCHES // 2
        assert take_up(building_it, index) == []
    put(index, 2003, 2004)
    searches += 1
    assert take_up(building_it, index) == ["train"]


def test_cores_are_busy_if_a_build_would_take_them_from_others(tmp_path: Path) -> None:
    with patch("os.cpu_count", return_value=2):
        cores, now, own = Cores(tmp_path / "stat"), 1000.0, 0.0

    def look(idle_seconds: float) -> bool:
        idle = round(idle_seconds * os.sysconf("SC_CLK_TCK"))
        cores.stat.write_text(f"cpu  9000 70 50 {idle} 0 0 0 0 0 0\ncpu0 1 1\n")
        clock = SimpleNamespace(monotonic=lambda: now, thread_time=lambda: own)
        with patch("syncd.sync.background.waiting.time", clock):
            cores.look()
        return cores.busy

    assert not look(500), "nothing is known about the time before the first look"
    now += 10
    assert look(500 + 13), "a build would leave 0.3 cores to others"
    now += 10
    assert not look(513 + 17)
    now, own = now + 10, own + 8
    assert not look(530 + 9), "what the builder itself took is left to the next build"
    now += 10
    assert look(539 + 9)
    cores.stat.write_text("Darwin\n")
    cores.looked_at = 0.0
    cores.look()
    assert not cores.busy, "codes never wait on a system that does not report on its cores"


def test_an_idle_machine_with_one_core_and_a_sandbox_that_tells_zeros_are_not_busy(
    tmp_path: Path,
) -> None:
    now, second = 0.0, os.sysconf("SC_CLK_TCK")
    clock = SimpleNamespace(monotonic=lambda: now, thread_time=lambda: 0.0)
    with (
        patch("os.cpu_count", return_value=1),
        patch("syncd.sync.background.waiting.time", clock),
    ):
        cores = Cores(tmp_path / "stat")
        for idle_seconds, busy in ((10, False), (19, False), (20, True), (0, False), (0, False)):
            now += 10
            cores.stat.write_text(f"cpu  0 0 0 {idle_seconds * second} 0 0 0 0 0 0\n")
            cores.look()
            assert cores.busy is busy
