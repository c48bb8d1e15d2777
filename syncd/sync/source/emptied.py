"""The datasets of one source that have no rows any more: their names stay known, and nothing else of them.

A dataset once seen answers empty until its source is detached. One that stays empty for a while gives its index back: memory, files and its place in
the manifest; what is left is its name. It is formed again with its next row.

Invariant: a name that answers is in ``Registry.by_name`` or in ``Registry.retired``, at every moment for a reader that looks there in this order, and
once more at the first.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping

from syncd.sync.registry.datasets import Dataset
from syncd.sync.registry.states import Standing
from syncd.types import DatasetName

EMPTY_SECONDS = 5.0
"""A dataset that has been empty for this long gives its index back. To form one again takes 0.1 ms."""


class Emptied:
    """See the module. Changed like its source: by passes, or by a task that holds ``busy``."""

    def __init__(self) -> None:
        self.names: set[DatasetName] = set()
        """The names without an index."""
        self.waiting: deque[tuple[float, DatasetName]] = deque()
        self.queued: set[DatasetName] = set()
        self.standing = Standing()
        """That of all the names."""

    def note(self, dataset: Dataset) -> None:
        """A dataset may have lost its last row."""
        if not dataset.index.count and dataset.name not in self.queued:
            self.queued.add(dataset.name)
            self.waiting.append((time.monotonic(), dataset.name))

    def due(self, datasets: Mapping[DatasetName, Dataset]) -> Iterator[Dataset]:
        """Datasets that have been empty for a while; nothing else uses their indexes."""
        until = time.monotonic() - EMPTY_SECONDS
        while self.waiting and self.waiting[0][0] <= until:
            _, name = self.waiting.popleft()
            self.queued.discard(name)
            dataset = datasets.get(name)
            if dataset is None or dataset.index.count:
                continue
            if dataset.replacement is not None or dataset.sweeping:
                self.note(dataset)
            else:
                yield dataset
