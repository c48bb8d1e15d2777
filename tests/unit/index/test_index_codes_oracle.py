"""With every row a candidate, results equal brute force after any operation.

The operations are build, merge, retrain, compact, save and load.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from syncd.index.build.plan import Plan
from syncd.index.codes.calibration import Calibration, Point
from syncd.index.dataset import DatasetIndex
from syncd.index.rows.vectors import Vectors
from syncd.index.search.plan import point_for
from syncd.types import Key, KeyKind, Metric
from tests.unit.index.rows import SMALL_CHUNKS, key_of

EVERYTHING = Point(10, 1 << 20, 1 << 20, 1.0, 1.0, 1.0)
NUMBERS = st.integers(0, 120)
CHANGES = st.dictionaries(NUMBERS, st.one_of(st.none(), st.integers(0, 5)), max_size=80)
SMALL = {
    "syncd.index.build.plan.EXACT_ELEMENTS": 1,
    "syncd.index.build.plan.EXACT_ROWS": (24, 24),
    "syncd.index.build.plan.TAIL_ELEMENTS": 1,
    "syncd.index.build.plan.TAIL_ROWS": 12,
    "syncd.index.build.plan.LEAST_DEAD_SLOTS": 20,
    "syncd.index.build.encoding.BLOCK_BYTES": 1,
    "syncd.index.build.encoding.LEAST_BLOCK_ROWS": 8,
    "syncd.index.generation.compaction.BLOCK_BYTES": 100,
    "syncd.index.generation.compaction.LAST_ROUND_SLOTS": 0,
    "syncd.index.build.measuring.QUERIES": {10: 4, 40: 2, 100: 2, 1000: 5},
    "syncd.index.search.approximate.QUERIES_AT_ONCE": 2,
}


@pytest.fixture(autouse=True, scope="module")
def tiny() -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in SMALL.items():
            stack.enter_context(patch(name, value))
        stack.enter_context(patch.object(Calibration, "choose", lambda *_: EVERYTHING))
        yield


class CodesAgainstBruteForce(RuleBasedStateMachine):
    @initialize(
        metric=st.sampled_from(["l2", "cosine", "ip"]),
        kind=st.sampled_from(["integer", "text"]),
        half=st.booleans(),
        dim=st.sampled_from([3, 5, 8]),
        seed=st.integers(0, 1000),
    )
    def begin(self, metric: Metric, kind: KeyKind, half: bool, dim: int, seed: int) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.metric, self.kind, self.half, self.dim = metric, kind, half, dim
        self.random = np.random.default_rng(seed)
        self.rows: dict[Key, Vectors] = {}
        self.index = DatasetIndex.create(
            self.root / "p" / "d", metric=metric, key_kind=kind, half=half, chunk_bytes=SMALL_CHUNKS
        )
        self.sweep_of: set[Key] | None = None
        self.apply(dict.fromkeys(range(60), 0))

    @rule(changes=CHANGES)
    def apply(self, changes: dict[int, int | None]) -> None:
        upserts = {
            key_of(self.kind, n): self.vector(n, v) for n, v in changes.items() if v is not None
        }
        deletes = [key_of(self.kind, n) for n, v in changes.items() if v is None]
        self.index.apply(list(upserts), self.block(upserts), deletes)
        self.rows = {
            key: row for key, row in {**self.rows, **upserts}.items() if key not in deletes
        }
        if self.sweep_of is not None:
            self.sweep_of |= upserts.keys()

    @rule(first=NUMBERS, version=st.integers(6, 9))
    def update_many(self, first: int, version: int) -> None:
        self.apply(dict.fromkeys(range(first, min(first + 60, 121)), version))

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.rows = {}

    @rule()
    def begin_sweep(self) -> None:
        self.index.begin_sweep()
        self.sweep_of = set()

    @precondition(lambda self: getattr(self, "sweep_of", None) is not None)
    @rule()
    def end_sweep(self) -> None:
        seen, self.sweep_of = self.sweep_of or set(), None
        assert self.index.end_sweep() == len(self.rows.keys() - seen)
        self.rows = {key: row for key, row in self.rows.items() if key in seen}

    @rule()
    def build_all_that_is_wanted(self) -> None:
        for _ in range(30):
            plan = self.index.plan_build()
            if plan is None:
                return
            assert self.index.build(plan)
        raise AssertionError(f"there is no end to it: {plan}")

    @rule(changes=CHANGES)
    def build_one_thing_while_rows_change(self, changes: dict[int, int | None]) -> None:
        plan = self.index.plan_build()
        if plan is not None:
            self.build_alongside(plan, changes)

    @precondition(lambda self: len(getattr(self, "rows", ())) > 20)
    @rule(kind=st.sampled_from(["train", "compact"]), changes=CHANGES)
    def build_although_nothing_asks_for_it(self, kind: str, changes: dict[int, int | None]) -> None:
        self.build_alongside(Plan(kind), changes)  # type: ignore[arg-type]

    @rule()
    def save(self) -> None:
        self.index.save()
        assert self.index.save().bytes_written == 0

    @rule()
    def save_and_load(self) -> None:
        codes = self.index.view.codes
        self.index = DatasetIndex.load(self.root / "p" / "d", self.index.save().saved)
        assert (self.index.view.codes is None) == (codes is None)
        assert not self.index.codes_damage
        self.sweep_of = None

    @invariant()
    def equal(self) -> None:
        if not hasattr(self, "index"):
            return
        view = self.index.view
        assert self.index.count == len(self.rows)
        assert set(self.index.view.keys(None, 1000).keys) == self.rows.keys()
        if view.codes is not None and len(self.rows) > 5:
            assert point_for(view, 5, 0.5) is EVERYTHING
        queries = self.random.standard_normal((3, self.dim)).astype(np.float32)
        exact = self.index.search(queries, 5, exact=True)
        for query, result, same in zip(queries, self.index.search(queries, 5), exact, strict=True):
            expected = self.brute_force(query)
            assert len(result.keys) == min(5, len(self.rows))
            np.testing.assert_allclose(
                result.distances, sorted(expected.values())[:5], rtol=1e-4, atol=1e-5
            )
            np.testing.assert_allclose(
                [expected[key] for key in result.keys], result.distances, rtol=1e-4, atol=1e-5
            )
            np.testing.assert_allclose(result.distances, same.distances, rtol=1e-5, atol=1e-6)

    def teardown(self) -> None:
        if hasattr(self, "index"):
            shutil.rmtree(self.root)

    def build_alongside(self, plan: Plan, changes: dict[int, int | None]) -> None:
        """Apply the changes in the middle of a build, when it first asks whether to go on."""
        waiting = [changes]

        def stop() -> bool:
            if waiting:
                self.apply(waiting.pop())
            return False

        before = self.index.view
        used = self.index.build(plan, stop)
        assert used or self.index.view.count <= before.count

    def vector(self, number: int, version: int) -> Vectors:
        vector = np.random.default_rng([number, version]).standard_normal(self.dim)
        return vector.astype(np.float16 if self.half else np.float32).astype(np.float32)

    def block(self, rows: dict[Key, Vectors]) -> Vectors:
        return np.array(list(rows.values()), dtype=np.float32).reshape(len(rows), self.dim)

    def brute_force(self, query: Vectors) -> dict[Key, float]:
        if not self.rows:
            return {}
        rows, wide = self.block(self.rows).astype(np.float64), query.astype(np.float64)
        if self.metric == "l2":
            distances = np.linalg.norm(rows - wide, axis=1)
        elif self.metric == "ip":
            distances = -(rows @ wide)
        else:
            distances = 1 - rows @ wide / np.linalg.norm(rows, axis=1) / np.linalg.norm(wide)
        return dict(zip(self.rows, distances.tolist(), strict=True))


TestCodesAgainstBruteForce = CodesAgainstBruteForce.TestCase
TestCodesAgainstBruteForce.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
