"""Decoder of PostgreSQL's binary vectors into numpy blocks.

Formats: ``vector_send`` and ``halfvec_send`` of pgvector (int16 dimension, int16 unused, big-endian
floats); ``array_send`` of PostgreSQL (header, then each element after its length); bytea as
little-endian float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncd.types import QuarantineReason

ARRAY_HEADER_BYTES = 20  # dimensions, null flag, element type, length, lower bound
ELEMENT_TYPES = {
    "real[]": np.dtype([("bytes", ">i4"), ("value", ">f4")]),
    "double precision[]": np.dtype([("bytes", ">i4"), ("value", ">f8")]),
}
PGVECTOR_TYPES: dict[str, np.dtype[Any]] = {"vector": np.dtype(">f4"), "halfvec": np.dtype(">f2")}
PGVECTOR_HEADER_BYTES = 4
VECTOR_TYPES = frozenset((*ELEMENT_TYPES, *PGVECTOR_TYPES, "bytea"))


@dataclass(frozen=True, slots=True)
class Block:
    """Vectors of one length: ``vectors`` (n, dimension) float32, ``rows`` (n,) int64.

    ``rows`` are their places in the input.
    """

    rows: NDArray[np.int64]
    vectors: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Decoded:
    """``blocks`` by dimension, and the places of values without a vector, each with its reason."""

    blocks: list[Block]
    bad: list[tuple[int, QuarantineReason]]


def decode_vectors(vector_type: str, values: Sequence[bytes]) -> Decoded:
    """Decode values of one column in whole blocks: no Python object is made per element."""
    blocks: list[Block] = []
    bad: list[tuple[int, QuarantineReason]] = []
    if not values:
        return Decoded(blocks, bad)
    places: dict[int, list[int]] = {}
    for place, value in enumerate(values):
        places.setdefault(len(value), []).append(place)
    for length, some in sorted(places.items()):
        rows = np.array(some)
        joined = b"".join(values if len(some) == len(values) else [values[each] for each in some])
        vectors: NDArray[Any]
        if vector_type in PGVECTOR_TYPES:
            element = PGVECTOR_TYPES[vector_type]
            elements = np.frombuffer(joined, dtype=element).reshape(len(rows), -1)
            vectors = elements[:, PGVECTOR_HEADER_BYTES // element.itemsize :]
        elif vector_type == "bytea":
            if length % 4:
                bad += [(int(row), "not_float32") for row in rows]
                continue
            vectors = np.frombuffer(joined, dtype="<f4").reshape(len(rows), length // 4)
        else:
            bytes_block = np.frombuffer(joined, dtype=np.uint8).reshape(len(rows), length)
            rows, vectors, refused = decode_arrays(vector_type, rows, bytes_block)
            bad += refused
        if len(rows) and vectors.shape[1] == 0:
            bad += [(int(row), "empty") for row in rows]
        elif len(rows):
            blocks.append(Block(rows, as_float32(vectors)))
    return Decoded(blocks, bad)


def as_float32(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """A copy in native order. A double beyond float32 becomes an infinity, which no index takes."""
    if vectors.dtype.itemsize <= 4:
        return vectors.astype(np.float32, order="C")
    with np.errstate(over="ignore"):
        return vectors.astype(np.float32, order="C")


def decode_arrays(
    vector_type: str, rows: NDArray[np.int64], block: NDArray[np.uint8]
) -> tuple[
    NDArray[np.int64], NDArray[np.float32] | NDArray[np.float64], list[tuple[int, QuarantineReason]]
]:
    """Decode values in ``array_send``'s format, all of one length in bytes."""
    none = np.empty((0, 0), dtype=np.float32)
    if block.shape[1] < ARRAY_HEADER_BYTES:  # no dimensions: '{}'
        return rows[:0], none, [(int(row), "empty") for row in rows]
    header = block[:, :ARRAY_HEADER_BYTES].copy().view(">i4")
    element = ELEMENT_TYPES[vector_type]
    dimensions, has_null, count = header[:, 0], header[:, 1], header[:, 3]
    flat = (
        (dimensions == 1)
        & (has_null == 0)
        & (count * element.itemsize == block.shape[1] - ARRAY_HEADER_BYTES)
    )
    bad: list[tuple[int, QuarantineReason]] = [
        (int(rows[place]), "null_element" if has_null[place] else "not_one_dimensional")
        for place in np.flatnonzero(~flat)
    ]
    if not flat.any():
        return rows[:0], none, bad
    elements = block[flat, ARRAY_HEADER_BYTES:].copy().view(element)
    return rows[flat], elements["value"], bad
