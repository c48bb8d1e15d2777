"""A contiguous column's rows are one array, and an array that a reader holds keeps its bytes."""

from __future__ import annotations

import errno
import gc
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from structlog.testing import capture_logs

from syncd.index.search.exact import search_numbers, search_rows
from syncd.index.storage import places
from syncd.index.storage.columns import Column, ColumnView
from syncd.types import Metric

CHUNK_BYTES = 1 << 14
CHUNK_ROWS = 512
WIDTH = 8


def column(directory: Path, dtype: str = "<f4") -> Column:
    return Column(directory, "c", "bin", dtype, WIDTH, CHUNK_BYTES, contiguous=True)


def some_rows(count: int, dtype: str = "<f4") -> NDArray[Any]:
    return np.random.default_rng(5).integers(0, 2000, (count, WIDTH)).astype(dtype)


def write(to: Column, rows: NDArray[Any], start: int, stop: int, step: int = 100) -> None:
    """Write rows in passes, each sealed like a published one."""
    for begin in range(start, stop, step):
        end = min(begin + step, stop)
        to.write(begin, rows[begin:end])
        to.seal(end)


def assert_one_array(view: ColumnView, rows: NDArray[Any]) -> None:
    assert view.rows is not None
    np.testing.assert_array_equal(view.rows[: len(rows)], rows)
    np.testing.assert_array_equal(view.read(3, len(rows)), rows[3:])
    wanted = np.array([len(rows) - 1, 0, len(rows) // 2, 7, 7])
    np.testing.assert_array_equal(view.take(wanted), rows[wanted])


def mappings_of(directory: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(directory))


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("dtype", ["<f4", "<f2"])
def test_rows_of_all_chunks_are_one_array_while_chunks_become_mappings(
    tmp_path: Path, dtype: str
) -> None:
    rows = some_rows(2600, dtype)
    written = column(tmp_path, dtype)
    for stop in range(100, 2601, 100):
        write(written, rows, stop - 100, stop)
        assert_one_array(written.view, rows[:stop])
    assert mappings_of(tmp_path) == 2600 * written.row_bytes // CHUNK_BYTES


def test_views_keep_their_rows_while_the_column_outgrows_its_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "RESERVED_CHUNKS", 2)
    monkeypatch.setattr(places, "RESERVED_GROWTH", 1)
    rows, views = some_rows(6000), []
    growing = column(tmp_path)
    for stop in range(100, 6001, 100):
        write(growing, rows, stop - 100, stop)
        views.append((growing.view, stop))
    for view, count in views:
        assert_one_array(view, rows[:count])
    del view
    mapped = mappings_of(tmp_path)
    views = views[-1:]
    gc.collect()
    assert mappings_of(tmp_path) == 6000 // CHUNK_ROWS < mapped
    assert_one_array(views[0][0], rows)


def test_readers_of_a_chunk_see_its_rows_while_it_becomes_a_mapping(tmp_path: Path) -> None:
    chunks = 600
    rows = some_rows(chunks * CHUNK_ROWS)
    sealed = column(tmp_path)
    write(sealed, rows, 0, CHUNK_ROWS)
    published = [(sealed.view, CHUNK_ROWS)]
    done, wrong = threading.Event(), list[int]()

    def read() -> None:
        while not done.is_set():
            view, count = published[0]
            assert view.rows is not None
            start = count - CHUNK_ROWS
            if not np.array_equal(view.rows[start:count], rows[start:count]):
                wrong.append(count)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, chunks):
            start = number * CHUNK_ROWS
            sealed.write(start, rows[start : start + CHUNK_ROWS])
            published[0] = (sealed.view, start + CHUNK_ROWS)
            assert sealed.seal(start + CHUNK_ROWS)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_the_last_view_gives_the_range_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "RESERVED_CHUNKS", 1 << 20)
    reserved, before = CHUNK_BYTES << 20, virtual_bytes()
    rows = some_rows(2000)
    filled = column(tmp_path)
    write(filled, rows, 0, 2000)
    view = filled.view
    del filled
    assert virtual_bytes() - before >= reserved
    assert_one_array(view, rows)
    part = view.read(100, 200)
    del view
    np.testing.assert_array_equal(part, rows[100:200])
    del part
    assert virtual_bytes() - before < reserved
    assert not mappings_of(tmp_path)


