"""Another process sees exactly the views that the main process has published, each one whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import invariant, rule

from syncd.index.build import plan as building
from syncd.index.codes.files import save_codes
from syncd.index.dataset import DatasetIndex
from syncd.index.filter.language import parse_filter
from syncd.index.generation.compaction import Move
from syncd.index.shared.exporting import Exporter
from syncd.index.shared.taking import TakenIndex
from syncd.index.storage import arena as arenas
from syncd.index.storage.arena import Arena, ArenaView
from syncd.readers.board import Board
from syncd.readers.shelf import Busy
from syncd.types import AttachedColumn
from tests.forks import Child
from tests.unit.index.coded import DIM, build_all, put
from tests.unit.index.rows import SMALL_CHUNKS, random_vectors
from tests.unit.index.test_index_oracle import IndexAgainstDict

ROWS = 20
PASSES = 300
NOBODY = Arena(list)
"""An arena of which no reader is ever busy."""


def shared(index: DatasetIndex, arena: Arena, *, load: bool = True) -> TakenIndex:
    """The index as a reader takes it; with ``load`` its codes are loaded at once."""
    word = arena.new_word()
    assert word is not None
    exporter = Exporter(arena, word)
    index.share(exporter)

    def nothing(_: TakenIndex) -> None:
        """Codes are loaded by the test."""

    taken = TakenIndex(ArenaView(arena.descriptor), word, exporter.uid, nothing)
    if load:
        taken.view()
        taken.load()
    return taken


class SharedAgainstDict(IndexAgainstDict):
    """After any operations a reader's view of the index equals the dict as well."""

    taken: TakenIndex | None = None

    @rule()
    def share(self) -> None:
        self.index.withdraw()
        self.taken = shared(self.index, NOBODY)

    @rule()
    def save_and_load(self) -> None:
        super().save_and_load()
        if self.taken is not None:
            self.taken = shared(self.index, NOBODY)

    @invariant()
    def taken_equal(self) -> None:
        if self.taken is None:
            return
        view, mine = self.taken.view(), self.index.view
        assert view is not None
        assert (view.count, view.live.count, view.dim) == (mine.count, mine.live.count, mine.dim)
        assert view.keys(None, 100) == mine.keys(None, 100)
        keys = [*self.rows]
        for (one, vector), (other, expected) in zip(
            view.get(keys, vectors=True), mine.get(keys, vectors=True), strict=True
        ):
            assert one == other
            np.testing.assert_array_equal(vector, expected)
        queries = self.random.standard_normal((2, self.dim)).astype(np.float32)
        for found, own in zip(
            self.index.search(queries, 5, view=view), self.index.search(queries, 5), strict=True
        ):
            assert found.keys == own.keys
            np.testing.assert_array_equal(found.distances, own.distances)


TestSharedAgainstDict = SharedAgainstDict.TestCase
TestSharedAgainstDict.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture
def board() -> Board:
    return Board.create()


def test_another_process_sees_every_row_of_one_pass(tmp_path: Path, board: Board) -> None:
    """Each pass sets every row to the pass number: two numbers in one answer are two passes."""
    index = DatasetIndex.create(
        tmp_path / "d", metric="l2", key_kind="integer", chunk_bytes=SMALL_CHUNKS
    )
    keys = list(range(ROWS))
    index.apply(keys, np.zeros((ROWS, 2), np.float32), [])
    arena = Arena(board.busy)
    taken = shared(index, arena)
    memory = ArenaView(arena.descriptor)

    def read() -> int:
        busy, last, looks = Busy(memory, Board(board.descriptor, 1)), 0.0, 0
        while last < PASSES:
            ticket = busy.enter()
            view = taken.view()
            if view is not None:  # None: a file of an older generation is gone
                (found,) = index.search(np.zeros((1, 2), np.float32), ROWS + 5, view=view)
                assert sorted(found.keys) == keys
                (number,) = set(np.round(found.distances / np.sqrt(2)).tolist())
                rows = view.get(keys, vectors=True)
                assert {float(row[0]) for _, row in rows if row is not None} == {number}
                assert number >= last
                last = number
            busy.leave(ticket)
            looks += 1
        return looks

    with patch.object(arenas, "GRACE_SECONDS", 0.001):
        child = Child(read)
        for number in range(1, PASSES + 1):
            index.apply(keys, np.full((ROWS, 2), number, np.float32), [])
            time.sleep(0)
        assert child.result() > 0


