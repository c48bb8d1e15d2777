"""Which of a source's datasets may hold a key, so that a row that moved, or went, leaves its old dataset.

With few datasets each is asked. With many, a map from the key's hash to dataset numbers answers; it only ever grows within a run and may
name datasets that a key has left long ago, which is harmless: deleting a key that is not there does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from syncd.index.rows.key_map import HashMultimap
from syncd.index.rows.keys import hash_keys, store_keys
from syncd.sync.datasets import Dataset
from syncd.types import DatasetName, Key, KeyKind

FEW_DATASETS = 4


class Directory:
    """See the module; made for one source."""

    def __init__(self, key_kind: KeyKind) -> None:
        self.key_kind = key_kind
        self.datasets: list[Dataset] = []
        self.numbers: dict[DatasetName, int] = {}
        self.map: HashMultimap | None = None

    def adopt(self, datasets: Sequence[Dataset]) -> None:
        """Know these datasets too, with the keys that they hold."""
        for dataset in datasets:
            if dataset.name not in self.numbers:
                self.numbers[dataset.name] = len(self.datasets)
                self.datasets.append(dataset)
                if self.map is not None:
                    self.note(dataset)
        if self.map is None and len(self.datasets) > FEW_DATASETS:
            self.map = HashMultimap()
            for dataset in self.datasets:
                self.note(dataset)

    def note(self, dataset: Dataset) -> None:
        """Enter all keys of a dataset."""
        assert self.map is not None
        hashes = dataset.index.view.key_hashes()
        self.map.add(hashes, np.full(len(hashes), self.numbers[dataset.name], dtype=np.int64))

    def add(self, name: DatasetName, keys: Sequence[Key]) -> None:
        """Enter keys that a dataset now holds."""
        if self.map is not None and keys:
            hashes = hash_keys(self.key_kind, store_keys(self.key_kind, keys))
            known_at, numbers = self.map.view.find(hashes)
            number = self.numbers[name]
            new = np.ones(len(keys), dtype=bool)
            new[known_at[numbers == number]] = False
            self.map.add(hashes[new], np.full(int(new.sum()), number, dtype=np.int64))

    def to_leave(self, keys: Sequence[Key], homes: Mapping[Key, DatasetName]) -> dict[DatasetName, list[Key]]:
        """The datasets that may hold a key, but for the one that is now its home."""
        if not keys:
            return {}
        found: dict[DatasetName, list[Key]] = {}
        if self.map is None:
            for dataset in self.datasets:
                strangers = [key for key in keys if homes.get(key) != dataset.name]
                if strangers and dataset.index.count:
                    there = [strangers[place] for place in dataset.index.contains(strangers).nonzero()[0].tolist()]
                    if there:
                        found[dataset.name] = there
            return found
        places, numbers = self.map.view.find(hash_keys(self.key_kind, store_keys(self.key_kind, keys)))
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            name = self.datasets[number].name
            if homes.get(keys[place]) != name:
                found.setdefault(name, []).append(keys[place])
        return found
