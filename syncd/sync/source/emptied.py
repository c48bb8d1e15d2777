"""The datasets of one source that have no rows any more: their names stay known, and nothing else of them.

A dataset once seen answers empty until its source is detached. One that stays empty for a while gives its index back: memory, files and its place in
the manifest; what is left is its name. It is formed again with its next row.

Invariant: a name that answers is in ``Registry.by_name`` or in ``Registry.retired``, at every moment for a reader that looks there in this order, and
once more at the first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from syncd.sync.registry.datasets import Dataset
from syncd.types import DatasetName

if TYPE_CHECKING:
    from syncd.sync.source.followed import WatchedSource

EMPTY_SECONDS = 5.0
"""A dataset that has been empty for this long gives its index back. To form one again takes 0.1 ms."""


class Emptied:
    """See the module. Changed like its source: by passes, or by a task that holds ``busy``."""

    def __init__(self, watched: WatchedSource) -> None:
        self.watched = watched
        self.names: set[DatasetName] = set()
        """The names without an index."""
        self.waiting: deque[tuple[float, DatasetName]] = deque()
        self.queued: set[DatasetName] = set()
        self.standing: list[Dataset] = []
        """The one dataset whose state is that of all the names; none while there never was a name."""

    def note(self, dataset: Dataset) -> None:
        """A dataset may have lost its last row."""
        if not dataset.index.count and dataset.name not in self.queued:
            self.queued.add(dataset.name)
            self.waiting.append((time.monotonic(), dataset.name))

    def retire(self) -> None:
        """Let go of the indexes of datasets that have been empty for a while. Called between passes, when all is applied."""
        watched, until = self.watched, time.monotonic() - EMPTY_SECONDS
        if watched.reading or watched.predecessor is not None:
            return  # a reading may still find rows of theirs
        while self.waiting and self.waiting[0][0] <= until:
            _, name = self.waiting.popleft()
            self.queued.discard(name)
            dataset = watched.datasets.get(name)
            if dataset is None or dataset.index.count:
                continue
            if dataset.replacement is not None or dataset.sweeping:
                self.note(dataset)
                continue
            self.add(name)
            watched.registry.retire(dataset, watched)
            del watched.datasets[name]
            watched.directory.forget(name)

    def add(self, name: DatasetName) -> None:
        """Know a name, and no more."""
        if not self.standing:
            watched = self.watched
            nothing = watched.registry.create(DatasetName(""), watched.source, watched)
            nothing.state = "failed" if watched.is_failed else "catching_up" if watched.reading else "ready"
            self.standing.append(nothing)
        self.names.add(name)

    def load(self, names: Iterable[str]) -> None:
        """Take up the names of a checkpoint."""
        watched = self.watched
        for text in names:
            name = DatasetName(text)
            if name not in watched.registry.by_name and name not in watched.registry.retired:
                self.add(name)
                watched.registry.retired[name] = watched
        for nothing in self.standing:
            nothing.state = "catching_up"

    def dataset(self, name: DatasetName) -> Dataset:
        """What answers for one of the names: an empty index, made for whoever asks."""
        made = self.watched.registry.create(name, self.watched.source, self.watched)
        return replace(made, state=self.standing[0].state, reason=self.standing[0].reason)

    def take_up(self, dataset: Dataset) -> None:
        """A dataset was formed again for one of the names."""
        if dataset.name in self.names:
            self.names.discard(dataset.name)
            dataset.state, dataset.reason = self.standing[0].state, self.standing[0].reason

    def take_over(self, other: Emptied) -> None:
        """The names of a source that this one's frozen datasets stand for as well."""
        for name in other.names:
            self.add(name)

    def remove(self) -> None:
        """The names go."""
        for name in self.names:
            self.watched.registry.remove_retired(name)
        self.names.clear()
