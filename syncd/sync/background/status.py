"""Status of the service, of its datasets and of its sources, composed from the parts that know it.

It only reads, and its methods are safe in any thread. The RPC, the page, the metrics and ``why``
present these values; none of them composes a status.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from syncd.postgres.listener import Listener
from syncd.protocol.messages import WirePosition
from syncd.protocol.status_messages import (
    CheckpointStatus,
    DatasetStatus,
    FailingTask,
    QuarantineReason,
    ReaderStatus,
    ServiceStatus,
    SourceProgress,
    VerifyStatus,
    Work,
)
from syncd.sync.background.builder import Builder
from syncd.sync.background.checkpoints import Checkpointer
from syncd.sync.background.verify import Verifier
from syncd.sync.consumer.progress import Progress
from syncd.sync.consumer.session import Session
from syncd.sync.registry.datasets import Dataset
from syncd.sync.source.followed import FollowedSource
from syncd.types import full_dataset_name


class Status:
    """Status of one service since its start."""

    def __init__(
        self,
        progress: Progress,
        session: Session,
        checkpointer: Checkpointer,
        verifier: Verifier,
        builder: Builder,
        listener: Listener,
        *,
        version: str,
    ) -> None:
        self.progress = progress
        self.session = session
        self.checkpointer = checkpointer
        self.verifier = verifier
        self.builder = builder
        self.listener = listener
        self.version = version
        self.recall = session.settings.recall
        self.begun = time.monotonic()
        self.readers: Callable[[], list[ReaderStatus]] = list
        """The running reader processes."""

    def service(self) -> ServiceStatus:
        """Status of the whole service."""
        progress, registry, now = self.progress, self.progress.registry, time.monotonic()
        return ServiceStatus(
            version=self.version,
            consumer=self.session.consumer,
            shard=str(self.session.shard),
            state=progress.state,
            position=WirePosition.of(progress.oldest_position()),
            lag_rows=progress.lag_rows,
            lag_seconds=progress.lag_seconds,
            listener_connected=self.listener.connected,
            checkpoint=self.checkpoint(),
            quarantined=sum(len(followed.quarantine) for followed in progress.sources.values()),
            uptime_seconds=now - self.begun,
            work=self.work(),
            quarantine=[
                QuarantineReason(source, reason, rows)
                for (source, reason), rows in registry.quarantined.most_common()
            ],
            database_error=None if progress.lost is None else progress.lost.message,
            verify=self.verify(),
            readers=self.readers(),
            failing_tasks=[
                FailingTask(each.task, each.error, each.failures, max(each.retry_at - now, 0.0))
                for each in registry.tasks.listed()
            ],
        )

    def datasets(self) -> list[DatasetStatus]:
        """All known datasets, by name, with those that no longer have rows."""
        return sorted([*self.indexed(), *self.emptied()], key=lambda one: one.dataset)

    def indexed(self) -> list[DatasetStatus]:
        """The datasets that have an index, by name."""
        listed = sorted(self.progress.registry.listed(), key=lambda one: one.name)
        return [self.dataset(one) for one in listed]

    def emptied(self) -> list[DatasetStatus]:
        """The datasets that have a name, but no index and no rows."""
        found = []
        for followed in self.progress.sources.values():
            for each in (followed, followed.predecessor):
                names = [] if each is None else list(each.datasets.emptied.names)
                if each is not None and names:
                    one = msgspec.structs.replace(
                        self.dataset(each.empty(names[0])),
                        index="exact",
                        recall=1.0,
                        recall_p5=1.0,
                        recall_of=None,
                        verified_at=None,
                        in_sync=None,
                    )
                    found += [msgspec.structs.replace(one, dataset=name) for name in names]
        return found

    def dataset(self, dataset: Dataset) -> DatasetStatus:
        """Status of one dataset."""
        index = dataset.index
        verified_at, in_sync = self.verifier.results.last.get(dataset.name, (None, None))
        return DatasetStatus(
            dataset=dataset.name,
            source=dataset.source.name,
            state=dataset.state,
            count=index.count,
            tombstones=index.tombstones,
            dim=index.dim,
            metric=dataset.source.metric,
            index=index.kind(self.recall),
            recall=None if index.dim is None else index.recall(self.recall),
            recall_p5=None if index.dim is None else index.recall_p5(self.recall),
            recall_of=index.recall_of,
            verified=index.verified,
            bytes=index.bytes_memory + index.bytes_disk,
            bytes_memory=index.bytes_memory,
            lag_seconds=self.lag_seconds(dataset),
            verified_at=verified_at,
            in_sync=in_sync,
        )

    def lag_seconds(self, dataset: Dataset) -> float:
        """Seconds since the last completed pass over this dataset's source.

        0 if no change of the source waits and the database answers.
        """
        if self.progress.is_answered and not dataset.follower.lags:
            return 0.0
        return self.progress.behind(dataset.follower)

    def lag_rows(self, dataset: str) -> int:
        """Upper bound of the outbox rows that this dataset has not seen; 0 for an unknown one."""
        found = self.progress.registry.by_name.get(full_dataset_name(dataset))
        if found is None or not found.follower.lags:
            return 0
        return max(self.progress.newest_outbox_id - found.follower.cursor.position.outbox_id, 0)

    def checkpoint(self) -> CheckpointStatus:
        """The last checkpoint."""
        saved = self.checkpointer
        return CheckpointStatus(saved.last_success_at, saved.last_seconds, saved.last_error)

    def verify(self) -> VerifyStatus:
        """The verify in the background."""
        found = self.verifier.overdue
        return VerifyStatus(found.at, self.session.settings.verify_seconds, found.reason)

    def work(self) -> list[Work]:
        """Tables that are read or compared as a whole now, and the dataset that is built now."""
        found = []
        for followed in self.progress.sources.values():
            scan = followed.scan
            if scan is not None:
                rows, expected = scan.rows, scan.expected or 0
                if scan.beside and scan.only is not None:
                    found.append(Work("rebuilding", ", ".join(scan.only), rows, expected))
                else:
                    found.append(Work("reading", followed.source.name, rows, expected))
        compared = self.verifier.compared
        if compared is not None:
            found.append(Work("verifying", "", compared, self.verifier.expected))
        if self.builder.at_work_on is not None:
            found.append(Work("building", *self.builder.at_work_on, 0))
        return found


def source_progress(followed: FollowedSource) -> SourceProgress:
    """Progress of one followed source."""
    now = time.monotonic()
    unconfirmed, failure = followed.unconfirmed, followed.failure
    return SourceProgress(
        source=followed.source.name,
        failure=None if failure is None else str(failure),
        fix="" if failure is None else failure.fix,
        retry_in_seconds=max(followed.retry_at - now, 0.0) if failure is not None else 0.0,
        scanned_rows=None if followed.scan is None else followed.scan.rows,
        moved_seconds=None if followed.moved_at is None else now - followed.moved_at,
        position=WirePosition.of(followed.cursor.position),
        unconfirmed_keys=None if unconfirmed.everything else len(unconfirmed.keys),
    )
