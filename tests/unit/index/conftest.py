"""Fixtures: an index in its own directory, and limits at which a few hundred rows get codes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest

from syncd.index.build import plan as building
from syncd.index.dataset import DatasetIndex
from syncd.types import KeyKind, Metric
from tests.unit.index.coded import DIM
from tests.unit.index.rows import SMALL_CHUNKS, Create


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "default" / "chunks"


@pytest.fixture
def create(directory: Path) -> Create:
    def create(
        metric: Metric = "l2", key_kind: KeyKind = "integer", half: bool = False
    ) -> DatasetIndex:
        return DatasetIndex.create(
            directory, metric=metric, key_kind=key_kind, half=half, chunk_bytes=SMALL_CHUNKS
        )

    return create


@pytest.fixture
def small_codes() -> Iterator[None]:
    """Limits at which datasets get codes from 300 rows on."""
    with ExitStack() as stack:
        for name, value in {"EXACT_ROWS": (300, 300), "TAIL_ELEMENTS": 1, "TAIL_ROWS": 100}.items():
            stack.enter_context(patch.object(building, name, value))
        stack.enter_context(patch("syncd.index.build.measuring.CHEAPER_THAN_EXACT", 1000.0))
        stack.enter_context(
            patch("syncd.index.build.measuring.QUERIES", {10: 60, 40: 15, 100: 15, 1000: 5})
        )
        yield


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    return DatasetIndex.create(
        tmp_path / "p" / "d", metric="l2", key_kind="integer", dim=DIM, chunk_bytes=1 << 14
    )
