"""The datasets of one source that have no rows any more: only their names are kept.

A dataset that was seen once answers with no rows until its source is detached. If it stays empty
for a while, its index is removed: memory, files and its entry in the manifest. Its name is kept,
and the next row creates it again.

Invariant: a name that answers is always in ``Registry.by_name`` or in ``Registry.retired``, for a
reader that looks into the first, the second, and the first again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping

from syncd.sync.registry.datasets import Dataset
from syncd.sync.registry.states import Standing
from syncd.types import DatasetName

EMPTY_SECONDS = 5.0
"""A dataset that is empty for this long loses its index. To create one again takes 0.1 ms."""


class Emptied:
    """The empty datasets of a source; only passes and holders of ``busy`` change them."""

    def __init__(self) -> None:
        self.names: set[DatasetName] = set()
        """Names without an index."""
        self.waiting: deque[tuple[float, DatasetName]] = deque()
        self.queued: set[DatasetName] = set()
        self.standing = Standing()
        """Standing of all these names."""

    def note(self, dataset: Dataset) -> None:
        """Queue a dataset that may have lost its last row."""
        if not dataset.index.count and dataset.name not in self.queued:
            self.queued.add(dataset.name)
            self.waiting.append((time.monotonic(), dataset.name))

    def due(self, datasets: Mapping[DatasetName, Dataset]) -> Iterator[Dataset]:
        """Datasets that have been empty for a while; no other code uses their indexes."""
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
