"""A reader sees whole passes, regardless of the writer and a save."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from syncd.index.dataset import DatasetIndex
from tests.unit.index.rows import SMALL_CHUNKS, Create, no_vectors, random_vectors

ROWS = 20
PASSES = 400
PASSES_PER_DATASET = 50
"""Few enough: each pass adds dead slots, which every search walks over (400: 17 s instead of 3)."""


@pytest.mark.parametrize("first", range(0, PASSES, PASSES_PER_DATASET))
def test_readers_see_every_row_of_one_pass(first: int, create: Create) -> None:
    """Each pass sets every row to the pass number: two numbers in one answer are two passes."""
    index = create()
    keys = list(range(ROWS))
    index.apply(keys, np.zeros((ROWS, 2), np.float32), [])
    done = threading.Event()
    failures: list[object] = []

    def read(look: Callable[[], set[float]]) -> None:
        try:
            last = 0.0
            while not done.is_set():
                (number,) = look()
                assert number >= last
                last = number
        except BaseException as error:
            failures.append(error)
            raise

    def search() -> set[float]:
        (result,) = index.search(np.zeros((1, 2), np.float32), ROWS + 5)
        assert sorted(result.keys) == keys
        return set(np.round(result.distances / np.sqrt(2)).tolist())

    def get() -> set[float]:
        rows = index.view.get(keys, vectors=True)
        assert len(rows) == ROWS
        return {float(vector[0]) for _, vector in rows if vector is not None}

    threads = [threading.Thread(target=read, args=(look,)) for look in (search, get)]
    for thread in threads:
        thread.start()
    try:
        for number in range(first + 1, first + 1 + PASSES_PER_DATASET):
            index.apply(keys, np.full((ROWS, 2), number, np.float32), [])
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures


def test_a_view_stays_as_it_was(create: Create) -> None:
    index, vectors = create("cosine"), random_vectors(40, 4)
    index.apply(range(20), vectors[:20], [])
    view = index.view
    before = index.search(vectors[:1], 50, view=view)[0]
    index.apply(range(10, 40), random_vectors(30, 4, seed=1), [0, 1, 2])
    # the key map's buffer is merged away
    index.apply(range(40, 5000), random_vectors(4960, 4, seed=2), [])
    index.clear()
    index.apply([1], random_vectors(1, 7), [])
    after = index.search(vectors[:1], 50, view=view)[0]
    assert before.keys == after.keys
    np.testing.assert_array_equal(before.distances, after.distances)
    assert sorted(view.keys(None, 50).keys) == list(range(20))
    found = view.vector_of(15)
    assert found is not None
    np.testing.assert_allclose(found, vectors[15], rtol=1e-6)


def test_saves_alongside_the_writer_load_as_whole_passes(tmp_path: Path) -> None:
    directory = tmp_path / "p" / "d"
    index = DatasetIndex.create(
        directory, metric="l2", key_kind="text", chunk_bytes=8 * SMALL_CHUNKS
    )
    keys = [f"key {n}" for n in range(ROWS)]
    done = threading.Event()

    def write() -> None:
        for number in range(1, PASSES):
            index.apply(keys, np.full((ROWS, 2), number, np.float32), [])
        done.set()

    index.apply(keys, np.zeros((ROWS, 2), np.float32), [])
    writer = threading.Thread(target=write)
    writer.start()
    try:
        saves = 0
        while not done.is_set() and saves < 30:
            saved = index.save().saved
            loaded = DatasetIndex.load(directory, saved)
            loaded.scrub()
            rows = loaded.view.get(keys, vectors=True)
            assert len(rows) == loaded.count == ROWS
            assert len({float(vector[0]) for _, vector in rows if vector is not None}) == 1
            saves += 1
            del loaded
            gc.collect()  # each of its many small files stays open while it is mapped
    finally:
        writer.join()
    assert saves


def test_captured_rows_are_saved_regardless_of_later_changes(create: Create) -> None:
    index, vectors = create(), random_vectors(60, 4)
    index.apply(range(30), vectors[:30], [])
    captured = index.capture()
    index.apply(range(20, 60), vectors[20:], list(range(10)))
    second = index.capture()
    index.clear()
    index.apply([1], random_vectors(1, 7), [])
    third = index.capture()
    saved = [capture.save().saved for capture in (third, second, captured)]  # in any order
    loaded = [DatasetIndex.load(captured.directory, one) for one in saved]
    assert [(one.count, one.dim) for one in loaded] == [(1, 7), (50, 4), (30, 4)]
    assert [sorted(one.view.keys(None, 100).keys) for one in loaded] == [
        [1],
        list(range(10, 60)),
        list(range(30)),
    ]


def test_pages_of_keys_are_stable_while_rows_change(create: Create) -> None:
    index = create()
    index.apply(range(300), random_vectors(300, 4), [])
    order = index.view.keys(None, 300).keys
    seen, after, more, step = [], None, True, 0
    while more:
        page = index.view.keys(after, 17)
        seen += page.keys
        after, more, step = page.next, page.next is not None, step + 1
        index.apply(range(0, 300, 2), random_vectors(150, 4, seed=step), [])
    assert seen == order
    index.apply([], no_vectors(), [order[3]])
    assert index.view.keys(order[3], 2).keys == order[4:6]
