"""Vectors to measure with, and the exact answers to their queries.

The vectors are the user's, or generated ones that are as hard to search as real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncd.errors import SettingsError

K = 10
BLOCK_ROWS = 50_000
LOADED_ROWS = 1000
CANDIDATES = 2 * K
"""Neighbours to keep per query: float32 may order the last ones differently than float64."""
ROUNDING = 1e-5
"""Relative difference of two distances that count as equal."""
LATENT = 24
CLUSTERS = 200
SPREAD = 1.0
NOISE = 0.02

Track = Callable[[Sequence[int], str], Iterable[int]]


@dataclass(frozen=True, slots=True)
class VectorSet:
    """Vectors and queries.

    ``base`` is (n, d) of any numeric type. ``queries`` (q, d) float32 are not in ``base``.
    """

    name: str
    base: NDArray[Any]
    queries: NDArray[np.float32]
    metric: str
    neighbors: NDArray[Any] | None = None
    """Row numbers in ``base``, nearest first, (q, at least ``K``); None: not known."""
    spare: int = 0
    """Number of vectors at the end of ``base`` that are only written later."""

    @property
    def rows(self) -> int:
        """Number of vectors that are searched from the start."""
        return len(self.base) - self.spare

    @property
    def dimension(self) -> int:
        """Dimension of every vector."""
        return int(self.base.shape[1])

    def blocks(self, begin: int = 0, end: int | None = None) -> Iterator[NDArray[np.float32]]:
        """Rows of ``base`` as float32, in blocks of (at most ``LOADED_ROWS``, d)."""
        stop = len(self.base) if end is None else end
        for start in range(begin, stop, LOADED_ROWS):
            yield self.base[start : min(start + LOADED_ROWS, stop)].astype(np.float32)


def read(path: Path, *, rows: int | None, queries: int, metric: str) -> VectorSet:
    """Read .npy (n, d), .fvecs, or .npz with ``base``.

    An .npz file may also have ``queries`` and their ``neighbors`` (Euclidean); the queries need not
    be of the kind of the rows. Without queries, some of the vectors are taken out and used as
    queries. Raises ``SettingsError``.
    """
    found: dict[str, NDArray[Any]] = {}
    try:
        if path.suffix == ".npz":
            with np.load(path) as archive:
                found = {
                    name: archive[name]
                    for name in ("base", "queries", "neighbors")
                    if name in archive
                }
        elif path.suffix == ".npy":
            found = {"base": np.load(path, mmap_mode="r")}
        elif path.suffix == ".fvecs":
            words = np.fromfile(path, dtype=np.int32)
            found = {"base": words.reshape(-1, int(words[0]) + 1)[:, 1:].view(np.float32)}
    except (OSError, ValueError, IndexError) as error:
        raise SettingsError(
            f"{path} cannot be read: {error}", hint="give a .npy, .npz or .fvecs file"
        ) from error
    base = found.get("base")
    if base is None or base.ndim != 2 or len(base) <= K:
        raise SettingsError(
            f"{path} has no vectors that can be searched",
            hint="give .npy (n, d), .fvecs, or .npz with base (n, d)",
        )
    neighbors = found.get("neighbors") if metric == "l2" else None
    if "queries" in found:
        check_queries(path, base, found["queries"], neighbors)
        chosen = found["queries"][:queries].astype(np.float32)
    else:
        held_out = np.sort(
            np.random.default_rng(0).permutation(len(base))[: min(queries, len(base) // 10 + 1)]
        )
        chosen = base[held_out].astype(np.float32)
        base = np.delete(base, held_out, axis=0)
    if rows is not None and rows < len(base):
        base, neighbors = base[:rows], None
    return VectorSet(
        path.name, base, chosen, metric, None if neighbors is None else neighbors[:queries]
    )


def check_queries(
    path: Path, base: NDArray[Any], queries: NDArray[Any], neighbors: NDArray[Any] | None
) -> None:
    """Raise ``SettingsError`` if the queries of a file do not fit its vectors and neighbors."""
    if queries.ndim != 2 or not len(queries) or queries.shape[1] != base.shape[1]:
        raise SettingsError(
            f"{path} has queries of shape {queries.shape}, and base of shape {base.shape}",
            hint="give queries (q, d) of the same dimension as base (n, d)",
        )
    wanted = (len(queries), K)
    if neighbors is not None and (
        neighbors.ndim != 2 or len(neighbors) != wanted[0] or neighbors.shape[1] < wanted[1]
    ):
        raise SettingsError(
            f"{path} has neighbors of shape {neighbors.shape}, expected at least {wanted}",
            hint="give the rows of base that are nearest to each query, or no neighbors",
        )


def generate(rows: int, dimension: int, *, queries: int, metric: str) -> VectorSet:
    """Vectors and queries of ``made_blocks``."""
    made = np.empty((rows + queries, dimension), dtype=np.float32)
    start = 0
    for block in made_blocks(len(made), dimension, 0, BLOCK_ROWS):
        made[start : start + len(block)] = block
        start += len(block)
    return VectorSet("generated, seed 0", made[:rows], made[rows:], metric)


def made_blocks(
    rows: int, dimension: int, seed: int, block_rows: int = LOADED_ROWS
) -> Iterator[NDArray[np.float32]]:
    """Generated vectors, in blocks of (at most ``block_rows``, dimension) float32.

    They are clusters on a curved surface of ``LATENT`` dimensions, with some noise. The surface is
    the same for every seed. Vectors of independent coordinates would be useless: all have about the
    same distance from each other, and no index can help. The intrinsic dimension of these vectors
    (``Truth.intrinsic_dimension``) is 16 at 100,000 rows, at any length. MNIST has 13, and
    1,000,000 SIFT descriptors have 21.
    """
    surface, generator = np.random.default_rng(0), np.random.default_rng((0, seed))
    hidden = 4 * LATENT
    inner = surface.standard_normal((LATENT, hidden), dtype=np.float32)
    inner /= np.float32(np.sqrt(LATENT))
    outer = surface.standard_normal((hidden, dimension), dtype=np.float32)
    outer /= np.float32(np.sqrt(hidden))
    centres = surface.standard_normal((CLUSTERS, LATENT), dtype=np.float32)
    for start in range(0, rows, block_rows):
        count = min(block_rows, rows - start)
        latent = centres[generator.integers(CLUSTERS, size=count)]
        latent = latent + SPREAD * generator.standard_normal(latent.shape, dtype=np.float32)
        noise = NOISE * generator.standard_normal((count, dimension), dtype=np.float32)
        yield np.tanh(latent @ inner) @ outer + noise


@dataclass(frozen=True, slots=True)
class Recall:
    """Mean and 5th percentile of the recall of single queries, and their number."""

    mean: float
    p5: float
    queries: int


class Truth:
    """The exact answers to the queries over some rows.

    ``limits`` (q,) is the distance of the ``K``-th nearest row.
    """

    def __init__(
        self,
        vectors: NDArray[Any],
        queries: NDArray[np.float32],
        metric: str,
        candidates: NDArray[Any],
        there: NDArray[np.bool_],
    ) -> None:
        """Compute the distances of the candidates.

        ``vectors`` has the row with key n at n - 1. ``candidates`` (q, ≥ K) has rows that include
        the nearest ones. ``there`` (n,) says which rows searches can find.
        """
        self.vectors = vectors
        self.there = there
        self.queries = queries
        self.metric = metric
        self.distances = np.sort(
            np.stack([self.distance(number, rows) for number, rows in enumerate(candidates)]),
            axis=1,
        )
        self.limits = self.distances[:, min(K, candidates.shape[1]) - 1]

    def distance(self, query: int, rows: NDArray[Any]) -> NDArray[np.float64]:
        """Distances of rows to a query, float64.

        Squared Euclidean under l2, and under cosine after normalisation; under ip the negative
        inner product.
        """
        given, found = self.queries[query].astype(np.float64), self.vectors[rows].astype(np.float64)
        if self.metric == "ip":
            return np.asarray(-found @ given)
        if self.metric == "cosine":
            given = given / np.linalg.norm(given)
            found = found / np.linalg.norm(found, axis=1, keepdims=True)
        return np.asarray(((found - given) ** 2).sum(axis=1))

    def recall(self, numbers: Sequence[int], answers: Sequence[Sequence[int]]) -> Recall:
        """Share of the ``K`` nearest rows in the answers to some queries.

        A row as near as the ``K``-th counts as one of them. A row that searches cannot find does
        not count.
        """
        shares, wanted = [], min(K, self.distances.shape[1])
        for number, keys in zip(numbers, answers, strict=True):
            rows = np.array(list(set(keys)), dtype=np.int64) - 1
            rows = rows[self.there[rows]]
            limit = self.limits[number] + ROUNDING * abs(self.limits[number])
            shares.append(np.count_nonzero(self.distance(number, rows) <= limit) / wanted)
        reached = np.minimum(shares, 1.0)
        return Recall(
            round(float(reached.mean()), 4),
            round(float(np.percentile(reached, 5)), 2),
            len(reached),
        )

    def intrinsic_dimension(self) -> float | None:
        """Dimension of the queries' neighbourhoods.

        The estimator is Levina and Bickel's (2004), with the mean of MacKay and Ghahramani. None:
        there is no estimate for this metric or these vectors.
        """
        distances = np.maximum(self.distances, 0.0)
        usable = distances[(distances[:, 0] > 0) & (distances[:, -1] > distances[:, 0])]
        if self.metric == "ip" or not len(usable):
            return None
        logs = np.log(usable[:, -1:] / usable[:, :-1]) / 2  # of squared distances
        return round(float(1 / logs.mean()), 1)


def truth(
    vectors: NDArray[Any],
    queries: NDArray[np.float32],
    metric: str,
    *,
    track: Track,
    neighbors: NDArray[Any] | None = None,
    gone: NDArray[np.int64] | None = None,
) -> Truth:
    """Compare every query with every row except ``gone``, unless the neighbours are known."""
    import faiss  # imported here: other commands start without it

    there = np.ones(len(vectors), dtype=bool)
    if gone is not None:
        there[gone] = False
    if neighbors is not None:
        return Truth(vectors, queries, metric, neighbors[:, :CANDIDATES], there)
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    asked = normalised(queries) if metric == "cosine" else queries
    best = np.empty((len(queries), 0), dtype=np.float32)
    rows = np.empty((len(queries), 0), dtype=np.int64)
    places = np.flatnonzero(there)
    wanted = min(CANDIDATES, len(places))
    for start in track(range(0, len(places), BLOCK_ROWS), "exact answers"):
        chosen = places[start : start + BLOCK_ROWS]
        block = vectors[chosen].astype(np.float32)
        block = normalised(block) if metric == "cosine" else block
        near, found = faiss.knn(asked, block, min(wanted, len(block)), metric=kind)
        near = near if metric == "l2" else -near
        best, rows = np.hstack([best, near]), np.hstack([rows, chosen[found]])
        order = np.argsort(best, axis=1)[:, :wanted]
        best = np.take_along_axis(best, order, axis=1)
        rows = np.take_along_axis(rows, order, axis=1)
    return Truth(vectors, queries, metric, rows, there)


def normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vectors, (n, d) float32, at length 1."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.float32(1e-30)))
