"""After any operations an index equals a dict: same keys, vectors and brute-force results."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from syncd.index.dataset import DatasetIndex
from syncd.index.rows.vectors import Vectors
from syncd.types import Key, KeyKind, Metric
from tests.unit.index.rows import SMALL_CHUNKS, key_of

NUMBERS = st.integers(0, 40)
CHANGES = st.dictionaries(NUMBERS, st.one_of(st.none(), st.integers(0, 5)), max_size=25)


class IndexAgainstDict(RuleBasedStateMachine):
    metric: Metric
    kind: KeyKind
    index: DatasetIndex

    @initialize(
        metric=st.sampled_from(["l2", "cosine", "ip"]),
        kind=st.sampled_from(["integer", "uuid", "text", "composite"]),
        half=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def begin(self, metric: Metric, kind: KeyKind, half: bool, seed: int) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.directory = self.root / "p" / "d"
        self.metric, self.kind, self.half, self.dim = metric, kind, half, 3
        self.random = np.random.default_rng(seed)
        self.rows: dict[Key, Vectors] = {}
        self.index = DatasetIndex.create(
            self.directory, metric=metric, key_kind=kind, half=half, chunk_bytes=SMALL_CHUNKS
        )

    @rule(changes=CHANGES)
    def apply(self, changes: dict[int, int | None]) -> None:
        upserts = {
            key_of(self.kind, n): self.vector(n, v) for n, v in changes.items() if v is not None
        }
        deletes = [key_of(self.kind, n) for n, v in changes.items() if v is None]
        old = dict(self.rows)
        applied = self.index.apply(list(upserts), self.block(upserts), deletes)
        self.rows = {key: row for key, row in {**old, **upserts}.items() if key not in deletes}
        same = sum(key in old and np.array_equal(old[key], row) for key, row in upserts.items())
        updated = len(upserts.keys() & old.keys()) - same
        assert applied == (
            len(upserts) - updated - same,
            updated,
            same,
            len(old.keys() & set(deletes)),
        )

    @rule()
    def clear(self) -> None:
        assert self.index.clear() == len(self.rows)
        self.rows = {}

    @rule(dim=st.sampled_from([1, 2, 5]))
    def take_another_dimension_once_empty(self, dim: int) -> None:
        if not self.rows:
            self.dim = dim

    @rule()
    def save_and_load(self) -> None:
        self.index = DatasetIndex.load(self.directory, self.index.save().saved)

    @rule()
    def save(self) -> None:
        self.index.save()
        assert self.index.save().bytes_written == 0

    @rule(seen=st.lists(NUMBERS, max_size=20, unique=True), deletes=st.lists(NUMBERS, max_size=3))
    def sweep(self, seen: list[int], deletes: list[int]) -> None:
        rows = {key_of(self.kind, n): self.vector(n, 0) for n in seen}
        gone = {key_of(self.kind, n) for n in deletes} - rows.keys()
        self.index.begin_sweep()
        half = len(rows) // 2
        keys, block = list(rows), self.block(rows)
        self.index.apply(keys[:half], block[:half], [])
        self.index.apply(keys[half:], block[half:], list(gone))
        assert self.index.end_sweep() == len(self.rows.keys() - rows.keys() - gone)
        self.rows = rows

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "index"):
            return
        assert self.index.count == len(self.rows)
        assert {key for page in self.pages(7) for key in page} == self.rows.keys()
        assert sum(map(len, self.pages(7))) == len(self.rows)
        for key, vector in self.index.view.get([*self.rows, key_of(self.kind, 99)], vectors=True):
            assert vector is not None
            np.testing.assert_allclose(vector, self.rows[key], rtol=1e-6)
        queries = self.random.standard_normal((2, self.dim)).astype(np.float32)
        for query, result in zip(queries, self.index.search(queries, 5), strict=True):
            expected = self.brute_force(query)
            assert len(result.keys) == min(5, len(self.rows))
            np.testing.assert_allclose(
                result.distances, sorted(expected.values())[:5], rtol=1e-4, atol=1e-5
            )
            np.testing.assert_allclose(
                [expected[key] for key in result.keys], result.distances, rtol=1e-4, atol=1e-5
            )

    def teardown(self) -> None:
        if hasattr(self, "index"):
            shutil.rmtree(self.root)

    def vector(self, number: int, version: int) -> Vectors:
        vector = np.random.default_rng([number, version]).standard_normal(self.dim)
        return vector.astype(np.float16 if self.half else np.float32).astype(np.float32)

    def block(self, rows: dict[Key, Vectors]) -> Vectors:
        return np.array(list(rows.values()), dtype=np.float32).reshape(len(rows), self.dim)

    def pages(self, limit: int) -> list[list[Key]]:
        pages, after, more = [], None, True
        while more:
            page = self.index.view.keys(after, limit)
            pages.append(page.keys)
            after, more = page.next, page.next is not None
        return pages

    def brute_force(self, query: Vectors) -> dict[Key, float]:
        distances = {}
        for key, row in self.rows.items():
            a, b = query.astype(np.float64), row.astype(np.float64)
            if self.metric == "l2":
                distance = float(np.linalg.norm(a - b))
            elif self.metric == "ip":
                distance = -float(a @ b)
            else:
                distance = 1 - float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            distances[key] = distance
        return distances


TestIndexAgainstDict = IndexAgainstDict.TestCase
TestIndexAgainstDict.settings = settings(
    max_examples=60, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
