"""Codes that are made while a dataset is being read for the first time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
import pytest

from syncd.index.build import plan as building
from syncd.index.build import training
from syncd.index.dataset import DatasetIndex
from tests.unit.index.coded import DIM, assert_as_exact, build_all, everything, part_rows, put
from tests.unit.index.rows import random_vectors

EXPECTED = 2000

pytestmark = pytest.mark.usefixtures("small_codes")


@pytest.fixture(autouse=True)
def few_rows() -> Iterator[None]:
    """Limits at which a few hundred rows are enough to train."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(training, "QUANTIZER_ROWS", 300))
        stack.enter_context(patch.object(training, "ROWS_PER_LIST", 10))
        stack.enter_context(patch.object(building, "AHEAD_BYTES", 1))
        yield


def read(index: DatasetIndex, stop: int, expected: int = EXPECTED, version: int = 0) -> int:
    """Read the first rows page by page, with codes made meanwhile; returns how often."""
    made = 0
    for start in range(0, stop, 250):
        put(index, start, min(start + 250, stop), version)
        plan = index.plan_ahead(expected)
        if plan is not None:
            assert index.build(plan)
            assert index.view.codes is None, "they are used before their recall is measured"
            made += 1
    return made


def test_codes_made_during_the_reading_are_used_after_it(index: DatasetIndex) -> None:
    assert read(index, EXPECTED) > 3
    put(index, 100, 110, version=1)  # rows that were encoded already
    with patch("syncd.index.build.plan.train") as trained:
        assert build_all(index) == ["train", "measure"]
    assert not trained.called
    assert part_rows(index) == [EXPECTED + 8], "two of the updates are in the tail"
    everything(index)
    assert_as_exact(index, random_vectors(20, DIM, seed=3))


def test_a_small_dataset_gets_no_codes_ahead(index: DatasetIndex) -> None:
    assert read(index, 250, expected=250) == 0
    assert read(index, 1000, expected=0) == 0


@pytest.mark.parametrize("expected", [200_000, 400])
def test_codes_for_another_number_of_rows_are_made_again(
    index: DatasetIndex, expected: int
) -> None:
    with patch.object(training, "ROWS_PER_LIST", 1):
        assert read(index, EXPECTED, expected) > 0
        with patch("syncd.index.build.plan.train", side_effect=training.train) as trained:
            assert build_all(index)[0] == "train"
    assert trained.call_count == 1


def test_first_rows_that_are_unlike_the_others_do_not_decide_the_codes(
    index: DatasetIndex,
) -> None:
    read(index, 750)
    others = random_vectors(1250, DIM, seed=5) * np.float32(0.01) + np.float32(3)
    index.apply(range(750, EXPECTED), others, [])
    assert build_all(index)[:2] == ["train", "train"]


def test_codes_of_rows_that_are_gone_are_not_used(index: DatasetIndex) -> None:
    read(index, 1000)
    index.clear()
    put(index, 0, 1500, version=1)
    with patch("syncd.index.build.plan.train", side_effect=training.train) as trained:
        build_all(index)
    assert trained.call_count == 1


def test_codes_are_begun_again_for_the_rows_that_are_read_after_a_truncation(
    index: DatasetIndex,
) -> None:
    read(index, 1000)
    index.clear()
    assert read(index, 1500, version=1) > 0
    with patch("syncd.index.build.plan.train") as trained:
        build_all(index)
    assert not trained.called
    assert part_rows(index) == [1496]
