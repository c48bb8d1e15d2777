"""The reporter: it writes the rows behind the views ``syncd.status`` and ``syncd.quarantine``.

They are at most ten seconds old.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

import anyio
import psycopg
import structlog

from syncd.errors import SyncdError
from syncd.postgres.control import Control
from syncd.statements import statement
from syncd.sync.background.heartbeat import Heartbeat
from syncd.sync.consumer.progress import Progress
from syncd.sync.consumer.session import Session
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.quarantined import Quarantined
from syncd.types import DatasetName, Key, State

REPORT_SECONDS = 5.0
"""Time between two reports."""
MAX_REPORTED_ROWS = 10_000
"""Largest number of quarantined rows that a consumer lists.

More rows than that have one problem many times. Each reason in each source is listed, and
``status`` counts all rows.
"""

logger = structlog.get_logger()


DatasetReport = Mapping[DatasetName, tuple[State, int]]
"""State and number of rows of each dataset."""


class Reporter:
    """Writes the changes since the last report; an idle system costs one small update."""

    def __init__(self, progress: Progress, session: Session, control: Control) -> None:
        self.progress = progress
        self.session = session
        self.control = control
        self.datasets: DatasetReport | None = None
        self.opened = 0
        self.quarantine: dict[tuple[int, Key], Quarantined] = {}
        self.quarantined: Counter[DatasetName] = Counter()
        """Number of rows of each dataset that are in quarantine."""
        self.heartbeat = Heartbeat(progress, session)
        self.said = ""
        """Logged reason why the last report failed; empty if it did not fail."""

    async def run(self) -> None:
        """Report every few seconds, until cancelled. The report after a failed one is complete."""
        while True:
            try:
                await self.report()
            except SyncdError as error:
                self.report_failed(error)
            else:
                self.progress.registry.tasks.well("reporter")
                self.said = ""
            await anyio.sleep(REPORT_SECONDS)

    def report_failed(self, error: SyncdError) -> None:
        """Log a failure, once per reason; other code reports a lost database."""
        self.heartbeat.lost()
        self.datasets = None  # the rows in the database are unknown: write all of them again
        self.progress.task_failed("reporter", error, REPORT_SECONDS)
        reason = str(error)
        say = logger.warning if self.progress.connected and reason != self.said else logger.debug
        say("report_failed", error=reason, hint=error.hint)
        self.said = reason

    async def report(self) -> None:
        """Write one report; raises ``DatabaseError``."""
        progress = self.progress
        name = self.session.consumer
        datasets = {
            dataset.name: (dataset.state, dataset.index.count)
            for dataset in progress.registry.listed()
        }
        async with progress.busy:
            sources = progress.sources
            counts = Counter(
                (source_id, row.dataset, row.reason)
                for source_id, followed in sources.items()
                for row in followed.quarantine.values()
            )
            quarantine = listed(sources, counts)
        by_dataset: Counter[DatasetName] = Counter()
        by_reason: Counter[tuple[str, str]] = Counter()
        for (source_id, dataset, reason), rows in counts.items():
            by_dataset[dataset] += rows
            by_reason[sources[source_id].source.name, reason] += rows
        # replaced as a whole, because other threads read them
        self.quarantined, progress.registry.quarantined = by_dataset, by_reason
        position = progress.oldest_position()
        at = json.dumps({"snapshot": str(position.snapshot), "outbox_id": position.outbox_id})
        async with self.control.transaction() as connection:
            if self.opened != self.control.opened:  # the server may have lost reports, or changed
                self.datasets, self.opened = None, self.control.opened
            await connection.execute(
                statement("consumer", "report_consumer"),
                [
                    progress.state,
                    at,
                    progress.lag_rows,
                    progress.lag_seconds,
                    name,
                    self.session.run_id,
                ],
            )
            await self.report_datasets(connection, name, datasets)
            await self.report_quarantine(connection, name, quarantine)
            row = await (
                await connection.execute(statement("consumer", "read_heartbeat_xid"))
            ).fetchone()
        if row is not None:
            self.heartbeat.sent(int(row[0]))
        self.datasets, self.quarantine = datasets, quarantine

    async def report_datasets(
        self, connection: psycopg.AsyncConnection, consumer: str, datasets: DatasetReport
    ) -> None:
        """Write datasets that are new or changed, and delete those that are gone."""
        before = self.datasets
        if before is None:
            await connection.execute(
                statement("consumer", "forget_dataset_reports"), [consumer, list(datasets)]
            )
        elif gone := [[consumer, dataset] for dataset in before.keys() - datasets.keys()]:
            await connection.cursor().executemany(
                statement("consumer", "forget_dataset_report"), gone
            )
        changed = [
            [consumer, dataset, state, rows]
            for dataset, (state, rows) in datasets.items()
            if before is None or before.get(dataset) != (state, rows)
        ]
        if changed:
            await connection.cursor().executemany(statement("consumer", "report_dataset"), changed)

    async def report_quarantine(
        self,
        connection: psycopg.AsyncConnection,
        consumer: str,
        quarantine: dict[tuple[int, Key], Quarantined],
    ) -> None:
        """Write rows that came into quarantine, and delete those that left it."""
        before = self.quarantine
        if self.datasets is None:
            await connection.execute(statement("consumer", "forget_all_quarantined"), [consumer])
            before = {}
        gone = [[consumer, source, str(key)] for source, key in before.keys() - quarantine.keys()]
        if gone:
            await connection.cursor().executemany(statement("consumer", "forget_quarantined"), gone)
        new = [
            [consumer, source, row.dataset, str(key), row.reason, row.since]
            for (source, key), row in quarantine.items()
            if before.get((source, key)) != row
        ]
        if new:
            await connection.cursor().executemany(statement("consumer", "report_quarantined"), new)


def listed(
    sources: Mapping[int, FollowedSource], counts: Counter[tuple[int, DatasetName, str]]
) -> dict[tuple[int, Key], Quarantined]:
    """The rows to list: all of them if they fit.

    Otherwise each reason in each source gets an equal share, filled with its oldest rows.
    """
    sizes: Counter[tuple[int, str]] = Counter()
    for (source_id, _, reason), rows in counts.items():
        sizes[source_id, reason] += rows
    left, shares = MAX_REPORTED_ROWS, {}
    for place, (group, size) in enumerate(sorted(sizes.items(), key=lambda item: item[1])):
        shares[group] = min(size, left // (len(sizes) - place))
        left -= shares[group]
    found: dict[tuple[int, Key], Quarantined] = {}
    wanted = MAX_REPORTED_ROWS - left
    for source_id, followed in sources.items():
        for key, row in followed.quarantine.items():
            if len(found) == wanted:
                return found
            if shares[source_id, row.reason]:
                shares[source_id, row.reason] -= 1
                found[source_id, key] = row
    return found
