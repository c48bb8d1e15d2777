"""The vectors of a reading, decoded for all its rows at once, and why some cannot be indexed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from syncd.index.rows.vectors import VectorFormat, Vectors
from syncd.postgres.source import Source
from syncd.postgres.vectors import Block, decode_vectors
from syncd.types import QuarantineReason


@dataclass(frozen=True, slots=True)
class ReadVectors:
    """The vectors of some rows; place ``i`` belongs to row ``i`` of the reading."""

    blocks: Mapping[int, Block]
    """Vectors by dimension."""
    squared_norms: Mapping[int, NDArray[np.float64]]
    """Squared norms of the vectors, by dimension, as the index computes them."""
    dimensions: Sequence[int]
    """Dimension of each row; 0: it is not a vector."""
    rows: NDArray[np.int64]
    """Place of each row in its block, (n,)."""
    unusable: Mapping[int, QuarantineReason]
    """Rows that no dataset can index."""

    @classmethod
    def of(cls, source: Source, values: Sequence[bytes]) -> ReadVectors:
        """Decode and validate the values of a source's vector column."""
        decoded = decode_vectors(source.vector_type, values)
        form = VectorFormat(source.metric, source.half)
        blocks = {block.vectors.shape[1]: block for block in decoded.blocks}
        norms = {length: form.squared_norms(block.vectors) for length, block in blocks.items()}
        if len(blocks) == 1 and not decoded.bad:
            ((length, block),) = blocks.items()
            refusals = form.refusals(norms[length])
            return cls(blocks, norms, [length] * len(values), block.rows, refusals)
        dimensions, rows = np.zeros((2, len(values)), dtype=np.int64)
        unusable: dict[int, QuarantineReason] = dict(decoded.bad)
        for length, block in blocks.items():
            dimensions[block.rows] = length
            rows[block.rows] = np.arange(len(block.rows))
            for number, reason in form.refusals(norms[length]).items():
                unusable[int(block.rows[number])] = reason
        return cls(blocks, norms, dimensions.tolist(), rows, unusable)

    def lengths(self, places: Sequence[int]) -> Mapping[int, int]:
        """Number of vectors of each dimension among the rows at ``places``."""
        if len(self.blocks) == 1 and not self.unusable:
            return dict.fromkeys(self.blocks, len(places))
        lengths = Counter(map(self.dimensions.__getitem__, places))
        del lengths[0]
        return lengths

    def all_usable(self, dimension: int) -> bool:
        """Whether each row can be indexed in a dataset of this dimension."""
        return not self.unusable and self.blocks.keys() == {dimension}

    def refusal(self, place: int, dimension: int) -> QuarantineReason | None:
        """Why a row cannot be indexed in a dataset of this dimension; None if it can."""
        if self.dimensions[place] not in (0, dimension):
            return "dimension_mismatch"
        return self.unusable.get(place)

    def at(self, places: Sequence[int], dimension: int) -> tuple[Vectors, NDArray[np.float64]]:
        """Vectors (n, dimension) float32 of rows of this dimension, and their squared norms."""
        vectors, norms = self.blocks[dimension].vectors, self.squared_norms[dimension]
        if isinstance(places, range) and len(places) == len(vectors):
            return vectors, norms
        rows = self.rows[places]
        return vectors[rows], norms[rows]
