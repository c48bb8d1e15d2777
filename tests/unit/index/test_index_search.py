"""Exact search gives pgvector's distances and loses no row."""

from __future__ import annotations

import threading

import faiss
import numpy as np
import pytest

from syncd.errors import DimensionMismatch, InvalidParams, InvalidVector
from syncd.index.rows.vectors import half_to_float
from syncd.index.search.exact import use_one_thread
from syncd.types import Metric
from tests.unit.index.rows import Create, no_vectors, random_vectors, vector_of


@pytest.mark.parametrize(
    ("metric", "expected"), [("l2", [1.0, 5.0]), ("cosine", [0.0, 0.04]), ("ip", [-24.0, -7.0])]
)
def test_distances_are_those_of_pgvector(
    create: Create, metric: Metric, expected: list[float]
) -> None:
    index = create(metric)
    rows = {"l2": [[3, 5], [6, 8]], "cosine": [[6, 8], [4, 3]], "ip": [[4, 3], [1, 1]]}[metric]
    index.apply([1, 2], np.array(rows, np.float32), [])
    (result,) = index.search(np.array([[3, 4]], np.float32), 2)
    assert result.keys == [1, 2]
    np.testing.assert_allclose(result.distances, expected, atol=1e-7)


def test_a_k_above_the_rows_gives_all_of_them(create: Create) -> None:
    index = create()
    index.apply(range(50), random_vectors(50, 4), [])
    index.apply([], no_vectors(), list(range(45)))
    for result in index.search(random_vectors(3, 4, seed=1), 1000):
        assert sorted(result.keys) == [45, 46, 47, 48, 49]


def test_the_excluded_row_is_left_out_and_k_still_met(create: Create) -> None:
    index, vectors = create(), random_vectors(30, 4)
    index.apply(range(30), vectors, [])
    (result,) = index.search(vectors[7:8], 10, exclude=7)
    (all_of_them,) = index.search(vectors[7:8], 11, exclude=99)
    assert all_of_them.keys[0] == 7
    assert result.keys == all_of_them.keys[1:]


def test_rows_beyond_the_largest_distance_are_left_out(create: Create) -> None:
    index = create()
    index.apply(range(10), np.arange(10, dtype=np.float32)[:, None], [])
    (result,) = index.search(np.zeros((1, 1), np.float32), 10, max_distance=3.0)
    assert result.keys == [0, 1, 2, 3]


def test_a_dataset_without_rows_answers_empty(create: Create) -> None:
    index = create("cosine")
    query = random_vectors(2, 4)
    assert [result.keys for result in index.search(query, 10)] == [[], []]
    assert index.search(query[:0], 10) == []
    index.apply([1], query[:1], [])
    index.apply([], no_vectors(), [1])
    assert [result.keys for result in index.search(random_vectors(1, 9), 10, exclude=1)] == [[]]
    assert index.view.get([1], vectors=True) == []
    assert index.view.vector_of(1) is None
    assert index.view.keys(None, 10) == ([], None)


def test_a_bad_query_is_refused(create: Create) -> None:
    index = create("cosine")
    index.apply([1], random_vectors(1, 4), [])
    with pytest.raises(DimensionMismatch):
        index.search(random_vectors(1, 5), 1)
    with pytest.raises(InvalidVector, match="no element"):
        index.search(np.empty((1, 0), np.float32), 1)
    for bad in (
        np.zeros((1, 4)),
        np.full((1, 4), np.nan),
        np.full((2, 4), np.inf),
        np.zeros((2, 4)),
    ):
        with pytest.raises(InvalidVector):
            index.search(bad.astype(np.float32), 1)
    with pytest.raises(InvalidParams):
        index.search(random_vectors(1, 4), 0)
    with pytest.raises(ValueError, match="shape"):
        index.search(np.zeros(4, np.float32), 1)


@pytest.mark.parametrize("metric", ["l2", "ip", "cosine"])
def test_numbers_whose_squares_overflow_lose_no_row(create: Create, metric: Metric) -> None:
    index = create(metric)
    vectors = random_vectors(20, 4) * np.float32(1e30)
    index.apply(range(20), vectors, [])
    query = random_vectors(1, 4, seed=1) * np.float32(1e30)
    (result,) = index.search(query, 20)
    assert len(set(result.keys)) == 20
    assert np.isfinite(result.distances).all()
    wide, wide_query = vectors.astype(np.float64), query[0].astype(np.float64)
    if metric == "l2":
        np.testing.assert_allclose(
            result.distances, np.sort(np.linalg.norm(wide - wide_query, axis=1))
        )
    elif metric == "ip":
        np.testing.assert_allclose(result.distances, np.sort(-(wide @ wide_query)))
    np.testing.assert_allclose(vector_of(index, 3), vectors[3], rtol=1e-6)


def test_tiny_and_huge_vectors_come_back_under_cosine(create: Create) -> None:
    index = create("cosine")
    vectors = random_vectors(4, 4) * np.array([[1e-40], [1e-20], [1e20], [5e37]], np.float32)
    index.apply(range(4), vectors, [])
    for key in range(4):
        np.testing.assert_allclose(vector_of(index, key), vectors[key], rtol=1e-6, atol=1e-45)
        assert index.search(vectors[key : key + 1], 1)[0].keys == [key]


def test_near_rows_far_from_the_origin_are_told_apart_in_a_batch(create: Create) -> None:
    index = create()
    vectors = random_vectors(64, 128) * np.float32(0.01) + np.float32(1000)
    index.apply(range(64), vectors, [])
    queries = np.tile(vectors, (20, 1))
    assert [result.keys for result in index.search(queries, 1)] == [[key] for key in range(64)] * 20


def test_several_queries_get_the_results_that_each_gets_alone(create: Create) -> None:
    for metric in ("l2", "cosine", "ip"):
        index = create(metric)
        index.apply(range(100), random_vectors(100, 8), [])
        index.apply([], no_vectors(), list(range(0, 100, 3)))
        queries = random_vectors(5, 8, seed=2)
        for query, result in zip(queries, index.search(queries, 7), strict=True):
            (alone,) = index.search(query[None], 7)
            assert alone.keys == result.keys
            np.testing.assert_allclose(alone.distances, result.distances, rtol=1e-5, atol=1e-6)


def test_halfvec_keeps_the_users_values_exactly(create: Create) -> None:
    index = create("cosine", half=True)
    vectors = random_vectors(30, 4)
    vectors[4] = [6e-8, -6e-8, 0, 6e-8]  # subnormal
    vectors[5] = [65504, -65504, 0, 1]
    vectors = vectors.astype(np.float16).astype(np.float32)
    index.apply(range(30), vectors, [])
    for key in range(30):
        np.testing.assert_array_equal(vector_of(index, key), vectors[key])
        assert index.search(vectors[key : key + 1], 1)[0].keys == [key]
    assert index.apply(range(30), vectors, []).unchanged == 30


def test_every_finite_half_is_converted_exactly() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)][:, None]
    out = np.empty(halves.shape, dtype=np.float32)
    half_to_float(halves, None, out)
    np.testing.assert_array_equal(out.view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_a_searching_thread_uses_one_faiss_thread() -> None:
    threads: list[int] = []

    def limit() -> None:
        use_one_thread()
        threads.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=limit)
    thread.start()
    thread.join()
    assert threads == [1]
