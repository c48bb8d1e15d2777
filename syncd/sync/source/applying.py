"""Applies rows that were just read to the indexes of one source.

Invariant: after ``apply`` of all rows that a pass read, the source's indexes are at its snapshot.
They hold exactly the live rows that can be indexed; the other live rows are in quarantine. Changes
are idempotent: it is always right to apply a newer reading of a row, or the same reading again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from syncd.index.filter.attributes import store_lines
from syncd.index.generation.stored_rows import NO_STORED_ROWS, StoredRows
from syncd.index.rows.vectors import VectorFormat
from syncd.sync.registry.datasets import Dataset
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.read_vectors import ReadVectors
from syncd.sync.source.rows import Rows
from syncd.types import DatasetName, Key, QuarantineReason, dataset_name

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Accepted:
    """The rows of one dataset that can be indexed, by their places in the reading."""

    dataset: Dataset
    dimension: int
    places: Sequence[int]


def apply(followed: FollowedSource, asked: Sequence[Key], rows: Rows) -> int:
    """Apply a reading: ``rows`` are live, any other key in ``asked`` is a tombstone.

    Returns the number of changed rows. Raises ``OSError`` if the disk is full; then nothing is
    lost, and the same rows may be applied again.

    What does not depend on the dataset is done for all rows at once: a page of a table that is
    dealt out to 5,000 datasets has one row for each.
    """
    keys = followed.source.parse_keys(rows.keys)
    quarantine = followed.quarantine
    before = {key: quarantine[key] for key in (*asked, *keys) if key in quarantine}
    if followed.scan is not None and followed.scan.quarantined:
        followed.scan.quarantined.difference_update(asked, keys)
    vectors = ReadVectors.of(followed.source, rows.vectors)
    touched = {*asked, *keys}
    accepted = [
        usable_rows(followed, dataset, keys, rows, places, vectors, touched)
        for dataset, places in by_dataset(followed, keys, rows)
    ]
    for key, row in before.items():
        if quarantine[key] is row:  # after it is known which rows stay: others count them meanwhile
            del quarantine[key]
    homes = {keys[place]: each.dataset.name for each in accepted for place in each.places}
    leaving = followed.datasets.directory.to_leave(list(dict.fromkeys((*asked, *keys))), homes)
    changed, begun = 0, time.perf_counter()
    for dimension in {each.dimension for each in accepted}:
        group = [each for each in accepted if each.dimension == dimension]
        changed += write(followed, group, keys, rows, vectors, leaving)
    for name in leaving.keys() - {each.dataset.name for each in accepted}:
        changed += change(followed, followed.datasets[name], NO_STORED_ROWS, leaving[name])
    followed.registry.counters.apply_seconds.observe(time.perf_counter() - begun)
    reconsider(followed, leaving)
    return changed


def by_dataset(
    followed: FollowedSource, keys: Sequence[Key], rows: Rows
) -> Iterator[tuple[Dataset, Sequence[int]]]:
    """The datasets of some rows, each with the places of its rows; the others are quarantined."""
    reason: QuarantineReason
    for (project, name), places in rows.by_dataset().items():
        if project is None or name is None:
            dataset, full_name, reason = None, DatasetName(""), "null_dataset"
        else:
            full_name, reason = dataset_name(project, name), "dataset_taken"
            dataset = followed.dataset(full_name)
        if dataset is not None:
            yield dataset, places
            continue
        for place in places:
            followed.quarantine.put(keys[place], full_name, reason, rows.fingerprints[place])


def usable_rows(
    followed: FollowedSource,
    dataset: Dataset,
    keys: Sequence[Key],
    rows: Rows,
    places: Sequence[int],
    vectors: ReadVectors,
    touched: set[Key],
) -> Accepted:
    """Those rows of a dataset that can be indexed; the others go to quarantine.

    ``places`` are the places of the dataset's rows among all ``keys`` and ``rows``. The last
    reading of a key counts.
    """
    last = {keys[place]: place for place in places}
    if len(last) < len(places):
        places = list(last.values())
    lengths = vectors.lengths(places)
    if followed.scan is not None and followed.source.dimension is None:
        followed.scan.dimensions.setdefault(dataset.name, Counter()).update(lengths)
    dimension = dimension_for(followed, dataset, lengths, touched)
    if dimension is None:
        dimension = 0
    if vectors.all_usable(dimension):
        return Accepted(dataset, dimension, places)
    good = []
    for place in places:
        reason = vectors.refusal(place, dimension)
        if reason is None:
            good.append(place)
        else:
            followed.quarantine.put(keys[place], dataset.name, reason, rows.fingerprints[place])
    return Accepted(dataset, dimension, good)


def dimension_for(
    followed: FollowedSource, dataset: Dataset, lengths: Mapping[int, int], touched: set[Key]
) -> int | None:
    """The dimension that the dataset's rows must have.

    It is the declared one, or that of the rows that are not ``touched``, or else the most frequent
    one of ``lengths``: the number of read rows of each dimension.
    """
    if followed.source.dimension is not None:
        return followed.source.dimension
    if followed.scan is not None and dataset.name in followed.scan.forced:
        return followed.scan.forced[dataset.name]
    index = dataset.index
    if index.count and all(length == index.dim for length in lengths):
        return index.dim  # there is no need to look up which rows are touched
    if index.count and (
        index.count > len(touched)
        or index.count > np.count_nonzero(index.view.contains(list(touched)))
    ):
        return index.dim
    if not lengths:
        return None
    dimension = max(sorted(lengths), key=lengths.__getitem__)
    if index.count and dimension != index.dim:  # each old row is replaced
        index.clear()
        followed.reread_misfits({dataset.name})
    return dimension


def write(
    followed: FollowedSource,
    group: Sequence[Accepted],
    keys: Sequence[Key],
    rows: Rows,
    vectors: ReadVectors,
    leaving: Mapping[DatasetName, list[Key]],
) -> int:
    """Write accepted rows of one dimension to their indexes; returns how many rows changed.

    The directory gets the keys first. If a write fails, the rows are applied again, and then their
    keys must not count as new.
    """
    source, directory = followed.source, followed.datasets.directory
    numbers = [len(each.places) for each in group]
    places = group[0].places
    if len(group) > 1:
        places = [place for each in group for place in each.places]
    whole = len(group) == 1 and len(places) == len(keys)

    def chosen(column: Sequence[T]) -> Sequence[T]:
        return column if whole else [column[place] for place in places]

    stored, stop = NO_STORED_ROWS, 0
    if places:
        lines = [line or "" for line in chosen(rows.columns)] if source.columns else None
        read, norms = vectors.at(places, group[0].dimension)
        stored = StoredRows.of(
            VectorFormat(source.metric, source.half),
            source.key_kind,
            chosen(keys),
            read,
            np.array(chosen(rows.fingerprints), dtype=np.int64),
            None if lines is None else store_lines(lines),
            norms,
        )
    lacking = directory.lacks(stored.hashes)
    directory.add(
        stored.hashes, np.repeat([directory.numbers[each.dataset.name] for each in group], numbers)
    )
    found = np.add.accumulate(np.concatenate(([0], ~lacking))).tolist()
    changed = 0
    for each, number in zip(group, numbers, strict=True):
        start, stop = stop, stop + number
        changed += change(
            followed,
            each.dataset,
            stored.part(start, stop),
            leaving.get(each.dataset.name, ()),
            known=found[stop] > found[start],
        )
    return changed


def change(
    followed: FollowedSource,
    dataset: Dataset,
    rows: StoredRows,
    gone: Sequence[Key],
    *,
    known: bool = True,
) -> int:
    """Apply rows and removals to the index of one dataset; returns how many rows changed.

    Not ``known``: the index has none of the rows' keys.
    """
    if dataset.replacement is not None:
        dataset.replacement.apply_stored(rows, gone)
    applied = dataset.index.apply_stored(rows, gone, known=known)
    followed.datasets.emptied.note(dataset)
    followed.registry.counters.applied(
        dataset.name, applied.inserted, applied.updated, applied.deleted
    )
    return applied.inserted + applied.updated + applied.deleted


def reconsider(followed: FollowedSource, names: Iterable[DatasetName]) -> None:
    """Have misfits read again: an empty dataset takes the dimension of its next row."""
    empty = {name for name in names if not followed.datasets[name].index.count}
    if empty:
        followed.reread_misfits(empty)
