"""An index in a directory of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from syncd.index.dataset import DatasetIndex
from syncd.types import KeyKind, Metric
from tests.unit.index.rows import SMALL_CHUNKS, Create


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "default" / "chunks"


@pytest.fixture
def create(directory: Path) -> Create:
    def create(metric: Metric = "l2", key_kind: KeyKind = "integer", half: bool = False) -> DatasetIndex:
        return DatasetIndex.create(directory, metric=metric, key_kind=key_kind, half=half, chunk_bytes=SMALL_CHUNKS)

    return create
