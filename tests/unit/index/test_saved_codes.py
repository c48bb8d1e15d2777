"""Codes in checkpoints: the files that are saved, and the effect of damaged or missing ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import msgspec
import numpy as np
import pytest

from syncd.errors import DataDirectoryError
from syncd.index.build import plan as building
from syncd.index.build.plan import Plan
from syncd.index.codes import codes as forms
from syncd.index.dataset import DatasetIndex
from syncd.index.saved import SavedIndex
from syncd.types import Metric
from tests.unit.index.coded import (
    DIM,
    assert_as_exact,
    build_all,
    everything,
    flipped,
    part_rows,
    put,
)
from tests.unit.index.rows import random_vectors

pytestmark = pytest.mark.usefixtures("small_codes")


def test_a_start_does_not_train_again_and_a_checkpoint_writes_codes_once(
    index: DatasetIndex, tmp_path: Path
) -> None:
    put(index, 0, 2000)
    build_all(index)
    first = index.save()
    names = [name for name in first.saved.file_names if name.endswith(".ivf")]
    assert len(names) == 2
    put(index, 2000, 2010)
    index.apply([], np.empty((0, DIM), dtype=np.float32), [5])
    second = index.save()
    assert second.bytes_written < 10 * (4 * DIM + 8 + 8) + 2010 // 8 + 2
    with patch.object(building, "train", side_effect=AssertionError):
        loaded = DatasetIndex.load(tmp_path / "p" / "d", second.saved)
        assert build_all(loaded) == []
    assert loaded.kind() == "codes"
    assert loaded.recall() == index.recall()
    queries = random_vectors(20, DIM, seed=2)
    for one, other in zip(loaded.search(queries, 10), index.search(queries, 10), strict=True):
        assert one.keys == other.keys
    assert loaded.save().bytes_written == 0


@pytest.mark.parametrize("which", [0, 1], ids=["codebook", "part"])
@pytest.mark.parametrize(
    "damage",
    [flipped, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])],
    ids=["changed", "missing", "short"],
)
def test_damaged_codes_are_built_again_from_the_vectors_and_searches_are_exact_until_then(
    which: int, damage: Callable[[Path], None], index: DatasetIndex, tmp_path: Path
) -> None:
    put(index, 0, 1000)
    build_all(index)
    saved = index.save().saved
    damage(
        tmp_path / "p" / "d" / [name for name in saved.file_names if name.endswith(".ivf")][which]
    )
    loaded = DatasetIndex.load(tmp_path / "p" / "d", saved)
    assert loaded.codes_damage
    assert loaded.kind() == "building"
    queries = random_vectors(5, DIM, seed=9)
    assert [one.keys for one in loaded.search(queries, 10)] == [
        one.keys for one in index.search(queries, 10, exact=True)
    ]
    assert build_all(loaded) == ["train", "measure"]
    again = DatasetIndex.load(tmp_path / "p" / "d", loaded.save().saved)
    assert (again.kind(), again.codes_damage) == ("codes", "")


def test_a_removed_file_of_codes_is_written_again(index: DatasetIndex, tmp_path: Path) -> None:
    put(index, 0, 1000)
    build_all(index)
    saved = index.save().saved
    for name in saved.file_names:
        if name.endswith(".ivf"):
            (tmp_path / "p" / "d" / name).unlink()
    assert not DatasetIndex.load(tmp_path / "p" / "d", index.save().saved).codes_damage


def test_new_codes_never_overwrite_those_of_a_checkpoint_that_is_kept(
    index: DatasetIndex, tmp_path: Path
) -> None:
    put(index, 0, 1000)
    build_all(index)
    kept = index.save().saved
    index.apply([], np.empty((0, DIM), dtype=np.float32), range(950))
    with patch.object(building, "LEAST_DEAD_SLOTS", 10**6):
        assert build_all(index) == ["drop"]
    started = DatasetIndex.load(tmp_path / "p" / "d", index.save().saved)
    put(started, 0, 950, version=1)
    with patch.object(building, "LEAST_DEAD_SLOTS", 10**6):
        build_all(started)
    started.save()
    assert not DatasetIndex.load(tmp_path / "p" / "d", kept).codes_damage


def test_a_full_disk_fails_the_save_and_the_next_one_goes_on(
    index: DatasetIndex, tmp_path: Path
) -> None:
    put(index, 0, 1000)
    build_all(index)
    with (
        patch("syncd.index.codes.files.write_at", side_effect=DataDirectoryError("no space")),
        pytest.raises(DataDirectoryError, match="no space"),
    ):
        index.save()
    assert not DatasetIndex.load(tmp_path / "p" / "d", index.save().saved).codes_damage


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_codes_of_an_earlier_form_are_read_joined_and_trained_again(
    metric: Metric, tmp_path: Path
) -> None:
    """Earlier versions had blocks of 32 rows, and two dimensions per code up to 256."""
    dim = 138
    rows = random_vectors(1100, dim, seed=4)
    index = DatasetIndex.create(tmp_path / "p" / "d", metric=metric, key_kind="integer", dim=dim)
    index.apply(range(1000), rows[:1000], [])
    with patch.object(forms, "BLOCK_ROWS", 32), patch.object(forms, "PAIRS_UP_TO_DIM", 256):
        build_all(index)
        saved = index.save().saved
    loaded = DatasetIndex.load(tmp_path / "p" / "d", saved)
    assert loaded.kind() == "codes"
    everything(loaded)
    queries = random_vectors(10, dim, seed=5)
    assert_as_exact(loaded, queries)
    loaded.apply(range(1000, 1100), rows[1000:], range(0, 500, 7))
    assert loaded.build(Plan("extend", 0, 1, 1096))
    assert part_rows(loaded) == [1096 - 72]
    everything(loaded)
    assert_as_exact(loaded, queries)
    assert build_all(loaded) == ["train", "measure"]
    codes = loaded.view.codes
    assert codes is not None
    assert codes.codes.codebook.is_current
    everything(loaded)
    assert_as_exact(loaded, queries)


def test_version_0_1_0_finds_no_codes_in_a_checkpoint_and_its_own_codes_are_read(
    index: DatasetIndex, tmp_path: Path
) -> None:
    """It reads ``codes``, and would misread the blocks of this version."""
    put(index, 0, 1000)
    build_all(index)
    record = msgspec.json.decode(msgspec.json.encode(index.save().saved))
    assert record["codes"] is None
    record["codes"] = record.pop("form_2_codes")
    loaded = DatasetIndex.load(tmp_path / "p" / "d", msgspec.convert(record, SavedIndex))
    assert loaded.kind() == "codes"
    assert build_all(loaded) == []