def test_a_block_is_kept_while_a_reader_may_read_it_and_then_used_again(
    tmp_path: Path, board: Board
) -> None:
    index = DatasetIndex.create(tmp_path / "d", metric="l2", key_kind="integer")
    keys = list(range(1000))
    index.apply(keys, random_vectors(1000, 2), [])
    with patch.object(arenas, "GRACE_SECONDS", 0.0):
        arena = Arena(board.busy)
        taken = shared(index, arena)
        busy = Busy(ArenaView(arena.descriptor), Board(board.descriptor, 1))
        ticket = busy.enter()
        view = taken.view()
        assert view is not None
        before = view.keys(None, 1000), view.live.bits.tobytes(), view.live.count
        used = arena.used_bytes
        for number in range(100):
            index.apply([], np.empty((0, 2), np.float32), [number])
        arena.collect()
        assert arena.used_bytes > used
        assert (view.keys(None, 1000), view.live.bits.tobytes(), view.live.count) == before
        busy.leave(ticket)
        arena.collect()
        assert arena.used_bytes <= used
        board.clear(1)


def test_a_word_never_has_an_earlier_value_again() -> None:
    """A reader would believe that nothing has changed, if a block is used again."""
    with patch.object(arenas, "GRACE_SECONDS", 0.0):
        arena = Arena(list)
        memory, word = ArenaView(arena.descriptor), arena.new_word()
        assert word is not None
        values, offsets = [], []
        for number in range(5):
            block = arena.put_bytes(b"%d" % number)
            arena.point(word, block)
            values.append(memory.word(word))
            offsets.append(arena.offset(block))
            assert memory.content(values[-1]) == b"%d" % number
            arena.point(word, None)
            del block
            arena.collect()
    assert len(set(offsets)) < len(offsets)
    assert len(set(values)) == len(values)


@pytest.mark.usefixtures("small_codes")
def test_a_reader_without_codes_says_so_and_follows_builds_and_compactions(
    index: DatasetIndex,
) -> None:
    put(index, 0, 1000)
    build_all(index)
    taken = shared(index, NOBODY, load=False)
    queries = random_vectors(5, DIM, seed=4)
    assert taken.view() is not None
    assert taken.lacks_codes
    taken.load()

    def as_the_index() -> None:
        view = taken.view()
        assert view is not None
        assert not taken.lacks_codes
        assert view.codes is not None
        for recall in (0.5, 1.0):
            for found, expected in zip(
                index.search(queries, 10, view=view, recall=recall),
                index.search(queries, 10, recall=recall),
                strict=True,
            ):
                assert found.keys == expected.keys

    as_the_index()
    put(index, 1000, 1200)  # the tail is searched exactly
    as_the_index()
    build_all(index)
    taken.view()
    taken.load()
    as_the_index()
    with patch.object(building, "LEAST_DEAD_SLOTS", 500):
        put(index, 0, 1000, version=2)
        put(index, 0, 1000, version=3)
        assert "compact" in build_all(index)
    assert taken.view() is not None
    assert taken.lacks_codes
    taken.load()
    as_the_index()
    index.clear()
    view = taken.view()
    assert view is not None
    assert (view.count, view.codes) == (0, None)


@pytest.mark.usefixtures("small_codes")
def test_files_of_codes_that_no_checkpoint_names_are_removed(
    index: DatasetIndex, tmp_path: Path
) -> None:
    put(index, 0, 1000)
    shared(index, NOBODY)
    for start in range(1000, 4000, 500):
        put(index, start, start + 500)
        build_all(index)
    present = {path.name for path in (tmp_path / "p" / "d").glob("*.ivf")}
    codes = index.view.codes
    assert codes is not None
    assert present == {file.name for file in codes.codes.files}
    assert present <= {file.name for file in index.save().saved.files}


