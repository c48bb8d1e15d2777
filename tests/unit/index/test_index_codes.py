"""Codes of larger datasets: when they are built anew, what recall they promise, what is saved of them, and what a damaged file costs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import pytest

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.index import approximate, building, joining
from syncd.index.calibration import Calibration, Point
from syncd.index.codes import LiveCodes
from syncd.index.columns import Column
from syncd.index.compaction import Move
from syncd.index.dataset import DatasetIndex
from syncd.index.exact import search_exact
from syncd.index.filters import parse_filter
from syncd.index.search import point_for
from syncd.index.training import Cancelled
from syncd.index.vectors import Vectors
from syncd.index.view import View
from syncd.types import AttachedColumn, Metric
from tests.unit.index.rows import random_vectors

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "sift-1m-128-l2.npz"
DIM = 16


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    """Codes from 300 rows on."""
    with ExitStack() as stack:
        for name, value in {"EXACT_ROWS": (300, 300), "TAIL_ELEMENTS": 1, "TAIL_ROWS": 100}.items():
            stack.enter_context(patch.object(building, name, value))
        stack.enter_context(patch("syncd.index.measuring.CHEAPER_THAN_EXACT", 1000.0))
        stack.enter_context(patch("syncd.index.measuring.QUERIES", {10: 60, 40: 15, 100: 15, 1000: 5}))
        yield


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    return DatasetIndex.create(tmp_path / "p" / "d", metric="l2", key_kind="integer", dim=DIM, chunk_bytes=1 << 14)


def put(index: DatasetIndex, start: int, stop: int, version: int = 0) -> None:
    index.apply(range(start, stop), random_vectors(stop - start, DIM, seed=start + 7919 * version), [])


def build_all(index: DatasetIndex, recall: float = 0.95) -> list[str]:
    done: list[str] = []
    while (plan := index.plan_build(recall)) is not None:
        assert index.build(plan)
        done.append(plan.kind)
        assert len(done) < 20, f"there is no end to it: {done}"
    return done


def assert_as_exact(index: DatasetIndex, queries: Vectors) -> None:
    for found, exact in zip(index.search(queries, 10, recall=0.5), index.search(queries, 10, exact=True), strict=True):
        np.testing.assert_allclose(found.distances, exact.distances, rtol=1e-5)


def everything(index: DatasetIndex) -> None:
    """Have every row be a candidate: then any difference from an exact search is an error."""
    codes = index.view.codes
    assert codes is not None
    points = tuple(Point(k, 1 << 20, 1 << 20, 1.0, 1.0, 1.0) for k in (10, 100))
    calibration = msgspec.structs.replace(codes.codes.calibration, points=points)
    assert index.swap_codes(codes.codes, replace(codes.codes, calibration=calibration))


def test_a_dataset_is_exact_then_building_then_codes_and_exact_again_when_little_is_left(index: DatasetIndex) -> None:
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


def test_new_codes_serve_the_ten_nearest_at_once_and_more_when_that_is_measured(index: DatasetIndex) -> None:
    put(index, 0, 2000)
    plan = index.plan_build()
    assert plan is not None
    assert index.build(plan)
    queries = random_vectors(5, DIM, seed=9)
    assert point_for(index.view, 10, 0.95) is not None
    assert point_for(index.view, 100, 0.95) is None, "it is exact meanwhile"
    for found, exact in zip(index.search(queries, 100), index.search(queries, 100, exact=True), strict=True):
        assert found.keys == exact.keys
    assert build_all(index) == ["measure"]
    assert point_for(index.view, 100, 0.95) is not None


def part_rows(index: DatasetIndex) -> list[int]:
    codes = index.view.codes
    return [] if codes is None else [part.rows for part in codes.codes.parts]


def test_what_is_built_when(index: DatasetIndex) -> None:
    put(index, 0, 2000)
    assert build_all(index) == ["train", "measure"]
    put(index, 2000, 2090)
    assert (build_all(index), part_rows(index)) == ([], [2000])  # they wait in the tail
    put(index, 2090, 2104)
    assert (build_all(index), part_rows(index)) == (["extend"], [2000, 104])
    put(index, 2104, 2304)
    assert (build_all(index), part_rows(index)) == (["extend"], [2000, 304])  # merged with the small part
    index.apply([], np.empty((0, DIM), dtype=np.float32), range(401))
    assert (build_all(index), part_rows(index)) == (["purge"], [1599, 304])  # a fifth of the first part was dead
    put(index, 2304, 2600)
    assert (build_all(index), part_rows(index)) == (["extend", "measure"], [2199])  # a quarter came, and a fifth went
    put(index, 3000, 9000)
    assert (build_all(index), part_rows(index)) == (["train", "measure"], [8199])  # four times the rows


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("loaded", [False, True])
def test_joined_codes_are_those_that_encoding_all_rows_would_give(metric: Metric, loaded: bool, tmp_path: Path) -> None:
    index = DatasetIndex.create(tmp_path / "p" / "d", metric=metric, key_kind="integer", dim=DIM)
    put(index, 0, 1003)
    build_all(index)
    for stop in (1111, 1260, 1405):  # lists of which the last block of 32 is not full
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
    joined = joining.joined(codes.codebook, codes.parts, view.live, 98, lambda: False)
    encoded = building.encode(view, codes.codebook, 0, codes.stop, 99, lambda: False)
    point = Point(10, 4, 5000, 1.0, 1.0, 1.0)  # all rows of four lists
    queries = random_vectors(30, DIM, seed=11)
    found = [
        LiveCodes(replace(codes, parts=(part,)), view.live).candidates(queries, point) for part in (joined, encoded)
    ]
    for (distances, slots), (wanted_distances, wanted_slots) in zip(
        *(zip(*one, strict=True) for one in found), strict=True
    ):
        assert distances[slots >= 0].tolist() == wanted_distances[wanted_slots >= 0].tolist()
        assert set(slots.tolist()) == set(wanted_slots.tolist())
    assert (joined.start, joined.stop, joined.rows) == (0, codes.stop, encoded.rows)


@pytest.mark.parametrize("first", [120, 128, 136, 256])
def test_a_list_of_any_length_takes_more(index: DatasetIndex, first: int) -> None:
    with patch("syncd.index.training.ROWS_PER_LIST", 10_000):
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
    found = joining.joined(codebook, (one, two), view.live, 9, lambda: False)
    slots, codes = zip(*(joining._rows(part, 0, int(part.index.M2), view.live) for part in (found, both)), strict=True)
    np.testing.assert_array_equal(*slots)
    np.testing.assert_array_equal(*codes)
    assert found.rows == 600
    assert len(np.unique(codes[0], axis=0)) > 100
    assert joining.joined(codebook, (one, two), np.zeros_like(view.live), 9, lambda: False).rows == 0


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
        for found, exact in zip(index.search(queries, 10), index.search(queries, 10, exact=True), strict=True):
            assert found.keys == exact.keys
        assert build_all(index) == []
        put(index, 0, 260, version=1)  # as many rows, but other ones
        assert build_all(index) == ["extend", "measure", "train", "measure"]
        codes = index.view.codes
        assert codes is not None
        assert codes.codes.codebook.trained_slots == 1260


def test_the_recall_of_other_rows_is_at_or_above_each_target(tmp_path: Path) -> None:
    if not DATA.exists():
        pytest.skip(f"needs {DATA.name}, which is not part of the project")
    with np.load(DATA) as data, patch("syncd.index.measuring.CHEAPER_THAN_EXACT", 0.9):
        rows = data["base"][:62_000].astype(np.float32)
    rows = rows[np.random.default_rng(0).permutation(len(rows))]
    held_out, rows = rows[:2000], rows[2000:]
    index = DatasetIndex.create(tmp_path / "p" / "d", metric="l2", key_kind="integer", dim=128)
    index.apply(range(len(rows)), rows, [])
    with patch("syncd.index.measuring.QUERIES", {10: 600, 40: 15, 100: 60, 1000: 5}):
        build_all(index)
    exact = index.search(held_out, 10, exact=True)
    for target in (0.8, 0.9, 0.95, 0.98, 0.99):
        assert index.kind(target) == "codes"
        found = index.search(held_out, 10, recall=target)
        limits = [one.distances[-1] * (1 + 1e-6) for one in exact]
        recall = np.mean([(one.distances <= limit).mean() for one, limit in zip(found, limits, strict=True)])
        assert recall >= target
        assert index.recall(target) >= target
        for one in found[:100]:
            held = rows[np.array(one.keys)].astype(np.float64)
            assert one.distances.tolist() == sorted(one.distances)
            assert len(held) == 10
    codes = index.view.codes
    assert codes is not None
    assert codes.codes.nbytes / len(rows) < 50


def test_a_start_does_not_train_again_and_a_checkpoint_writes_codes_once(index: DatasetIndex, tmp_path: Path) -> None:
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


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("which", [0, 1], ids=["codebook", "part"])
@pytest.mark.parametrize(
    "damage",
    [flipped, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])],
    ids=["changed", "missing", "short"],
)
def test_damaged_codes_are_built_again_from_the_vectors_and_searches_are_exact_meanwhile(
    which: int, damage: Callable[[Path], None], index: DatasetIndex, tmp_path: Path
) -> None:
    put(index, 0, 1000)
    build_all(index)
    saved = index.save().saved
    damage(tmp_path / "p" / "d" / [name for name in saved.file_names if name.endswith(".ivf")][which])
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


def test_new_codes_never_overwrite_those_of_a_checkpoint_that_is_kept(index: DatasetIndex, tmp_path: Path) -> None:
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


def test_a_full_disk_fails_the_save_and_the_next_one_goes_on(index: DatasetIndex, tmp_path: Path) -> None:
    put(index, 0, 1000)
    build_all(index)
    with (
        patch("syncd.index.codefiles.write_at", side_effect=DataDirectoryError("no space")),
        pytest.raises(DataDirectoryError, match="no space"),
    ):
        index.save()
    assert not DatasetIndex.load(tmp_path / "p" / "d", index.save().saved).codes_damage


@pytest.mark.parametrize("kind", ["train", "compact"])
def test_codes_of_rows_that_were_cleared_meanwhile_are_not_used(kind: str, index: DatasetIndex) -> None:
    put(index, 0, 1000)
    cleared = iter([True])

    def stop() -> bool:
        if next(cleared, False):
            index.clear()
            put(index, 0, 500, version=2)
        return False

    assert not index.build(building.Plan(kind), stop)  # type: ignore[arg-type]  # one of its literals
    assert index.view.codes is None
    now = [row for _, row in index.get(range(500), vectors=True)]
    np.testing.assert_array_equal(now, random_vectors(500, DIM, seed=7919 * 2))


@pytest.mark.parametrize("kind", ["train", "compact"])
def test_a_build_can_be_given_up_anywhere(kind: str, index: DatasetIndex, tmp_path: Path) -> None:
    plan = building.Plan(kind)  # type: ignore[arg-type]  # one of its literals
    put(index, 0, 1000)
    build_all(index)
    asked = 0

    def count() -> bool:
        nonlocal asked
        asked += 1
        return False

    with patch("syncd.index.compaction.BLOCK_BYTES", 1 << 13), patch.object(building, "BLOCK_ROWS", 128):
        index.build(plan, count)
        files, before = sorted((tmp_path / "p" / "d").glob("*")), index.view
        for moment in range(0, asked // 2, max(1, asked // 40)):  # how long it measures depends on what it finds
            left = iter([False] * moment)
            with pytest.raises(Cancelled):
                index.build(plan, lambda left=left: next(left, True))  # type: ignore[misc]
            assert index.view is before
            assert sorted((tmp_path / "p" / "d").glob("*")) == files


# Dead slots given back


def test_more_than_half_dead_is_given_back_with_its_disk_and_memory(index: DatasetIndex, tmp_path: Path) -> None:
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
    found = DatasetIndex.load(tmp_path / "p" / "d", saved.saved).search(random_vectors(5, DIM, seed=4), 10, exact=True)
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
            for one, other in zip(index.search(queries, 10, recall=0.5, view=view), exact, strict=True):
                if one.keys != other.keys or len(set(one.keys)) < 10:
                    wrong.append(f"{one.keys} {other.keys}")

    def write() -> None:
        for version in range(1, 60):
            put(index, 0, 300, version)

    readers, writer = [threading.Thread(target=read) for _ in range(2)], threading.Thread(target=write)
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
        writer.join(0.2)  # it would be done by then, and its rows lost
        return moved

    with patch.object(Move, "view", while_it_moves_in):
        assert index.build(building.Plan("compact"))
    writer.join()
    assert (index.count, index.tombstones) == (1010, 0)


def test_a_compaction_gives_way_to_a_dataset_that_takes_another_dimension(index: DatasetIndex) -> None:
    put(index, 0, 1000)
    wider = random_vectors(500, 2 * DIM, seed=3)
    changes = iter([True])

    def stop() -> bool:
        if next(changes, False):
            index.apply([], np.empty((0, DIM), dtype=np.float32), range(1000))
            index.apply(range(500), wider, [])
        return False

    assert not index.build(building.Plan("compact"), stop)
    np.testing.assert_array_equal([row for _, row in index.get(range(500), vectors=True)], wider)


def test_filters_let_the_same_rows_through_with_codes_and_after_a_compaction(tmp_path: Path) -> None:
    columns = (AttachedColumn("lang", "text"),)
    index = DatasetIndex.create(
        tmp_path / "p" / "d", metric="l2", key_kind="integer", dim=DIM, columns=columns, chunk_bytes=1 << 14
    )
    langs = ["en", "de", "fr"]
    index.apply(range(1000), random_vectors(1000, DIM), [], None, [f'["{langs[n % 3]}"]' for n in range(1000)])
    build_all(index)
    index.apply(range(300), random_vectors(300, DIM, seed=1), [], None, ['["de"]'] * 300)
    wanted = parse_filter({"lang": "en"}, columns, "d")
    queries = random_vectors(20, DIM, seed=2)
    there = index.search(queries, 10, view=index.view.where(wanted))
    assert all(key >= 300 and key % 3 == 0 for one in there for key in one.keys if isinstance(key, int))
    assert all(len(one.keys) == 10 for one in there)
    assert index.build(building.Plan("compact"))
    moved = DatasetIndex.load(tmp_path / "p" / "d", index.save().saved)
    for one in (index, moved):
        for found, before in zip(one.search(queries, 10, view=one.view.where(wanted)), there, strict=True):
            assert found.keys == before.keys


def test_a_sweep_goes_on_in_the_new_generation(index: DatasetIndex) -> None:
    put(index, 0, 600)
    index.begin_sweep()
    put(index, 0, 100)
    put(index, 100, 200, version=1)
    index.build(building.Plan("compact"))
    put(index, 200, 210)
    assert index.end_sweep() == 390
    assert sorted(index.keys(None, 1000).keys) == list(range(210))


def test_a_full_disk_leaves_the_old_generation_and_no_file_of_a_new_one(index: DatasetIndex, tmp_path: Path) -> None:
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


def test_damage_that_nobody_has_noticed_is_not_copied(index: DatasetIndex, tmp_path: Path) -> None:
    put(index, 0, 1000)
    saved = index.save().saved
    with patch("syncd.index.generation.CHECK_AT_LOAD_BYTES", 0):
        flipped(tmp_path / "p" / "d" / next(name for name in saved.file_names if "vectors" in name))
        loaded = DatasetIndex.load(tmp_path / "p" / "d", saved)
    with pytest.raises(DamagedFile):
        loaded.build(building.Plan("compact"))


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_unselective_filters_use_the_codes_and_reach_the_recall(
    metric: Metric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By chance, by what lies near the queries, and by what lies far from them: nothing is missed that an exact search finds."""
    rows, columns = 20_000, (AttachedColumn("chance", "integer"), AttachedColumn("side", "integer"))
    index = DatasetIndex.create(tmp_path / "f", metric=metric, key_kind="integer", dim=DIM, columns=columns)
    vectors = random_vectors(rows, DIM)
    chances = np.random.default_rng(5).integers(0, 100, rows)
    sides = (vectors[:, 0].argsort().argsort() * 100) // rows
    index.apply(range(rows), vectors, [], None, [f"[{a},{b}]" for a, b in zip(chances, sides, strict=True)])
    build_all(index)
    index.apply(range(500), random_vectors(500, DIM, seed=1), [], None, ["[50,50]"] * 500)
    queries = random_vectors(60, DIM, seed=2)
    exact_searches: list[int] = []
    monkeypatch.setattr(
        "syncd.index.search.exact_elements", lambda _: 1 << 60
    )  # of so few rows it would be the cheaper one

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
