"""The key map finds every entry, also if hashes collide, and drops only dead entries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncd.index import view
from syncd.index.generation import generation, stored_rows
from syncd.index.rows.key_map import Hashes, HashMultimap
from syncd.index.rows.keys import Stored
from syncd.types import KeyKind
from tests.unit.index.rows import Create, no_vectors, random_vectors

BATCHES = st.lists(st.lists(st.integers(0, 30), max_size=40), max_size=12)


@given(batches=BATCHES)
def test_every_entry_is_found_by_one_and_by_many(batches: list[list[int]]) -> None:
    multimap, expected, number = HashMultimap(buffer=16), dict[int, set[int]](), 0
    for batch in batches:
        multimap.add(np.array(batch, dtype=np.uint64), np.arange(number, number + len(batch)))
        for hashed in batch:
            expected.setdefault(hashed, set()).add(number)
            number += 1
    asked = np.arange(40, dtype=np.uint64)
    queries, values = multimap.view.find(asked)
    found: dict[int, set[int]] = {}
    for query, value in zip(queries.tolist(), values.tolist(), strict=True):
        found.setdefault(query, set()).add(value)
    assert found == expected
    assert multimap.view.entries == number
    for hashed in range(40):
        for some in (asked[hashed : hashed + 1], asked[hashed : hashed + 3]):
            queries, values = multimap.view.find(some)
            assert set(values[queries == 0].tolist()) == expected.get(hashed, set())


@given(batches=BATCHES, at_least=st.integers(1, 20))
def test_pages_hold_every_entry_once_in_order(batches: list[list[int]], at_least: int) -> None:
    multimap, expected = HashMultimap(buffer=16), list[int]()
    for batch in batches:
        multimap.add(
            np.array(batch, dtype=np.uint64), np.arange(len(expected), len(expected) + len(batch))
        )
        expected += batch
    start: int | None = 0
    seen: list[int] = []
    while start is not None:
        hashes, _, start = multimap.view.from_hash(start, at_least)
        assert start is None or hashes.size >= at_least
        seen += hashes.tolist()
    assert seen == sorted(expected)


def test_a_merge_leaves_out_dead_entries_but_an_older_view_keeps_them() -> None:
    multimap = HashMultimap(buffer=8)
    multimap.add(np.arange(8, dtype=np.uint64), np.arange(8))
    before = multimap.view
    multimap.add(
        np.arange(8, 16, dtype=np.uint64), np.arange(8, 16), keep=lambda values: values % 2 == 1
    )
    assert multimap.view.entries == 8
    assert before.entries == 8
    assert before.find(np.array([4], dtype=np.uint64))[1].tolist() == [4]


def test_runs_stay_few() -> None:
    multimap, random = HashMultimap(buffer=16), np.random.default_rng(0)
    for start in range(0, 20000, 10):
        multimap.add(random.integers(0, 2**64, 10, dtype=np.uint64), np.arange(start, start + 10))
    assert len(multimap.view.runs) <= 7
    assert multimap.view.entries == 20000


@pytest.mark.parametrize("kind", ["integer", "text"])
def test_keys_that_share_a_hash_are_told_apart(
    create: Create, monkeypatch: pytest.MonkeyPatch, kind: KeyKind
) -> None:
    def four_hashes(_: KeyKind, stored: Stored) -> Hashes:
        return np.array(
            [(2**64 - 1) - len(str(key)) % 4 for key in stored.tolist()], dtype=np.uint64
        )

    for module in (stored_rows, generation, view):
        monkeypatch.setattr(module, "hash_keys", four_hashes)
    index, vectors = create(key_kind=kind), random_vectors(200, 4)
    keys = [n * 37 % 1000 if kind == "integer" else f"k{n * 37 % 1000}" for n in range(200)]
    index.apply(keys, vectors, [])
    index.apply([], no_vectors(), keys[:20])
    for key, vector in index.view.get(keys, vectors=True):
        np.testing.assert_array_equal(vector, vectors[keys.index(key)])
    seen, after, more = [], None, True
    while more:
        page = index.view.keys(after, 7)
        seen += page.keys
        after, more = page.next, page.next is not None
    assert len(seen) == 180
    assert set(seen) == set(keys[20:])
