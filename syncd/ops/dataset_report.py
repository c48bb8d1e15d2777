"""The service's part of ``why``: facts about one dataset that only the running process knows."""

from __future__ import annotations

import difflib
import time
from collections.abc import Awaitable, Container, Mapping, Sequence
from typing import Any

from syncd.protocol import messages, status_messages
from syncd.protocol.messages import WirePosition
from syncd.protocol.wire import key_to_wire
from syncd.rpc.methods import Methods
from syncd.rpc.protocol import Method
from syncd.sync.registry.datasets import Dataset
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.rows import NULL_KEY
from syncd.types import DatasetName, full_dataset_name

SAMPLE_KEYS = 3
NEAR_NAMES = 5
IN_PLACE_ROWS = 5000
"""Up to this many quarantined rows are counted on the event loop, in about a millisecond."""
ROWS_PER_NAME = 50
"""Cost of comparing one name with the wanted name, as a number of rows that are counted."""


def why_method(methods: Methods) -> Mapping[str, Method[Any, Any]]:
    """The RPC method by its name."""
    report = DatasetReport(methods)
    return {
        "why": Method(
            messages.WhyParams, status_messages.WhyResult, report.why, "Why a dataset is as it is."
        )
    }


class DatasetReport:
    """The method ``why`` over a running service."""

    def __init__(self, methods: Methods) -> None:
        self.methods = methods

    def why(
        self, params: messages.WhyParams
    ) -> status_messages.WhyResult | Awaitable[status_messages.WhyResult]:
        """Report one dataset in any state.

        A worker thread does it if many rows are to be counted or many names compared.
        """
        consumer = self.methods.consumer
        name = full_dataset_name(params.dataset)
        work = sum(len(followed.quarantine) for followed in consumer.sources.values())
        if name not in consumer.registry.by_name and name not in consumer.registry.retired:
            work += len(consumer.registry.by_name) * ROWS_PER_NAME
        if work > IN_PLACE_ROWS:
            return self.methods.in_thread(lambda: self.report(name))
        return self.report(name)

    def report(self, name: DatasetName) -> status_messages.WhyResult:
        """Answer of ``why``, safe in any thread; an unknown dataset has only near names."""
        consumer, listener = self.methods.consumer, self.methods.listener
        by_name = consumer.registry.by_name
        dataset = consumer.registry.look_up(name)
        followed = None if dataset is None else self.followed(dataset)
        condition = None if dataset is None else dataset.condition
        checkpointer, lost = self.methods.checkpointer, consumer.lost
        return status_messages.WhyResult(
            dataset=name,
            status=None if dataset is None else self.methods.dataset_status(dataset),
            reason="" if condition is None else condition.reason,
            fix="" if condition is None else condition.fix,
            progress=None if followed is None else progress(followed),
            quarantine=self.quarantine({name} if dataset is not None else {name, ""}),
            near=[] if dataset is not None else near_names(name, list(by_name)),
            pending=dict(consumer.registry.pending),
            consumer=consumer.session.consumer,
            connected=consumer.connected,
            database_error="" if lost is None else lost.message,
            database_hint="" if lost is None else lost.hint,
            notifies=consumer.session.notifies,
            listener_connected=listener is not None and listener.connected,
            last_pass_seconds=time.monotonic() - consumer.last_pass_at,
            open_writers=len(consumer.pace.writers),
            checkpoint=status_messages.CheckpointStatus(
                checkpointer.last_success_at, checkpointer.last_seconds, checkpointer.last_error
            ),
        )

    def followed(self, dataset: Dataset) -> FollowedSource | None:
        """The followed source that fills the dataset.

        None for the frozen dataset of a source that is being attached again.
        """
        sources = self.methods.consumer.sources
        return next(
            (followed for followed in sources.values() if followed is dataset.follower), None
        )

    def quarantine(self, names: Container[str]) -> list[status_messages.QuarantineCount]:
        """Quarantined rows of a dataset, by reason, the most frequent reason first.

        All sources count: a source may claim a dataset of another source.
        Rows whose expressions give no dataset have an empty name.
        """
        counts: dict[str, list[Any]] = {}
        for followed in self.methods.consumer.sources.values():
            kind = followed.source.key_kind
            for (
                key,
                row,
            ) in followed.quarantine.copy().items():  # a pass may be changing it in its thread
                if row.dataset in names:
                    found = counts.setdefault(row.reason, [0, []])
                    found[0] += 1
                    if len(found[1]) < SAMPLE_KEYS:
                        found[1].append(
                            str(key) if row.reason == NULL_KEY else key_to_wire(kind, key)
                        )
        by_count = sorted(counts.items(), key=lambda item: -item[1][0])
        return [
            status_messages.QuarantineCount(reason, rows, sample)
            for reason, (rows, sample) in by_count
        ]


def progress(followed: FollowedSource) -> status_messages.SourceProgress:
    """Progress of one followed source."""
    now = time.monotonic()
    unconfirmed, failure = followed.unconfirmed, followed.failure
    return status_messages.SourceProgress(
        source=followed.source.name,
        failure=None if failure is None else str(failure),
        fix="" if failure is None else failure.fix,
        retry_in_seconds=max(followed.retry_at - now, 0.0) if failure is not None else 0.0,
        scanned_rows=None if followed.scan is None else followed.scan.rows,
        moved_seconds=None if followed.moved_at is None else now - followed.moved_at,
        position=WirePosition.of(followed.cursor.position),
        unconfirmed_keys=None if unconfirmed.everything else len(unconfirmed.keys),
    )


def near_names(name: str, names: Sequence[str]) -> list[str]:
    """Names whose part after the project resembles that of ``name``, in any project and case."""
    last = {each: each.partition("/")[2].lower() for each in names}
    wanted = name.partition("/")[2].lower()
    alike = difflib.get_close_matches(wanted, set(last.values()), NEAR_NAMES)
    return sorted(
        (each for each in names if last[each] in alike), key=lambda each: alike.index(last[each])
    )[:NEAR_NAMES]
