"""Applying: bring the indexes of one source to the rows that were just read.

Invariant: after ``apply`` of everything that a pass read at its snapshot, the source's indexes hold exactly the rows that were live at that
snapshot and can be indexed; the rest of the live rows are in quarantine. Changes are idempotent: applying a newer reading of a row, or the
same one again, is always right.
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
from syncd.sync.source.rows import Row
from syncd.types import DatasetName, Key, dataset_name


@dataclass(slots=True)
class Usable:
    """Rows that can be indexed: their keys, vectors in blocks (n, dimension) float32, fingerprints, and attached columns if there are any."""

    keys: list[Key] = field(default_factory=list)
    vectors: list[NDArray[np.float32]] = field(default_factory=list)
    fingerprints: list[int] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)

    @property
    def matrix(self) -> NDArray[np.float32]:
        """All vectors, (n, dimension)."""
        return np.concatenate(self.vectors) if self.vectors else np.empty((0, 0), dtype=np.float32)


def apply(followed: FollowedSource, asked: Sequence[Key], rows: Sequence[Row]) -> int:
    """Bring the indexes to what was just read: ``rows`` are the live ones, any other key ``asked`` for is a tombstone.

    Returns how many rows changed. Raises ``OSError`` when the disk is full; then nothing is lost, and the same may be applied again.
    """
    places: dict[DatasetName, list[int]] = {}
    keys = followed.source.parse_keys([row[0] for row in rows])
    for key in (*asked, *keys) if followed.quarantine else ():
        followed.quarantine.pop(key, None)
    if followed.scan is not None and followed.scan.quarantined:
        followed.scan.quarantined.difference_update(asked, keys)
    targets: dict[Key, DatasetName] = {}
    names: dict[tuple[str, str], DatasetName] = {}
    for place, (_, project, dataset, _, fingerprint, _) in enumerate(rows):
        if project is None or dataset is None:
            followed.quarantine.put(keys[place], DatasetName(""), "null_dataset", fingerprint)
            continue
        name = names.get((project, dataset)) or names.setdefault(
            (project, dataset), dataset_name(project, dataset)
        )
        places.setdefault(name, []).append(place)
        targets[keys[place]] = name
    upserts: dict[DatasetName, Usable] = {}
    touched = {*asked, *keys}
    for name, at in places.items():
        found = followed.dataset(name)
        if found is None:
            for place in at:
                followed.quarantine.put(keys[place], name, "dataset_taken", rows[place][4])
                targets.pop(keys[place], None)
            continue
        upserts[name] = usable_rows(
            followed, found, [keys[place] for place in at], [rows[place] for place in at], touched
        )
        for key in {keys[place] for place in at}.difference(upserts[name].keys):
            targets.pop(key, None)
    changed, begun = 0, time.perf_counter()
    deletes = followed.directory.to_leave(list(dict.fromkeys((*asked, *keys))), targets)
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
        followed.directory.add(name, good.keys)
        followed.emptied.note(followed.datasets[name])
        changed += applied.inserted + applied.updated + applied.deleted
        followed.registry.counters.applied(name, applied.inserted, applied.updated, applied.deleted)
    followed.registry.counters.apply_seconds.observe(time.perf_counter() - begun)
    reconsider(followed, deletes)
    return changed


def reconsider(followed: FollowedSource, names: Iterable[DatasetName]) -> None:
    """A dataset that has lost its last row takes the dimension of the next: read again the rows that did not fit before."""
    empty = {name for name in names if not followed.datasets[name].index.count}
    if empty:
        followed.reread_misfits(empty)


def usable_rows(
    followed: FollowedSource,
    dataset: Dataset,
    keys: Sequence[Key],
    rows: Sequence[Row],
    touched: set[Key],
) -> Usable:
    """The rows that can be indexed, the last reading of a key first to count; the others go to quarantine."""
    last = {key: place for place, key in enumerate(keys)}
    if len(last) < len(keys):
        keys, rows = list(last), [rows[place] for place in last.values()]
    decoded = decode_vectors(followed.source.vector_type, [row[3] for row in rows])
    for place, reason in decoded.bad:
        followed.quarantine.put(keys[place], dataset.name, reason, rows[place][4])
    if followed.scan is not None:
        seen = followed.scan.dimensions.setdefault(dataset.name, Counter())
        for block in decoded.blocks:
            seen[block.vectors.shape[1]] += len(block.rows)
    dimension = dimension_for(
        followed, dataset, [block.vectors for block in decoded.blocks], touched
    )
    usable = Usable()
    for block in decoded.blocks:
        if block.vectors.shape[1] != dimension:
            for place in block.rows:
                followed.quarantine.put(
                    keys[place], dataset.name, "dimension_mismatch", rows[place][4]
                )
            continue
        bad = VectorFormat(followed.source.metric, followed.source.half).validate(block.vectors)
        for place, reason in bad.items():
            followed.quarantine.put(
                keys[block.rows[place]], dataset.name, reason, rows[block.rows[place]][4]
            )
        good = (
            [place for place in range(len(block.rows)) if place not in bad]
            if bad
            else range(len(block.rows))
        )
        usable.keys += [keys[block.rows[place]] for place in good]
        usable.fingerprints += [rows[block.rows[place]][4] for place in good]
        if followed.source.columns:
            usable.columns += [rows[block.rows[place]][5] or "" for place in good]
        usable.vectors.append(block.vectors[list(good)] if bad else block.vectors)
    return usable


def dimension_for(
    followed: FollowedSource,
    dataset: Dataset,
    blocks: Sequence[NDArray[np.float32]],
    touched: set[Key],
) -> int | None:
    """The dimension that the dataset's rows must have: declared, else that of the rows that are not ``touched``, else the most
    frequent of these."""
    if followed.source.dimension is not None:
        return followed.source.dimension
    if followed.scan is not None and dataset.name in followed.scan.forced:
        return followed.scan.forced[dataset.name]
    index = dataset.index
    if index.count and all(block.shape[1] == index.dim for block in blocks):
        return (
            index.dim
        )  # whether or not other rows have it: which of them are touched need not be looked up
    if index.count and (
        index.count > len(touched)
        or index.count > np.count_nonzero(index.view.contains(list(touched)))
    ):
        return index.dim
    if not blocks:
        return None
    dimension: int = max(blocks, key=len).shape[1]
    if index.count and dimension != index.dim:  # every row of the old dimension is being replaced
        index.clear()
        followed.reread_misfits({dataset.name})
    return dimension
