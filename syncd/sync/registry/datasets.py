"""The known datasets by name: the consumer fills this registry, the RPC looks datasets up in it."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from syncd.errors import NotReady, UnknownDataset, shortened
from syncd.index.dataset import DatasetIndex
from syncd.index.filter.language import Filter
from syncd.index.rows.vectors import Vectors
from syncd.index.view import View
from syncd.postgres.outbox import Cursor
from syncd.postgres.source import Source
from syncd.protocol.messages import SearchParams, WirePosition
from syncd.store.paths import dataset_directory
from syncd.supervision import Tasks
from syncd.sync.registry.alerts import Alerts
from syncd.sync.registry.counters import Counters
from syncd.sync.registry.states import ANSWERING, Condition, Standing
from syncd.types import DatasetName, Key, KeyKind, State, full_dataset_name


class Follower(Protocol):
    """The followed source of a dataset: it applies changes to the dataset's index."""

    cursor: Cursor
    moved_at: float | None
    """Time (``time.monotonic``) when everything that a pass saw was last applied."""

    @property
    def successor(self) -> Follower | None:
        """The follower that replaces this one, after its table was attached again or altered."""

    @property
    def scanning(self) -> bool:
        """Whether the table is being read as a whole."""

    @property
    def lags(self) -> bool:
        """Whether there are known changes that are not applied yet."""

    def condition(self, dataset: Dataset) -> Condition:
        """State of one of its datasets, with the reason."""

    def expected_rows(self, dataset: Dataset) -> int:
        """Approximate number of rows of one of its datasets when all of the table is read."""

    def dataset(self, name: DatasetName) -> Dataset | None:
        """Its dataset of this name, created if necessary; None if another source has one."""

    def empty(self, name: DatasetName) -> Dataset:
        """An empty dataset that answers for a name without rows."""


@dataclass(slots=True, eq=False)
class Dataset:
    """One dataset of one source, with its index."""

    name: DatasetName
    source: Source
    index: DatasetIndex
    follower: Follower
    standing: Standing = field(default_factory=Standing)
    sweeping: bool = False
    replacement: DatasetIndex | None = None
    """The index that is being built to replace ``index``; it gets every change as well."""

    # ``syncd.rpc.searched.Searched``

    @property
    def key_kind(self) -> KeyKind:
        """Kind of its keys."""
        return self.source.key_kind

    @property
    def key_kinds(self) -> list[KeyKind]:
        """Kinds of the columns of a composite key."""
        return self.source.key_kinds

    def look(self) -> tuple[WirePosition, View]:
        """Its position, and then its view: the position is never ahead of the view."""
        position = WirePosition.of(self.follower.cursor.position)
        return position, self.index.view

    def note_queries(
        self, _: SearchParams, queries: Vectors, wanted: Filter | None, own: Key | None
    ) -> None:
        """See ``AskedQueries.note``."""
        self.index.asked.note(queries, wanted, own)

    @property
    def condition(self) -> Condition:
        """Its present state, with the reason."""
        return self.follower.condition(self)

    @property
    def state(self) -> State:
        """Its present state."""
        return self.condition.state

    @property
    def reason(self) -> str:
        """Reason for its state; empty if there is none."""
        return self.condition.reason


class Registry:
    """Datasets by name.

    Only the consumer's task changes it, in a worker thread; iterate over ``listed()``, not over
    ``by_name``.
    """

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.by_name: dict[DatasetName, Dataset] = {}
        self.retired: dict[DatasetName, Follower] = {}
        """Names of datasets without rows and index; see ``syncd.sync.source.emptied``."""
        self.just_retired: list[DatasetName] = []
        """Retired names whose counts are still kept."""
        self.left: list[Path] = []
        """Directories of indexes that are gone.

        Their files are removed as soon as no checkpoint names them.
        """
        self.counters = Counters()
        self.alerts = Alerts()
        self.tasks = Tasks()
        self.quarantined: Counter[tuple[str, str]] = Counter()
        """Rows in quarantine by source and reason, as last reported."""
        self.freed = False
        """Whether a name became free since the consumer last checked.

        Rows of another source may wait for this name.
        """
        self.pending: dict[str, str] = {"syncd": "it is starting"}
        """Sources that are not read to the end, with the reason.

        While there is one, an unknown name may still appear.
        """

    def listed(self) -> list[Dataset]:
        """The present datasets as a list, because a pass may add and remove datasets meanwhile."""
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
        """A dataset in any state.

        Raises ``UnknownDataset``, or ``NotReady`` while the dataset may still appear.
        """
        dataset = self.look_up(full_dataset_name(name))
        if dataset is None:
            if not self.pending:
                raise UnknownDataset(full_dataset_name(name))
            why = "; ".join(f"{source}: {reason}" for source, reason in self.pending.items())
            raise NotReady(
                f"dataset {shortened(full_dataset_name(name))!r} is not known yet ({why})",
                hint="try again in a moment; list the datasets: syncd datasets",
            )
        return dataset

    def look_up(self, name: DatasetName) -> Dataset | None:
        """The dataset of a name, with or without rows; None if the name is unknown."""
        dataset = self.by_name.get(name)
        if dataset is None and (follower := self.retired.get(name)) is not None:
            return follower.empty(name)
        return dataset or self.by_name.get(name)  # another thread may have just created it again

    def create(self, name: DatasetName, source: Source, follower: Follower) -> Dataset:
        """A new, empty dataset in its own directory; ``publish`` lists it."""
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
        """List a dataset under its name; it replaces an older one of this name."""
        self.by_name[dataset.name] = dataset
        self.retired.pop(dataset.name, None)
        self.counters.label(dataset.name)

    def retire(self, dataset: Dataset, follower: Follower) -> None:
        """Forget all but the name of a dataset that has no rows."""
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
        """Move the counts of datasets that are gone to ``OTHER``.

        Called between passes, on the event loop.
        """
        gone, self.just_retired = self.just_retired, []
        for name in gone:
            if name not in self.by_name:
                self.counters.forget(name)

    def remove(self, dataset: Dataset) -> None:
        """Remove a dataset from the list, unless another one is listed under its name."""
        if self.by_name.get(dataset.name) is dataset:
            del self.by_name[dataset.name]
            self.freed = True