@pytest.mark.usefixtures("small_codes")
@pytest.mark.parametrize("kind", ["train", "compact"])
def test_an_index_that_is_shared_while_codes_are_built_is_shared_with_these_codes(
    index: DatasetIndex, kind: str
) -> None:
    put(index, 0, 1000)
    if kind == "compact":
        build_all(index)
        put(index, 0, 1000, version=2)
        put(index, 0, 1000, version=3)
    taken: list[TakenIndex] = []

    def share_and(made: Callable[..., Any]) -> Callable[..., Any]:
        def share(*arguments: Any) -> Any:
            taken[:1] = [shared(index, NOBODY)]
            return made(*arguments)

        return share

    with (
        patch.object(DatasetIndex, "swap_codes", share_and(DatasetIndex.swap_codes)),
        patch.object(Move, "catch_up", share_and(Move.catch_up)),
        patch.object(building, "LEAST_DEAD_SLOTS", 500),
    ):
        plan = index.plan_build()
        assert plan is not None
        assert plan.kind == kind
        assert index.build(plan)
    taken[0].view()
    taken[0].load()
    assert not taken[0].lacks_codes


@pytest.mark.usefixtures("small_codes")
def test_codes_that_are_built_while_an_index_is_shared_are_shared(index: DatasetIndex) -> None:
    put(index, 0, 1000)
    build_all(index)

    def build_more(*arguments: Any) -> object:
        if index.count == 1000:
            put(index, 1000, 2000)
            build_all(index)
        return save_codes(*arguments)

    with patch("syncd.index.shared.present.save_codes", build_more):
        taken = shared(index, NOBODY)
    assert not taken.lacks_codes


@pytest.mark.usefixtures("small_codes")
def test_a_build_ends_well_if_the_index_is_withdrawn_or_emptied_meanwhile(
    index: DatasetIndex,
) -> None:
    put(index, 0, 1000)
    shared(index, NOBODY)

    def withdraw(*_: object) -> None:
        index.withdraw()

    with patch("syncd.index.generation.saving.Saver.remove_unnamed", withdraw):
        assert build_all(index)
    index.clear()
    assert not index.build(building.Plan("train"))
    assert not index.build(building.Plan("measure"))
    assert not index.build(building.Plan("ahead", rows=5000))


def test_filters_and_columns_are_read_from_shared_lines(tmp_path: Path) -> None:
    columns = [AttachedColumn("n", "integer")]
    index = DatasetIndex.create(
        tmp_path / "d", metric="l2", key_kind="text", columns=columns, chunk_bytes=SMALL_CHUNKS
    )
    taken = shared(index, NOBODY)
    for start in (0, 10, 20):
        keys = [f"key {number}" for number in range(start, start + 10)]
        lines = [f"[{number % 3}]" for number in range(start, start + 10)]
        index.apply(keys, random_vectors(10, 4, seed=start), [], columns=lines)
        view = taken.view()
        assert view is not None
        wanted = parse_filter({"n": 1}, view.columns, "d")
        (found,) = index.search(np.zeros((1, 4), np.float32), 50, view=view.where(wanted))
        assert {int(str(key).removeprefix("key ")) % 3 for key in found.keys} == {1}
        assert len(found.keys) == sum(number % 3 == 1 for number in range(start + 10))


def test_threads_share_one_taken_index(tmp_path: Path) -> None:
    index = DatasetIndex.create(
        tmp_path / "d", metric="l2", key_kind="integer", chunk_bytes=SMALL_CHUNKS
    )
    taken = shared(index, NOBODY)
    wrong: list[object] = []
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            view = taken.view()
            if view is None or view.live.count not in (0, ROWS):
                wrong.append(view)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(50):
        index.apply(range(ROWS), np.full((ROWS, 2), number, np.float32), [])
    over.set()
    for thread in threads:
        thread.join()
    assert not wrong
