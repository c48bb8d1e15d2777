"""Applies rows that were just read to the indexes of one source.

Invariant: after ``apply`` of all rows that a pass read, the source's indexes are at its snapshot.
They hold exactly the live rows that can be indexed; the other live rows are in quarantine. Changes
are idempotent: it is always right to apply a newer reading of a row, or the same reading again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from syncd.index.rows.vectors import VectorFormat
from syncd.postgres.vectors import decode_vectors
from syncd.sync.registry.datasets import Dataset
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.rows import Rows, at
from syncd.types import DatasetName, Key, QuarantineReason, dataset_name


@dataclass(slots=True)
class Usable:
    """Rows that can be indexed; ``columns`` are the attached columns, empty if there are none."""

    keys: list[Key] = field(default_factory=list)
    vectors: list[NDArray[np.float32]] = field(default_factory=list)
    """Vectors in blocks of shape (n, dimension)."""
    fingerprints: list[int] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    @property
    def matrix(self) -> NDArray[np.float32]:
        """All vectors, (n, dimension)."""
        return np.concatenate(self.vectors) if self.vectors else np.empty((0, 0), dtype=np.float32)


def apply(followed: FollowedSource, asked: Sequence[Key], rows: Rows) -> int:
    """Apply a reading: ``rows`` are live, any other key in ``asked`` is a tombstone.

    Returns the number of changed rows. Raises ``OSError`` if the disk is full; then nothing is
    lost, and the same rows may be applied again.
    """
    places: dict[DatasetName, list[int]] = {}
    keys = followed.source.parse_keys(rows.keys)
    for key in (*asked, *keys) if followed.quarantine else ():
        followed.quarantine.pop(key, None)
    if followed.scan is not None and followed.scan.quarantined:
        followed.scan.quarantined.difference_update(asked, keys)
    targets: dict[Key, DatasetName] = {}
    names: dict[tuple[str, str], DatasetName] = {}
    for place, (project, dataset) in enumerate(zip(rows.projects, rows.datasets, strict=True)):
        if project is None or dataset is None:
            followed.quarantine.put(
                keys[place], DatasetName(""), "null_dataset", rows.fingerprints[place]
            )
            continue
        name = names.get((project, dataset)) or names.setdefault(
            (project, dataset), dataset_name(project, dataset)
        )
        places.setdefault(name, []).append(place)
        targets[keys[place]] = name
    upserts: dict[DatasetName, Usable] = {}
    touched = {*asked, *keys}
    for name, mine in places.items():
        found = followed.dataset(name)
        if found is None:
            for place in mine:
                followed.quarantine.put(
                    keys[place], name, "dataset_taken", rows.fingerprints[place]
                )
                targets.pop(keys[place], None)
            continue
        upserts[name] = usable_rows(followed, found, keys, rows, mine, touched)
        for key in {keys[place] for place in mine}.difference(upserts[name].keys):
            targets.pop(key, None)
    changed, begun = 0, time.perf_counter()
    deletes = followed.datasets.directory.to_leave(list(dict.fromkeys((*asked, *keys))), targets)
    for name in {*upserts, *deletes}:
        good = upserts.get(name) or Usable()
        columns = good.columns if followed.source.columns else None
        change = (
            good.keys,
            good.matrix,
            deletes.get(name, []),
            np.array(good.fingerprints, dtype=np.int64),
            columns,
        )
        replacement = followed.datasets[name].replacement
        if replacement is not None:
            replacement.apply(*change)
        applied = followed.datasets[name].index.apply(*change)
        followed.datasets.directory.add(name, good.keys)
        followed.datasets.emptied.note(followed.datasets[name])
        changed += applied.inserted + applied.updated + applied.deleted
        followed.registry.counters.applied(name, applied.inserted, applied.updated, applied.deleted)
    followed.registry.counters.apply_seconds.observe(time.perf_counter() - begun)
    reconsider(followed, deletes)
    return changed


def reconsider(followed: FollowedSource, names: Iterable[DatasetName]) -> None:
    """Have misfits read again: an empty dataset takes the dimension of its next row."""
    empty = {name for name in names if not followed.datasets[name].index.count}
    if empty:
        followed.reread_misfits(empty)


def usable_rows(
    followed: FollowedSource,
    dataset: Dataset,
    keys: Sequence[Key],
    rows: Rows,
    places: Sequence[int],
    touched: set[Key],
) -> Usable:
    """Those rows of a dataset that can be indexed; the others go to quarantine.

    ``places`` are the places of the dataset's rows among all ``keys`` and ``rows``. The last
    reading of a key counts.
    """
    last = {keys[place]: place for place in places}
    if len(last) < len(places):
        places = list(last.values())
    decoded = decode_vectors(followed.source.vector_type, at(rows.vectors, places))

    def reject(place: int, reason: QuarantineReason) -> None:
        followed.quarantine.put(keys[place], dataset.name, reason, rows.fingerprints[place])

    for number, reason in decoded.bad:
        reject(places[number], reason)
    if followed.scan is not None:
        seen = followed.scan.dimensions.setdefault(dataset.name, Counter())
        for block in decoded.blocks:
            seen[block.vectors.shape[1]] += len(block.rows)
    dimension = dimension_for(
        followed, dataset, [block.vectors for block in decoded.blocks], touched
    )
    usable = Usable()
    for block in decoded.blocks:
        good = at(places, block.rows.tolist())
        vectors = block.vectors
        if vectors.shape[1] != dimension:
            for place in good:
                reject(place, "dimension_mismatch")
            continue
        bad = VectorFormat(followed.source.metric, followed.source.half).validate(vectors)
        if bad:
            for number, reason in bad.items():
                reject(good[number], reason)
            numbers = [number for number in range(len(good)) if number not in bad]
            good, vectors = at(good, numbers), vectors[numbers]
        usable.keys += at(keys, good)
        usable.fingerprints += at(rows.fingerprints, good)
        if followed.source.columns:
            usable.columns += [columns or "" for columns in at(rows.columns, good)]
        usable.vectors.append(vectors)
    return usable


def dimension_for(
    followed: FollowedSource,
    dataset: Dataset,
    blocks: Sequence[NDArray[np.float32]],
    touched: set[Key],
) -> int | None:
    """The dimension that the dataset's rows must have.

    It is the declared one, or that of the rows that are not ``touched``, or else the most frequent
    one of ``blocks``.
    """
    if followed.source.dimension is not None:
        return followed.source.dimension
    if followed.scan is not None and dataset.name in followed.scan.forced:
        return followed.scan.forced[dataset.name]
    index = dataset.index
    if index.count and all(block.shape[1] == index.dim for block in blocks):
        return index.dim  # there is no need to look up which rows are touched
    if index.count and (
        index.count > len(touched)
        or index.count > np.count_nonzero(index.view.contains(list(touched)))
    ):
        return index.dim
    if not blocks:
        return None
    dimension: int = max(blocks, key=len).shape[1]
    if index.count and dimension != index.dim:  # each old row is replaced
        index.clear()
        followed.reread_misfits({dataset.name})
    return dimension
