"""The datasets of a source that may hold a key: a row that moved must leave its old dataset.

With few datasets, each index is asked. With many, a map from the key's hash to dataset numbers
answers. It may name datasets that a key has left; that is harmless, because deleting an absent key
does nothing. When it has twice as many entries as there were keys, it is made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from syncd.index.rows.key_map import Hashes, HashMultimap
from syncd.index.rows.keys import hash_keys, store_keys
from syncd.sync.registry.datasets import Dataset
from syncd.types import DatasetName, Key, KeyKind

FEW_DATASETS = 4
"""Up to this many datasets, each index is asked."""
SMALL_MAP_ENTRIES = 100_000
"""Up to this many entries, a map is not made again."""


class Directory:
    """The datasets of one source, and the map from keys to them."""

    def __init__(self, key_kind: KeyKind) -> None:
        self.key_kind = key_kind
        self.datasets: list[Dataset | None] = []
        """Datasets by number; None if a dataset is gone and its number is free."""
        self.free: list[int] = []
        self.numbers: dict[DatasetName, int] = {}
        self.map: HashMultimap | None = None
        self.most_entries = SMALL_MAP_ENTRIES
        """Number of entries above which the map is made again: most are of keys that are gone."""

    def adopt(self, datasets: Sequence[Dataset]) -> None:
        """Add datasets, with their keys."""
        for dataset in datasets:
            if dataset.name not in self.numbers:
                number = self.free.pop() if self.free else len(self.datasets)
                self.numbers[dataset.name] = number
                self.datasets[number : number + 1] = [dataset]
                if self.map is not None:
                    self.note(dataset)
        if self.map is None and len(self.numbers) > FEW_DATASETS:
            self.make_map()

    def forget(self, name: DatasetName) -> None:
        """Remove a dataset without keys.

        Another dataset may get its number, together with stale entries of the map.
        """
        number = self.numbers.pop(name, None)
        if number is not None:
            self.datasets[number] = None
            self.free.append(number)

    def make_map(self) -> None:
        """Make the map of the keys that the datasets hold now."""
        self.map = HashMultimap()
        for dataset in self.datasets:
            if dataset is not None:
                self.note(dataset)
        self.most_entries = max(2 * self.map.view.entries, SMALL_MAP_ENTRIES)

    def note(self, dataset: Dataset) -> None:
        """Enter all keys of a dataset."""
        assert self.map is not None
        hashes = dataset.index.view.key_hashes()
        self.map.add(hashes, np.full(len(hashes), self.numbers[dataset.name], dtype=np.int64))

    def lacks(self, hashes: Hashes) -> NDArray[np.bool_]:
        """Whether no dataset holds a key with this hash, (n,) bool; without a map, False."""
        if self.map is None:
            return np.zeros(hashes.size, dtype=np.bool_)
        lacking = np.ones(hashes.size, dtype=np.bool_)
        lacking[self.map.view.find(hashes)[0]] = False
        return lacking

    def add(self, hashes: Hashes, numbers: NDArray[np.int64]) -> None:
        """Enter the hashes (n,) of keys, each with the number of a dataset that will hold it."""
        if self.map is None or not hashes.size:
            return
        if self.map.view.entries + hashes.size > self.most_entries:
            self.make_map()
        known_at, known = self.map.view.find(hashes)
        new = np.ones(hashes.size, dtype=np.bool_)
        new[known_at[numbers[known_at] == known]] = False
        self.map.add(hashes[new], numbers[new])

    def to_leave(
        self, keys: Sequence[Key], homes: Mapping[Key, DatasetName]
    ) -> dict[DatasetName, list[Key]]:
        """The datasets that may hold a key, except the one that is its home now."""
        if not keys:
            return {}
        if self.map is None:
            return self.held_elsewhere(keys, homes)
        places, numbers = self.map.view.find(
            hash_keys(self.key_kind, store_keys(self.key_kind, keys))
        )
        found: dict[DatasetName, list[Key]] = {}
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            there = self.datasets[number]
            if there is not None and homes.get(keys[place]) != there.name:
                found.setdefault(there.name, []).append(keys[place])
        return found

    def held_elsewhere(
        self, keys: Sequence[Key], homes: Mapping[Key, DatasetName]
    ) -> dict[DatasetName, list[Key]]:
        """``to_leave`` without a map: each index is asked."""
        found: dict[DatasetName, list[Key]] = {}
        for dataset in self.datasets:
            if dataset is None:
                continue
            strangers = [key for key in keys if homes.get(key) != dataset.name]
            if strangers and dataset.index.count:
                there = [
                    strangers[place]
                    for place in dataset.index.view.contains(strangers).nonzero()[0].tolist()
                ]
                if there:
                    found[dataset.name] = there
        return found
