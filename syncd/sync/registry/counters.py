"""What has happened since the start, as plain numbers: cheap to write where it happens, read as a whole by ``syncd.ops``.

Each number has one writer: the searches the event loop, everything else the consumer's task or what it waits for. A reader in another thread may
meet a histogram between two of its numbers, which is one observation off, and never more.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from typing import Any, Literal

MAX_DATASETS = 1000
"""How many datasets are counted under their own names, the first ones seen; the rest share ``OTHER``. Each name costs a few dozen series."""

OTHER = "other"
"""No dataset's full name, since those have a ``/``."""

FAST_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5)
SLOW_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)

Outcome = str
"""``ok``, or the kind of an error."""

Op = Literal["insert", "update", "delete"]
OPS: tuple[Op, ...] = ("insert", "update", "delete")


class Durations:
    """A histogram of seconds: how many observations each bucket got, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one. A bucket's bound belongs to it."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.sum += seconds

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self.counts)


def move(counter: Counter[Any], name: object, to: object) -> None:
    """Count under another name what was counted under one."""
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
        """Count those of another dataset as well."""
        self.seconds.counts = [
            mine + its for mine, its in zip(self.seconds.counts, other.seconds.counts, strict=True)
        ]
        self.seconds.sum += other.seconds.sum
        self.outcomes.update(other.outcomes)

    def answered(self, seconds: float) -> None:
        """One was answered."""
        self.seconds.observe(seconds)
        self.outcomes["ok"] += 1


class Counters:
    """Everything that is counted. The names are those of the metrics."""

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
        """What a dataset is counted under. A name once given stays as long as the dataset has rows, so that no series ever goes back."""
        label = self.labels.get(dataset)
        if label is None:
            if len(self.labels) >= MAX_DATASETS:
                return OTHER
            self.labels[dataset] = label = dataset
        return label

    def shown(self, dataset: str) -> str:
        """What a dataset is counted under, if anything was counted."""
        return self.labels.get(dataset, OTHER)

    def forget(self, dataset: str) -> None:
        """A dataset has gone: its series go, and what they counted is counted under ``OTHER``."""
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
        """The searches of a dataset that is there; ``OTHER`` for names that a client made up."""
        found = self.searches.get(dataset)
        if found is None:
            label = self.label(dataset) if dataset != OTHER else OTHER
            found = self.searches.get(label)
            if found is None:
                self.searches[label] = found = Searches()
        return found

    def applied(self, dataset: str, inserted: int, updated: int, deleted: int) -> None:
        """Rows of one dataset came into its index."""
        label = self.label(dataset)
        if inserted:
            self.deltas_applied[label, "insert"] += inserted
        if updated:
            self.deltas_applied[label, "update"] += updated
        if deleted:
            self.deltas_applied[label, "delete"] += deleted

    def rebuilt(self, dataset: str, reason: str) -> None:
        """A dataset that had been read is read again from its table."""
        self.reasons.add(reason)
        self.rebuilds[self.label(dataset), reason] += 1

    def drifted(self, dataset: str, keys: int) -> None:
        """A verify found keys that differ."""
        self.verify_drift[self.label(dataset)] += keys

    def repaired(self, dataset: str, keys: int) -> None:
        """A verify had keys read again."""
        self.verify_repaired[self.label(dataset)] += keys
