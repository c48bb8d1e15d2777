"""Counts of the events since the start: cheap to write, read as a whole by ``syncd.ops``.

Each number has one writer. Searches are counted by the event loop, all else by the consumer's task
or by a thread that it waits for. A reader in another thread may see a histogram between two of its
updates; then it is wrong by one observation, never by more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Any, Literal

MAX_DATASETS = 1000
"""Number of datasets that are counted under their own names; the later ones share ``OTHER``.

Each name costs a few dozen series.
"""

OTHER = "other"
"""Name of the shared counts. It cannot be a dataset's full name: each of those has a ``/``."""

FAST_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5)
SLOW_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)

Outcome = str
"""``ok``, or the kind of an error."""

Op = Literal["insert", "update", "delete"]
OPS: tuple[Op, ...] = ("insert", "update", "delete")


class Durations:
    """A histogram of seconds: the number of observations in each bucket, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one observation. A bucket includes its bound."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        """Number of observations."""
        return sum(self.counts)


def move(counter: Counter[Any], name: object, to: object) -> None:
    """Move the count of one name to another name."""
    number = counter.pop(name, 0)
    if number:
        counter[to] += number


class Searches:
    """The searches of one dataset."""

    __slots__ = ("outcomes", "seconds")

    def __init__(self) -> None:
        self.seconds = Durations(FAST_SECONDS)
        self.outcomes: Counter[Outcome] = Counter()

    def add(self, other: Searches) -> None:
        """Add the counts of another dataset."""
        self.seconds.counts = [
            mine + its for mine, its in zip(self.seconds.counts, other.seconds.counts, strict=True)
        ]
        self.seconds.sum += other.seconds.sum
        self.outcomes.update(other.outcomes)

    def answered(self, seconds: float) -> None:
        """Count a search that was answered."""
        self.seconds.observe(seconds)
        self.outcomes["ok"] += 1


class Counters:
    """All counts, under the names of the metrics."""

    def __init__(self) -> None:
        self.labels: dict[str, str] = {}
        self.searches: dict[str, Searches] = {}
        self.deltas_applied: Counter[tuple[str, Op]] = Counter()
        self.apply_seconds = Durations(FAST_SECONDS)
        self.checkpoint_seconds = Durations(SLOW_SECONDS)
        self.checkpoint_failures = 0
        self.verify_seconds = Durations(SLOW_SECONDS)
        self.verify_drift: Counter[str] = Counter()
        self.verify_repaired: Counter[str] = Counter()
        self.rebuilds: Counter[tuple[str, str]] = Counter()
        self.reasons: set[str] = set()

    def label(self, dataset: str) -> str:
        """Name under which a dataset is counted from now on.

        It does not change while the dataset has rows, so that no series ever decreases.
        """
        label = self.labels.get(dataset)
        if label is None:
            if len(self.labels) >= MAX_DATASETS:
                return OTHER
            self.labels[dataset] = label = dataset
        return label

    def shown(self, dataset: str) -> str:
        """Name under which a dataset has been counted so far."""
        return self.labels.get(dataset, OTHER)

    def forget(self, dataset: str) -> None:
        """Remove the series of a dataset that is gone, and add their counts to ``OTHER``."""
        if self.labels.pop(dataset, None) is None:
            return
        for counter, keys in (
            (self.deltas_applied, [(dataset, op) for op in OPS]),
            (self.rebuilds, [(dataset, reason) for reason in self.reasons]),
        ):
            for key in keys:
                move(counter, key, (OTHER, key[1]))
        move(self.verify_drift, dataset, OTHER)
        move(self.verify_repaired, dataset, OTHER)
        searches = self.searches.pop(dataset, None)
        if searches is not None:
            self.searches_of(OTHER).add(searches)

    def searches_of(self, dataset: str) -> Searches:
        """Searches of a dataset that exists; ``OTHER`` is for the names that a client invented."""
        found = self.searches.get(dataset)
        if found is None:
            label = self.label(dataset) if dataset != OTHER else OTHER
            found = self.searches.get(label)
            if found is None:
                self.searches[label] = found = Searches()
        return found

    def applied(self, dataset: str, inserted: int, updated: int, deleted: int) -> None:
        """Count rows that were applied to the index of one dataset."""
        label = self.label(dataset)
        if inserted:
            self.deltas_applied[label, "insert"] += inserted
        if updated:
            self.deltas_applied[label, "update"] += updated
        if deleted:
            self.deltas_applied[label, "delete"] += deleted

    def rebuilt(self, dataset: str, reason: str) -> None:
        """Count a dataset that is read again from its table."""
        self.reasons.add(reason)
        self.rebuilds[self.label(dataset), reason] += 1

    def drifted(self, dataset: str, keys: int) -> None:
        """Count keys that differed in a verify."""
        self.verify_drift[self.label(dataset)] += keys

    def repaired(self, dataset: str, keys: int) -> None:
        """Count keys that a verify had read again."""
        self.verify_repaired[self.label(dataset)] += keys