def test_a_column_that_gets_no_range_serves_from_where_its_chunks_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = some_rows(3000)
    refused = column(tmp_path)
    write(refused, rows, 0, 400)
    monkeypatch.setattr(places, "RESERVED_CHUNKS", 1 << 40)  # more than a process can address
    with capture_logs() as logs:
        write(refused, rows, 400, 3000)
    assert [(each["event"], each["log_level"]) for each in logs] == [
        ("address_range_refused", "warning")
    ]
    view = refused.view
    assert view.rows is None
    wanted = np.arange(2999, -1, -7)
    np.testing.assert_array_equal(view.take(wanted), rows[wanted])
    np.testing.assert_array_equal(view.read(300, 1700), rows[300:1700])
    assert refused.is_sealed(3000)


def test_a_column_that_gets_no_larger_range_keeps_the_first_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "RESERVED_CHUNKS", 2)
    monkeypatch.setattr(places, "RESERVED_GROWTH", 1)
    rows = some_rows(3000)
    refused = column(tmp_path)
    write(refused, rows, 0, 900)
    before = refused.view
    monkeypatch.setattr(places, "RESERVED_GROWTH", 1 << 40)
    with capture_logs() as logs:
        write(refused, rows, 900, 3000)
    assert len(logs) == 1
    assert_one_array(before, rows[:900])
    wanted = np.arange(2999, -1, -7)
    np.testing.assert_array_equal(refused.view.take(wanted), rows[wanted])
    assert refused.is_sealed(3000)


@pytest.mark.parametrize("count", [CHUNK_ROWS - 1, CHUNK_ROWS, CHUNK_ROWS + 1, 5 * CHUNK_ROWS + 9])
def test_loaded_rows_are_one_array_to_which_rows_are_added(tmp_path: Path, count: int) -> None:
    rows = some_rows(8 * CHUNK_ROWS)
    written = column(tmp_path)
    write(written, rows, 0, count)
    files, _ = written.save(written.view, count)
    loaded = column(tmp_path)
    loaded.load({file.name: file for file in files}, count, check=True)
    assert_one_array(loaded.view, rows[:count])
    write(loaded, rows, count, len(rows))
    assert_one_array(loaded.view, rows)


def test_chunks_that_a_full_disk_kept_in_memory_move_to_a_larger_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "RESERVED_CHUNKS", 2)
    monkeypatch.setattr(places, "RESERVED_GROWTH", 1)
    rows = some_rows(3000)
    filled = column(tmp_path)
    with monkeypatch.context() as disk:

        def full(*_: object) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        disk.setattr(os, "pwrite", full)
        write(filled, rows, 0, 3000)
        view = filled.view
        assert not filled.is_sealed(3000)
        assert_one_array(view, rows)
    assert filled.seal(3000)
    assert filled.is_sealed(3000)
    assert_one_array(filled.view, rows)
    assert_one_array(view, rows)
    assert filled.heap_bytes == CHUNK_BYTES


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
@pytest.mark.parametrize("dim", [1, 3, 16, 100, 128, 384, 785])
def test_rows_that_are_read_in_place_have_the_distances_of_copied_ones(
    metric: Metric, dim: int
) -> None:
    random = np.random.default_rng(dim)
    rows = random.standard_normal((400, dim)).astype(np.float32)
    rows[7], rows[9] = 3e38, -3e38  # these overflow
    query = 4 * random.standard_normal((1, dim)).astype(np.float32)
    for count in (5, 200):
        numbers = random.permutation(400)[:count]
        numbers[:2] = 7, 9
        copied, chosen = search_rows(metric, query, rows[numbers], count)
        in_place, found = search_numbers(metric, query, rows, numbers, count)
        np.testing.assert_array_equal(in_place, copied)
        np.testing.assert_array_equal(found, np.where(chosen < 0, -1, numbers[chosen]))
