"""The datasets of one source, by name: they are created by its rows and removed when empty."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from syncd.postgres.source import Source
from syncd.sync.registry.datasets import Dataset, Follower, Registry
from syncd.sync.registry.states import Standing
from syncd.sync.source.emptied import Emptied
from syncd.sync.source.key_homes import Directory
from syncd.types import DatasetName, Key


class SourceDatasets(dict[DatasetName, Dataset]):
    """The datasets of one source that have an index; ``emptied`` has the names of the others."""

    def __init__(self, source: Source, registry: Registry, follower: Follower) -> None:
        super().__init__()
        self.source = source
        self.registry = registry
        self.follower = follower
        self.directory = Directory(source.key_kind)
        self.emptied = Emptied()

    def adopt(self, dataset: Dataset) -> None:
        """Add a dataset that was loaded from a checkpoint."""
        self[dataset.name] = dataset
        self.directory.adopt([dataset])
        self.registry.publish(dataset)
        self.emptied.note(dataset)

    def get_or_create(self, name: DatasetName, before: SourceDatasets | None) -> Dataset | None:
        """The dataset of a name, created if necessary; None if another source has one.

        ``before`` are the datasets of the same table's previous source; they may be replaced. A
        dataset that is created now answers from the end of the pass: a search between its creation
        and its rows would find it empty.
        """
        mine = self.get(name)
        if mine is not None:
            return mine
        listed = self.registry.by_name.get(name)
        stands = listed is not None or (
            name in self.registry.retired and name not in self.emptied.names
        )
        replaces = before is not None and (
            (listed is not None and before.get(name) is listed) or name in before.emptied.names
        )
        if stands and not replaces:
            return None
        mine = self.create(name)
        if name in self.emptied.names:  # it had rows before
            self.emptied.names.discard(name)
            mine.standing = replace(self.emptied.standing)
        self[name] = mine
        self.directory.adopt([mine])
        if not stands:
            self.registry.publish(mine)
        return mine

    def create(self, name: DatasetName) -> Dataset:
        """A new dataset with an empty index, in its own directory."""
        return self.registry.create(name, self.source, self.follower)

    def empty(self, name: DatasetName) -> Dataset:
        """A dataset that answers for a name without rows; its index is made for this question."""
        return replace(self.create(name), standing=self.emptied.standing)

    def load_emptied(self, names: Iterable[str]) -> None:
        """Add the names without rows of a checkpoint."""
        for name in map(DatasetName, names):
            if name not in self.registry.by_name and name not in self.registry.retired:
                self.emptied.names.add(name)
                self.registry.retired[name] = self.follower
        self.emptied.standing = Standing(began_empty=False)

    def retire_emptied(self) -> None:
        """Remove the indexes of datasets that have been empty for a while.

        Called between passes, when no reading may find rows of theirs.
        """
        for dataset in self.emptied.due(self):
            self.emptied.names.add(dataset.name)
            self.registry.retire(dataset, self.follower)
            del self[dataset.name]
            self.directory.forget(dataset.name)

    def some_indexed(self, count: int) -> list[Key]:
        """About ``count`` keys of indexed rows of each of the three largest datasets."""
        largest = sorted(self.values(), key=lambda each: each.index.count)[-3:]
        return [key for dataset in largest for key in dataset.index.view.some_keys(count)]

    def take_over(self, before: SourceDatasets) -> None:
        """Add the datasets of a previous source that goes on answering."""
        self.update(before)
        self.emptied.names |= before.emptied.names

    def remove_all(self) -> None:
        """Remove all names from the registry, so that none of them answers any more."""
        for dataset in self.values():
            self.registry.remove(dataset)
        for name in self.emptied.names:
            self.registry.remove_retired(name)
        self.emptied.names.clear()
