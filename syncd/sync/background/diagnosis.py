"""Why a dataset is in its state: facts that only the running process knows."""

from __future__ import annotations

import difflib
import time
from collections.abc import Container, Sequence
from typing import Any

from syncd.protocol.status_messages import QuarantineCount, WhyResult
from syncd.protocol.wire import key_to_wire
from syncd.sync.background.status import Status, source_progress
from syncd.sync.registry.datasets import Dataset
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.rows import NULL_KEY
from syncd.types import DatasetName

SAMPLE_KEYS = 3
NEAR_NAMES = 5
ROWS_PER_NAME = 50
"""Cost of comparing one name with the wanted name, as a number of rows that are counted."""


class Diagnosis:
    """The answer of ``why``, from the status of the service."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def cost(self, name: DatasetName) -> int:
        """Number of quarantined rows to count; a comparison of names counts as rows too."""
        registry = self.status.progress.registry
        rows = sum(len(one.quarantine) for one in self.status.progress.sources.values())
        if name not in registry.by_name and name not in registry.retired:
            rows += len(registry.by_name) * ROWS_PER_NAME
        return rows

    def of(self, name: DatasetName) -> WhyResult:
        """Answer of ``why``, safe in any thread; an unknown dataset has only near names."""
        progress, session = self.status.progress, self.status.session
        registry, lost = progress.registry, progress.lost
        dataset = registry.look_up(name)
        followed = None if dataset is None else self.followed(dataset)
        condition = None if dataset is None else dataset.condition
        return WhyResult(
            dataset=name,
            status=None if dataset is None else self.status.dataset(dataset),
            reason="" if condition is None else condition.reason,
            fix="" if condition is None else condition.fix,
            progress=None if followed is None else source_progress(followed),
            quarantine=self.quarantine({name} if dataset is not None else {name, ""}),
            near=[] if dataset is not None else near_names(name, list(registry.by_name)),
            pending=dict(registry.pending),
            consumer=session.consumer,
            connected=progress.connected,
            database_error="" if lost is None else lost.message,
            database_hint="" if lost is None else lost.hint,
            notifies=session.notifies,
            listener_connected=self.status.listener.connected,
            last_pass_seconds=time.monotonic() - progress.last_pass_at,
            open_writers=len(progress.pace.writers),
            checkpoint=self.status.checkpoint(),
        )

    def followed(self, dataset: Dataset) -> FollowedSource | None:
        """The followed source that fills the dataset.

        None for the frozen dataset of a source that is being attached again.
        """
        sources = self.status.progress.sources
        return next(
            (followed for followed in sources.values() if followed is dataset.follower), None
        )

    def quarantine(self, names: Container[str]) -> list[QuarantineCount]:
        """Quarantined rows of a dataset, by reason, the most frequent reason first.

        All sources count: a source may claim a dataset of another source.
        Rows whose expressions give no dataset have an empty name.
        """
        counts: dict[str, list[Any]] = {}
        for followed in self.status.progress.sources.values():
            kind = followed.source.key_kind
            # A copy: a pass may change the original in its thread.
            for key, row in followed.quarantine.copy().items():
                if row.dataset in names:
                    found = counts.setdefault(row.reason, [0, []])
                    found[0] += 1
                    if len(found[1]) < SAMPLE_KEYS:
                        found[1].append(
                            str(key) if row.reason == NULL_KEY else key_to_wire(kind, key)
                        )
        by_count = sorted(counts.items(), key=lambda item: -item[1][0])
        return [QuarantineCount(reason, rows, sample) for reason, (rows, sample) in by_count]


def near_names(name: str, names: Sequence[str]) -> list[str]:
    """Names whose part after the project resembles that of ``name``, in any project and case."""
    last = {each: each.partition("/")[2].lower() for each in names}
    wanted = name.partition("/")[2].lower()
    alike = difflib.get_close_matches(wanted, set(last.values()), NEAR_NAMES)
    return sorted(
        (each for each in names if last[each] in alike), key=lambda each: alike.index(last[each])
    )[:NEAR_NAMES]
