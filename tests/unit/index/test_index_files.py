"""A checkpoint loads as it was saved, or is reported as damaged; a full disk loses nothing."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.index.dataset import DatasetIndex
from syncd.index.generation import generation
from syncd.index.saved import SavedIndex
from syncd.index.storage import columns
from syncd.index.storage.columns import Column
from syncd.index.storage.files import make_directory
from syncd.types import KeyKind, Metric
from tests.unit.index.rows import SMALL_CHUNKS, Create, key_of, no_vectors, random_vectors

BITMAP_BYTES = 1003 // 8 + 1
KINDS: list[KeyKind] = ["integer", "uuid", "text", "composite"]


def filled(
    directory: Path, kind: KeyKind = "text", metric: Metric = "cosine", rows: int = 37
) -> DatasetIndex:
    index = DatasetIndex.create(directory, metric=metric, key_kind=kind, chunk_bytes=SMALL_CHUNKS)
    index.apply([key_of(kind, n) for n in range(rows)], random_vectors(rows, 4), [])
    index.apply(
        [key_of(kind, 1)], random_vectors(1, 4, seed=9), [key_of(kind, n) for n in range(10, 13)]
    )
    return index


def assert_same(one: DatasetIndex, other: DatasetIndex) -> None:
    keys = one.view.keys(None, 10_000)
    assert keys == other.view.keys(None, 10_000)
    for (key, vector), (other_key, other_vector) in zip(
        one.view.get(keys.keys, vectors=True), other.view.get(keys.keys, vectors=True), strict=True
    ):
        assert key == other_key
        np.testing.assert_array_equal(vector, other_vector)
    query = random_vectors(1, one.dim or 1, seed=3)
    assert one.search(query, 10)[0].keys == other.search(query, 10)[0].keys
    assert (one.count, one.tombstones, one.dim) == (other.count, other.tombstones, other.dim)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [14, 15, 16, 37])
def test_a_saved_index_loads_the_same_through_json(
    directory: Path, kind: KeyKind, rows: int
) -> None:
    index = filled(directory, kind, rows=rows)
    saved = msgspec.json.decode(msgspec.json.encode(index.save().saved), type=SavedIndex)
    loaded = DatasetIndex.load(directory, saved)
    assert loaded.verified
    assert_same(index, loaded)
    assert set(saved.file_names) == {path.name for path in directory.iterdir()}


def test_an_empty_index_loads_empty(create: Create, directory: Path) -> None:
    saved = create("cosine").save().saved
    loaded = DatasetIndex.load(directory, saved)
    assert (loaded.count, loaded.dim, saved.files) == (0, None, ())
    loaded.apply([1], random_vectors(1, 3), [])
    assert DatasetIndex.load(directory, loaded.save().saved).count == 1


def test_only_new_bytes_are_written(directory: Path) -> None:
    index = filled(directory, "integer", "l2", rows=1000)
    first = index.save()
    assert index.save() == (first.saved, 0)
    index.apply([5000], random_vectors(1, 4), [])
    assert index.save().bytes_written == 16 + 8 + 8 + BITMAP_BYTES  # vector, key, fingerprint
    index.apply([], no_vectors(), [5000])
    assert index.save().bytes_written == BITMAP_BYTES


def test_a_cleared_generation_gives_its_memory_and_files_back(directory: Path) -> None:
    index = filled(directory, rows=300)
    generation_of_before = weakref.ref(index._state.generation)
    gc.disable()
    try:
        index.clear()
        assert generation_of_before() is None
    finally:
        gc.enable()
    assert index.bytes_disk == 0


def damages(content: bytes) -> list[bytes]:
    return [
        content[:-1],
        b"",
        bytes([content[0] ^ 1]) + content[1:],
        content[:-1] + bytes([content[-1] ^ 0x10]),
    ]


@pytest.mark.parametrize("kind", ["uuid", "text"])
def test_each_file_that_is_damaged_or_missing_is_named(directory: Path, kind: KeyKind) -> None:
    saved = filled(directory, kind).save().saved
    for file in saved.files:
        path = directory / file.name
        content = path.read_bytes()
        for damaged in damages(content):
            path.write_bytes(damaged)
            with pytest.raises(DamagedFile, match=file.name):
                DatasetIndex.load(directory, saved)
        path.unlink()
        with pytest.raises(DamagedFile, match=f"{file.name} is missing"):
            DatasetIndex.load(directory, saved)
        path.write_bytes(content)
    assert DatasetIndex.load(directory, saved).count == 34


def test_a_checkpoint_that_does_not_list_its_files_is_damaged(directory: Path) -> None:
    saved = filled(directory).save().saved
    for file in saved.files:
        rest = tuple(other for other in saved.files if other is not file)
        with pytest.raises(DamagedFile):
            DatasetIndex.load(directory, msgspec.structs.replace(saved, files=rest))
    with pytest.raises(DamagedFile):
        DatasetIndex.load(directory, msgspec.structs.replace(saved, slots=saved.slots + 1))


def test_large_vector_files_are_scrubbed_later(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "CHECK_AT_LOAD_BYTES", 0)
    saved = filled(directory).save().saved
    loaded = DatasetIndex.load(directory, saved)
    before = loaded.verified
    loaded.scrub()
    assert (before, loaded.verified) == (False, True)
    path = next(directory.glob("*-vectors-000001*"))
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    loaded = DatasetIndex.load(directory, saved)
    with pytest.raises(DamagedFile, match=path.name):
        loaded.scrub()
    assert not loaded.verified


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_a_crash_left_after_the_checkpoint_are_overwritten(
    directory: Path, kind: KeyKind
) -> None:
    index = filled(directory, kind)
    checkpoint = index.save().saved
    index.apply([key_of(kind, n) for n in range(50, 90)], random_vectors(40, 4, seed=4), [])
    index.save()  # the crash loses its manifest
    again = DatasetIndex.load(directory, checkpoint)
    assert again.count == 34
    again.apply([key_of(kind, n) for n in range(60, 75)], random_vectors(15, 4, seed=5), [])
    assert DatasetIndex.load(directory, checkpoint).count == 34  # the old checkpoint is still whole
    loaded = DatasetIndex.load(directory, again.save().saved)
    assert_same(again, loaded)
    assert DatasetIndex.load(directory, checkpoint).count == 34


def test_a_checkpoint_outlives_later_changes(directory: Path) -> None:
    index = filled(directory)
    first = index.save().saved
    index.apply([key_of("text", 2)], random_vectors(1, 4, seed=6), [])
    second = index.save().saved
    index.clear()
    index.apply([key_of("text", 3)], random_vectors(1, 9), [])
    third = index.save().saved
    assert not set(first.file_names) & set(third.file_names)
    assert [DatasetIndex.load(directory, saved).count for saved in (first, second, third)] == [
        34,
        34,
        1,
    ]
    assert DatasetIndex.load(directory, third).dim == 9


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_loses_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, kind: KeyKind
) -> None:
    index = filled(directory, kind)
    checkpoint = index.save().saved
    monkeypatch.setattr(columns, "WRITE_AHEAD_BYTES", 16)
    with monkeypatch.context() as disk:
        disk.setattr(os, "pwrite", full_disk(after_calls=2))
        for n in range(5):
            index.apply(
                [key_of(kind, 100 + n * 20 + i) for i in range(20)],
                random_vectors(20, 4, seed=n),
                [],
            )
        assert index.count == 134
        with pytest.raises(DataDirectoryError, match="No space left"):
            index.save()
        index.apply([key_of(kind, 300)], random_vectors(1, 4), [])
    assert DatasetIndex.load(directory, checkpoint).count == 34
    assert_same(index, DatasetIndex.load(directory, index.save().saved))
    index.apply([key_of(kind, 301)], random_vectors(1, 4), [])
    assert_same(index, DatasetIndex.load(directory, index.save().saved))


def full_disk(after_calls: int) -> Callable[[int, memoryview, int], int]:
    """A pwrite that writes half of its bytes, and after some calls finds no space."""
    calls = 0
    write = os.pwrite

    def pwrite(descriptor: int, content: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > after_calls:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content[: max(1, len(content) // 2)], offset)

    return pwrite


def test_bytes_that_a_failed_fsync_lost_are_written_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_directory(directory)
    index = DatasetIndex.create(directory, metric="cosine", key_kind="text")
    index.apply([key_of("text", n) for n in range(30)], random_vectors(30, 4), [])
    for failing in range(4):
        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", losing_fsync(failing))
            with pytest.raises(DataDirectoryError, match="Input/output error"):
                index.save()
        assert_same(index, DatasetIndex.load(directory, index.save().saved))
        index.apply([key_of("text", 50 + failing)], random_vectors(1, 4), [])


def test_a_mapped_chunk_that_a_failed_fsync_lost_is_called_damaged(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = filled(directory)
    monkeypatch.setattr(os, "fsync", losing_fsync(0))
    with pytest.raises(DamagedFile, match="vectors-000000"):
        index.save()


def losing_fsync(at: int) -> Callable[[int], None]:
    """An fsync that fails once and loses the file's bytes, as after a failed write-back."""
    calls = 0
    fsync = os.fsync

    def lose(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at + 1:
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    return lose


def test_a_save_returns_when_its_files_and_their_names_are_durable(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable: list[str] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        durable.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    index = filled(directory)
    # the new directories' names
    assert durable == [
        directory.parent.parent.name,
        directory.parent.name,
    ]
    saved = index.save().saved
    assert set(saved.file_names) <= set(durable)
    assert durable[-1] == directory.name


def test_full_chunks_leave_the_heap_for_their_files(directory: Path) -> None:
    index = DatasetIndex.create(directory, metric="l2", key_kind="integer", chunk_bytes=1 << 14)
    index.apply(range(5000), random_vectors(5000, 32), [])
    assert index.bytes_memory < 5000 * 128 / 2
    assert index.bytes_disk > 5000 * 128 * 0.9
    with pytest.raises(ValueError, match="read-only"):
        index.view.vectors.chunks[0][0] = 0


def test_small_datasets_hold_no_file_and_little_memory(tmp_path: Path) -> None:
    gc.collect()
    before, maps_before = len(list(Path("/proc/self/fd").iterdir())), number_of_mappings()
    indexes = []
    for number in range(20):
        index = DatasetIndex.create(tmp_path / str(number), metric="cosine", key_kind="integer")
        index.apply(range(10), random_vectors(10, 8), [])
        index.save()
        indexes.append(index)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert max(index.bytes_memory for index in indexes) < 2000
    assert number_of_mappings() - maps_before < 10


def number_of_mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def test_a_directory_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    index = DatasetIndex.create(tmp_path / "file" / "dataset", metric="l2", key_kind="integer")
    index.apply([1], random_vectors(1, 8), [])
    with pytest.raises(DataDirectoryError):
        index.save()
    (tmp_path / "file").unlink()
    index.save()
    assert index.count == 1


@pytest.mark.parametrize("width", [None, 1, 3, 7])
@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<u8", "u1"])
def test_rows_out_of_many_chunks_are_those_that_were_written(
    tmp_path: Path, dtype: str, width: int | None
) -> None:
    """Chunks are on the heap and mapped, in any order in memory; rows are in any order, twice, or
    none.
    """
    column = Column(tmp_path / "p" / "d", "c", "bin", dtype, width, 256)
    shape = (997,) if width is None else (997, width)
    rows = np.random.default_rng(3).integers(0, 200, shape).astype(dtype)
    for start in range(0, 997, 50):
        column.write(start, rows[start : start + 50])
        if start == 500:
            column.seal(550)
    view = column.view
    assert len(view.chunks) > 3
    for wanted in (np.arange(997), np.array([996, 0, 500, 500, 3]), np.array([], dtype=np.int64)):
        np.testing.assert_array_equal(view.take(wanted), rows[wanted])
