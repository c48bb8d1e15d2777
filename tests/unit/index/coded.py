"""Rows for an index that is large enough for codes, their builds, and checks of its answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from syncd.index.codes.calibration import Point
from syncd.index.dataset import DatasetIndex
from syncd.index.rows.vectors import Vectors
from tests.unit.index.rows import random_vectors

DIM = 16


def put(index: DatasetIndex, start: int, stop: int, version: int = 0) -> None:
    index.apply(
        range(start, stop), random_vectors(stop - start, DIM, seed=start + 7919 * version), []
    )


def build_all(index: DatasetIndex, recall: float = 0.95) -> list[str]:
    done: list[str] = []
    while (plan := index.plan_build(recall)) is not None:
        assert index.build(plan)
        done.append(plan.kind)
        assert len(done) < 20, f"there is no end to it: {done}"
    return done


def assert_as_exact(index: DatasetIndex, queries: Vectors) -> None:
    for found, exact in zip(
        index.search(queries, 10, recall=0.5), index.search(queries, 10, exact=True), strict=True
    ):
        np.testing.assert_allclose(found.distances, exact.distances, rtol=1e-5)


def everything(index: DatasetIndex) -> None:
    """Make every row a candidate: then any difference from an exact search is an error."""
    codes = index.view.codes
    assert codes is not None
    points = tuple(Point(k, 1 << 20, 1 << 20, 1.0, 1.0, 1.0) for k in (10, 100))
    calibration = msgspec.structs.replace(codes.codes.calibration, points=points)
    assert index.swap_codes(codes.codes, replace(codes.codes, calibration=calibration))


def part_rows(index: DatasetIndex) -> list[int]:
    codes = index.view.codes
    return [] if codes is None else [part.rows for part in codes.codes.parts]


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
