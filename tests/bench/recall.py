"""Recall that is promised and got: before any query was asked, and after half of them were.

It runs in process, with an index alone. The other half of the queries is held back: recall is
measured on it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from syncd.bench.vector_set import K, VectorSet
from syncd.index.asked import SAMPLED
from syncd.index.dataset import DatasetIndex
from syncd.index.rows.vectors import Vectors
from syncd.index.search.plan import point_for
from syncd.types import Key, Metric

COPIES_NOISE = 8.0
"""Standard deviation of the noise of near copies."""


@dataclass(frozen=True, slots=True)
class Promise:
    """One target: the reported recall, and the recall of the queries that were held back."""

    step: str
    seconds: float
    """How long the build or the measurement before it took."""
    target: float
    index: str
    recall_of: str
    reported: float
    got: float
    got_p5: float
    cost_us: float


def measure(vectors: VectorSet, *, recalls: list[float], copies: int) -> list[Promise]:
    """Build codes, measure them, then note the first queries and measure again."""
    with tempfile.TemporaryDirectory() as directory:
        index = DatasetIndex.create(
            Path(directory),
            metric=cast(Metric, vectors.metric),
            key_kind="integer",
            dim=vectors.dimension,
        )
        start = 0
        for block in copied(vectors, copies):
            index.apply(range(start, start + len(block)), block, [])
            start += len(block)
        asked, held_back = np.array_split(
            vectors.queries, [min(SAMPLED, len(vectors.queries) // 2)]
        )
        exact = [set(one.keys) for one in index.search(held_back, K, exact=True)]
        found = []
        for step in ("new codes", "before", "after"):
            if step == "after":
                index.asked.note(asked, None, None)
            begun = time.perf_counter()
            plan = index.plan_build()
            if plan is not None:
                index.build(plan)
            seconds = round(time.perf_counter() - begun, 1)
            found += [promise(index, held_back, exact, target, step, seconds) for target in recalls]
        return found


def promise(
    index: DatasetIndex,
    queries: Vectors,
    exact: list[set[Key]],
    target: float,
    step: str,
    seconds: float,
) -> Promise:
    """What is reported and got at one target."""
    shares = [
        len(exact[row].intersection(one.keys)) / K
        for row, one in enumerate(index.search(queries, K, recall=target))
    ]
    point = point_for(index.view, K, target)
    return Promise(
        step,
        seconds,
        target,
        str(index.kind(target)),
        str(index.recall_of),
        round(index.recall(target), 4),
        round(float(np.mean(shares)), 4),
        round(float(np.percentile(shares, 5)), 2),
        0.0 if point is None else round(point.cost_us, 1),
    )


def copied(vectors: VectorSet, copies: int) -> Iterator[Vectors]:
    """The rows in blocks; with each row as many near copies."""
    random = np.random.default_rng(0)
    for block in vectors.blocks():
        rows = np.repeat(block, copies + 1, axis=0)
        if copies:
            rows += random.normal(0, COPIES_NOISE, rows.shape).astype(np.float32)
        yield rows
