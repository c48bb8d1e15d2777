"""The datasets that this syncd knows, by name: what the RPC looks up and the consumer fills."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from syncd.errors import NotReady, UnknownDataset, shortened
from syncd.index.dataset import DatasetIndex
from syncd.postgres.outbox import Cursor
from syncd.postgres.source import Source
from syncd.store.paths import dataset_directory
from syncd.supervision import Tasks
from syncd.sync.registry.alerts import Alerts
from syncd.sync.registry.counters import Counters
from syncd.sync.registry.states import ANSWERING, Condition, Standing
from syncd.types import DatasetName, State, full_dataset_name


class Follower(Protocol):
    """What moves a dataset on: its source, as it is being followed."""

    cursor: Cursor
    moved_at: float | None
    """When all was last applied that a pass saw, by ``time.monotonic``."""

    @property
    def successor(self) -> Follower | None:
        """What follows the same table in its place: the table was attached anew, or altered."""

    @property
    def scanning(self) -> bool:
        """Whether the table is being read as a whole."""

    @property
    def lags(self) -> bool:
        """Whether there is more to apply, as far as is known."""

    def condition(self, dataset: Dataset) -> Condition:
        """State of one of its datasets, and the reason."""

    def dataset(self, name: DatasetName) -> Dataset | None:
        """Its dataset of a name, formed now if need be; None where another source formed one before."""

    def empty(self, name: DatasetName) -> Dataset:
        """What answers for a dataset that has no rows any more."""


@dataclass(slots=True, eq=False)
class Dataset:
    """One dataset of one source, and its index."""

    name: DatasetName
    source: Source
    index: DatasetIndex
    follower: Follower
    standing: Standing = field(default_factory=Standing)
    sweeping: bool = False
    replacement: DatasetIndex | None = None
    """The index that is being built to take this one's place; it gets every change as well."""

    @property
    def condition(self) -> Condition:
        """Its state and the reason, as they are now."""
        return self.follower.condition(self)

    @property
    def state(self) -> State:
        """Its state, as it is now."""
        return self.condition.state

    @property
    def reason(self) -> str:
        """Why it is in its state; empty if there is nothing to say."""
        return self.condition.reason


class Registry:
    """Datasets by name. The consumer's task alone changes it, in a worker thread: to go through the datasets, take ``listed``."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.by_name: dict[DatasetName, Dataset] = {}
        self.retired: dict[DatasetName, Follower] = {}
        """Names of datasets that have no rows any more, and no index; see ``syncd.sync.source.emptied``."""
        self.just_retired: list[DatasetName] = []
        """Those whose counts are still kept."""
        self.left: list[Path] = []
        """Directories of indexes that are no longer there; files in them that no checkpoint names are to be removed."""
        self.counters = Counters()
        self.alerts = Alerts()
        self.tasks = Tasks()
        self.quarantined: Counter[tuple[str, str]] = Counter()
        """How many rows of which source are in quarantine for which reason, as last reported."""
        self.freed = False
        """Whether a name has become free since the consumer looked: another source's rows may be waiting for it."""
        self.pending: dict[str, str] = {"syncd": "it is starting"}
        """Sources that are not read to the end, with the reason: while there is one, a name that is missing may still appear."""

    def listed(self) -> list[Dataset]:
        """The datasets of this moment; a pass may add and remove some meanwhile."""
        return list(self.by_name.values())

    def find(self, name: str) -> Dataset:
        """A dataset that answers; raises ``UnknownDataset`` or ``NotReady``."""
        dataset = self.known(name)
        state, reason, _ = dataset.condition
        if state not in ANSWERING:
            why = f": {reason}" if reason else ""
            hint = (
                f"syncd why {dataset.name}"
                if state == "failed"
                else "wait, and watch it with: syncd datasets"
            )
            raise NotReady(f"dataset {dataset.name!r} is {state}{why}", hint=hint)
        return dataset

    def known(self, name: str) -> Dataset:
        """A dataset in any state; raises ``UnknownDataset``, or ``NotReady`` while it may still appear."""
        dataset = self.look_up(full_dataset_name(name))
        if dataset is None:
            if not self.pending:
                raise UnknownDataset(full_dataset_name(name))
            why = "; ".join(f"{source}: {reason}" for source, reason in self.pending.items())
            raise NotReady(
                f"dataset {shortened(full_dataset_name(name))!r} is not known yet ({why})",
                hint="try again in a moment; syncd datasets shows what is there",
            )
        return dataset

    def look_up(self, name: DatasetName) -> Dataset | None:
        """The dataset of a name, with or without rows; None where the name was never seen."""
        dataset = self.by_name.get(name)
        if dataset is None and (follower := self.retired.get(name)) is not None:
            return follower.empty(name)
        return dataset or self.by_name.get(name)  # it may have been formed again just now

    def create(self, name: DatasetName, source: Source, follower: Follower) -> Dataset:
        """A new, empty dataset in a directory of its own; it is not listed before ``publish``."""
        directory = dataset_directory(self.data_dir, name) / secrets.token_hex(4)
        index = DatasetIndex.create(
            directory,
            metric=source.metric,
            key_kind=source.key_kind,
            half=source.half,
            dim=source.dimension,
            name=name,
            columns=source.attached_columns,
        )
        return Dataset(name, source, index, follower)

    def publish(self, dataset: Dataset) -> None:
        """List a dataset under its name, in place of an older one of the same name."""
        self.by_name[dataset.name] = dataset
        self.retired.pop(dataset.name, None)
        self.counters.label(dataset.name)

    def retire(self, dataset: Dataset, follower: Follower) -> None:
        """Know nothing but the name of a dataset that has no rows any more."""
        self.retired[dataset.name] = follower
        if self.by_name.get(dataset.name) is dataset:
            del self.by_name[dataset.name]
        self.just_retired.append(dataset.name)
        directory = dataset.index.capture().directory
        if directory.exists():
            self.left.append(directory)

    def remove_retired(self, name: DatasetName) -> None:
        """Forget the name of a dataset that had no rows."""
        if self.retired.pop(name, None) is not None:
            self.freed = True

    def forget_counts(self) -> None:
        """Count datasets that have gone together with others. Between passes, on the event loop."""
        gone, self.just_retired = self.just_retired, []
        for name in gone:
            if name not in self.by_name:
                self.counters.forget(name)

    def remove(self, dataset: Dataset) -> None:
        """Take a dataset off the list, if it is the one that is listed."""
        if self.by_name.get(dataset.name) is dataset:
            del self.by_name[dataset.name]
            self.freed = True
