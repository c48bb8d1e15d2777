"""The effects of one pass on a dataset."""

from __future__ import annotations

import numpy as np
import pytest

from syncd.errors import DimensionMismatch, InvalidParams, InvalidVector
from syncd.index.rows.vectors import VectorFormat
from syncd.types import Key, KeyKind
from tests.unit.index.rows import Create, key_of, no_vectors, random_vectors, vector_of


def test_the_last_row_of_a_repeated_key_counts(create: Create) -> None:
    index, vectors = create(), random_vectors(3, 4)
    assert index.apply([1, 2, 1], vectors, []) == (2, 0, 0, 0)
    np.testing.assert_array_equal(vector_of(index, 1), vectors[2])


def test_a_row_written_with_the_vector_it_had_takes_no_new_slot(create: Create) -> None:
    index, vectors = create("cosine"), random_vectors(20, 4)
    index.apply(range(20), vectors, [])
    view = index.view
    assert index.apply(range(20), vectors, []) == (0, 0, 20, 0)
    assert index.view is view


def test_a_row_that_only_changed_its_length_is_updated_under_cosine(create: Create) -> None:
    index, vectors = create("cosine"), random_vectors(1, 4)
    index.apply([1], vectors, [])
    assert index.apply([1], vectors * 2, []).updated == 1
    np.testing.assert_allclose(vector_of(index, 1), vectors[0] * 2, rtol=1e-6)


def test_deletes_of_unknown_and_repeated_keys_count_once(create: Create) -> None:
    index = create()
    index.apply([1, 2], random_vectors(2, 4), [])
    assert index.apply([], no_vectors(), [2, 2, 7]).deleted == 1
    assert (index.count, index.tombstones) == (1, 1)


def test_a_key_both_upserted_and_deleted_is_refused(create: Create) -> None:
    index = create()
    with pytest.raises(ValueError, match="both"):
        index.apply([1], random_vectors(1, 4), [1])
    with pytest.raises(ValueError, match="1 keys"):
        index.apply([1], random_vectors(2, 4), [])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_pass_with_an_unusable_vector_changes_nothing(create: Create, bad: float) -> None:
    index, vectors = create("cosine"), random_vectors(3, 4)
    index.apply([1], vectors[:1], [])
    view = index.view
    vectors[2, 1] = bad
    assert view.format.validate(vectors) == {2: "nan"}
    with pytest.raises(InvalidVector):
        index.apply([1, 2, 3], vectors, [])
    vectors[2] = 0
    assert view.format.validate(vectors) == {2: "zero_norm"}
    with pytest.raises(InvalidVector):
        index.apply([1, 2, 3], vectors, [])
    assert index.view is view


def test_zero_vectors_are_usable_if_no_norm_is_needed(create: Create) -> None:
    index = create("ip")
    index.apply([1], np.zeros((1, 4), np.float32), [])
    assert index.count == 1


def test_a_number_too_large_for_halfvec_is_reported_not_stored(create: Create) -> None:
    index, vectors = create(half=True), np.full((1, 4), 1e6, np.float32)
    assert index.view.format.validate(vectors) == {0: "nan"}
    with pytest.raises(InvalidVector):
        index.apply([1], vectors, [])


def test_rows_of_another_dimension_are_refused_before_anything_changes(create: Create) -> None:
    index = create()
    index.apply([1, 2], random_vectors(2, 4), [])
    view = index.view
    with pytest.raises(
        DimensionMismatch, match="'default/chunks' has dimension 4, the vector has 5"
    ):
        index.apply([3], random_vectors(1, 5), [1])
    assert index.view is view
    with pytest.raises(InvalidVector):
        create().apply([1], np.empty((1, 0), np.float32), [])


def test_a_dataset_without_a_row_takes_another_dimension(create: Create) -> None:
    index = create()
    index.apply([1, 2], random_vectors(2, 4), [])
    assert index.apply([3], random_vectors(1, 5), [1, 2]) == (1, 0, 0, 2)
    assert (index.dim, index.count, index.tombstones) == (5, 1, 0)
    index.clear()
    assert index.dim is None
    index.apply([3], random_vectors(1, 6), [])
    assert index.dim == 6


def test_a_pass_without_rows_changes_nothing(create: Create) -> None:
    index = create()
    assert index.apply([], no_vectors(), []) == (0, 0, 0, 0)
    assert index.clear() == 0
    index.begin_sweep()
    assert index.end_sweep() == 0
    with pytest.raises(RuntimeError):
        index.end_sweep()


def test_a_sweep_survives_rows_that_come_during_it_and_starts_over(create: Create) -> None:
    index = create()
    index.apply(range(40), random_vectors(40, 4), [])
    index.begin_sweep()
    index.apply([1], random_vectors(40, 4)[1:2], [])
    index.begin_sweep()
    index.apply([2, 50], random_vectors(2, 4, seed=1), [])
    index.apply([3], random_vectors(40, 4)[3:4], [])
    assert index.end_sweep() == 38
    assert set(index.view.keys(None, 100).keys) == {2, 50, 3}


def test_a_sweep_is_not_confused_by_a_clear(create: Create) -> None:
    index = create()
    index.apply(range(40), random_vectors(40, 4), [])
    index.begin_sweep()
    index.apply(range(40), random_vectors(40, 4), [])
    index.clear()
    index.apply([1], random_vectors(1, 4), [])
    assert index.end_sweep() == 0
    assert index.count == 1


@pytest.mark.parametrize("kind", ["integer", "uuid", "text", "composite"])
def test_keys_come_back_as_they_were_given(create: Create, kind: KeyKind) -> None:
    index, keys = create(key_kind=kind), [key_of(kind, n) for n in range(50)]
    index.apply(keys, random_vectors(50, 4), [])
    assert index.view.contains([*keys, key_of(kind, 77)]).tolist() == [True] * 50 + [False]
    assert sorted(index.view.keys(None, 100).keys, key=keys.index) == keys
    assert [key for key, _ in index.view.get(keys[::-1], vectors=False)] == keys[::-1]


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("integer", "1"),
        ("integer", 2**63),
        ("integer", True),
        ("uuid", 1),
        ("uuid", "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11"),
        ("text", 1),
        ("text", "\ud800"),
    ],
)
def test_a_key_of_another_kind_is_a_bad_request(create: Create, kind: KeyKind, key: Key) -> None:
    index = create(key_kind=kind)
    with pytest.raises(InvalidParams, match="kind"):
        index.view.contains([key])
    with pytest.raises(InvalidParams, match="kind"):
        index.apply([key], random_vectors(1, 4), [])
    assert index.count == 0


@pytest.mark.parametrize("key", [2**63 - 1, -(2**63), 0])
def test_the_whole_range_of_bigint_is_usable(create: Create, key: int) -> None:
    index = create()
    index.apply([key], random_vectors(1, 4), [])
    assert index.view.keys(None, 1).keys == [key]


@pytest.mark.parametrize("norm", [1e-38, 1e35])
def test_a_stored_vector_does_not_depend_on_the_rows_that_are_stored_with_it(norm: float) -> None:
    form, rows = VectorFormat("cosine", half=False), random_vectors(300, 4)
    extreme = np.full((1, 4), norm, dtype=np.float32)
    together = form.store(np.concatenate([rows, extreme]))
    assert together.select(np.arange(300)).equals(form.store(rows)).all()
    assert together.select(np.array([300])).equals(form.store(extreme)).all()
