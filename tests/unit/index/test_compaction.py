"""Dead slots are given back alongside readers and the writer."""

from __future__ import annotations

import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.index.build import plan as building
from syncd.index.dataset import DatasetIndex
from syncd.index.filter.language import parse_filter
from syncd.index.generation.compaction import Move
from syncd.index.storage.columns import Column
from syncd.index.view import View
from syncd.types import AttachedColumn
from tests.unit.index.coded import DIM, assert_as_exact, build_all, everything, flipped, put
from tests.unit.index.rows import random_vectors

pytestmark = pytest.mark.usefixtures("small_codes")


def test_more_than_half_dead_is_given_back_with_its_disk_and_memory(
    index: DatasetIndex, tmp_path: Path
) -> None:
    with patch.object(building, "LEAST_DEAD_SLOTS", 500):
        put(index, 0, 1000)
        build_all(index)
        put(index, 0, 500, version=1)
        assert index.plan_build() is None or index.plan_build() != building.Plan("compact")
        put(index, 0, 1000, version=2)
        index.save()
        before, memory = index.bytes_disk, index.bytes_memory
        expected = index.search(random_vectors(5, DIM, seed=4), 10, exact=True)
        assert (index.tombstones, build_all(index)[0]) == (1500, "compact")
    assert (index.tombstones, index.count) == (0, 1000)
    assert index.kind() == "codes"
    saved = index.save()
    assert index.bytes_disk < before / 2
    assert index.bytes_memory < memory
    assert saved.bytes_written >= 1000 * 4 * DIM or saved.saved.generation == 2
    found = DatasetIndex.load(tmp_path / "p" / "d", saved.saved).search(
        random_vectors(5, DIM, seed=4), 10, exact=True
    )
    for one, other in zip(found, expected, strict=True):
        assert one.keys == other.keys


def test_readers_and_the_writer_go_on_while_slots_are_given_back(index: DatasetIndex) -> None:
    put(index, 0, 1000)
    build_all(index)
    everything(index)
    wrong: list[str] = []
    over = threading.Event()
    queries = random_vectors(3, DIM, seed=11)

    def read() -> None:
        while not over.is_set():
            view = index.view
            exact = index.search(queries, 10, exact=True, view=view)
            for one, other in zip(
                index.search(queries, 10, recall=0.5, view=view), exact, strict=True
            ):
                if one.keys != other.keys or len(set(one.keys)) < 10:
                    wrong.append(f"{one.keys} {other.keys}")

    def write() -> None:
        for version in range(1, 60):
            put(index, 0, 300, version)

    readers, writer = (
        [threading.Thread(target=read) for _ in range(2)],
        threading.Thread(target=write),
    )
    for thread in (*readers, writer):
        thread.start()
    compactions = 0
    while writer.is_alive() or not compactions:
        compactions += index.build(building.Plan("compact"))
    writer.join()
    over.set()
    for thread in readers:
        thread.join()
    assert not wrong
    assert index.count == 1000
    index.build(building.Plan("compact"))
    assert index.tombstones == 0
    assert_as_exact(index, queries)


def test_a_change_in_the_last_moment_of_a_compaction_waits_for_it(index: DatasetIndex) -> None:
    put(index, 0, 1000)
    put(index, 0, 500, version=1)
    writer = threading.Thread(target=put, args=(index, 1000, 1010))
    view = Move.view

    def while_it_moves_in(move: Move) -> View:
        moved = view(move)
        writer.start()
        writer.join(0.2)  # without waiting, it would be done by then and its rows lost
        return moved

    with patch.object(Move, "view", while_it_moves_in):
        assert index.build(building.Plan("compact"))
    writer.join()
    assert (index.count, index.tombstones) == (1010, 0)


def test_a_compaction_gives_way_to_a_dataset_that_takes_another_dimension(
    index: DatasetIndex,
) -> None:
    put(index, 0, 1000)
    wider = random_vectors(500, 2 * DIM, seed=3)
    changes = iter([True])

    def stop() -> bool:
        if next(changes, False):
            index.apply([], np.empty((0, DIM), dtype=np.float32), range(1000))
            index.apply(range(500), wider, [])
        return False

    assert not index.build(building.Plan("compact"), stop)
    np.testing.assert_array_equal(
        [row for _, row in index.view.get(range(500), vectors=True)], wider
    )


def test_filters_let_the_same_rows_through_with_codes_and_after_a_compaction(
    tmp_path: Path,
) -> None:
    columns = (AttachedColumn("lang", "text"),)
    index = DatasetIndex.create(
        tmp_path / "p" / "d",
        metric="l2",
        key_kind="integer",
        dim=DIM,
        columns=columns,
        chunk_bytes=1 << 14,
    )
    langs = ["en", "de", "fr"]
    index.apply(
        range(1000),
        random_vectors(1000, DIM),
        [],
        None,
        [f'["{langs[n % 3]}"]' for n in range(1000)],
    )
    build_all(index)
    index.apply(range(300), random_vectors(300, DIM, seed=1), [], None, ['["de"]'] * 300)
    wanted = parse_filter({"lang": "en"}, columns, "d")
    queries = random_vectors(20, DIM, seed=2)
    there = index.search(queries, 10, view=index.view.where(wanted))
    assert all(
        key >= 300 and key % 3 == 0 for one in there for key in one.keys if isinstance(key, int)
    )
    assert all(len(one.keys) == 10 for one in there)
    assert index.build(building.Plan("compact"))
    moved = DatasetIndex.load(tmp_path / "p" / "d", index.save().saved)
    for one in (index, moved):
        for found, before in zip(
            one.search(queries, 10, view=one.view.where(wanted)), there, strict=True
        ):
            assert found.keys == before.keys


def test_a_sweep_goes_on_in_the_new_generation(index: DatasetIndex) -> None:
    put(index, 0, 600)
    index.begin_sweep()
    put(index, 0, 100)
    put(index, 100, 200, version=1)
    index.build(building.Plan("compact"))
    put(index, 200, 210)
    assert index.end_sweep() == 390
    assert sorted(index.view.keys(None, 1000).keys) == list(range(210))


def test_a_full_disk_leaves_the_old_generation_and_no_file_of_a_new_one(
    index: DatasetIndex, tmp_path: Path
) -> None:
    put(index, 0, 1000)
    put(index, 0, 1000, version=1)
    index.save()
    files, before = sorted((tmp_path / "p" / "d").glob("*")), index.view
    with (
        patch.object(Column, "_write_file", side_effect=DataDirectoryError("no space")),
        pytest.raises(DataDirectoryError),
    ):
        index.build(building.Plan("compact"))
    assert index.view is before
    assert sorted((tmp_path / "p" / "d").glob("*")) == files


def test_damage_that_was_not_noticed_is_not_copied(index: DatasetIndex, tmp_path: Path) -> None:
    put(index, 0, 1000)
    saved = index.save().saved
    with patch("syncd.index.generation.generation.CHECK_AT_LOAD_BYTES", 0):
        flipped(tmp_path / "p" / "d" / next(name for name in saved.file_names if "vectors" in name))
        loaded = DatasetIndex.load(tmp_path / "p" / "d", saved)
    with pytest.raises(DamagedFile):
        loaded.build(building.Plan("compact"))
