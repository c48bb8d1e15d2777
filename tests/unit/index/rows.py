"""Keys and vectors for small datasets with eight rows per chunk, so few rows cross every border."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import date, timedelta

import numpy as np

from syncd.index.dataset import DatasetIndex
from syncd.index.rows.vectors import Vectors
from syncd.types import Key, KeyKind

SMALL_CHUNKS = 64

Create = Callable[..., DatasetIndex]


def key_of(kind: KeyKind, number: int) -> Key:
    match kind:
        case "integer":
            return number - 3
        case "uuid":
            return str(uuid.UUID(int=number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128))
        case "text":
            return "" if number == 0 else f"Schlüssel {number} " + "x" * (number % 7)
        case "date":
            return (date(1, 1, 1) + timedelta(days=number)).isoformat()
        case "timestamp" | "timestamptz":
            return f"2024-02-29T12:30:00.{number + 1:06}" + (
                "+00:00" if kind == "timestamptz" else ""
            )
        case "composite":
            return f'[{number},"a"]'


def random_vectors(count: int, dim: int, seed: int = 0) -> Vectors:
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def vector_of(index: DatasetIndex, key: Key) -> Vectors:
    vector = index.view.vector_of(key)
    assert vector is not None
    return vector


def no_vectors(dim: int = 0) -> Vectors:
    return np.empty((0, dim), dtype=np.float32)
