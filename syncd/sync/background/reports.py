"""What the consumer tells SQL about itself: the rows behind ``syncd.status`` and ``syncd.quarantine``, at most ten seconds old."""

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
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.quarantined import Quarantined
from syncd.types import DatasetName, Key, State

REPORT_SECONDS = 5.0
MAX_REPORTED_ROWS = 10_000
"""Of a consumer's quarantine: who has more has one problem many times. Each reason in each source is among them, and ``status`` counts them all."""

logger = structlog.get_logger()


DatasetReport = Mapping[DatasetName, tuple[State, int]]
"""State and rows of each dataset."""


class Reporter:
    """Writes what changed since the last report; a quiet system costs one small update."""

    def __init__(self, consumer: Consumer, control: Control) -> None:
        self.consumer = consumer
        self.control = control
        self.datasets: DatasetReport | None = None
        self.opened = 0
        self.quarantine: dict[tuple[int, Key], Quarantined] = {}
        self.quarantined: Counter[DatasetName] = Counter()
        """How many rows of each dataset are in quarantine."""
        self.heartbeat = Heartbeat(consumer)
        self.said = ""
        """Why the last report failed, as it was logged; empty where it did not."""

    async def run(self) -> None:
        """Report every few seconds, until cancelled. A report that fails is not missed: the next one says it all."""
        while True:
            try:
                await self.report()
            except SyncdError as error:
                self.report_failed(error)
            else:
                self.consumer.registry.tasks.well("reporter")
                self.said = ""
            await anyio.sleep(REPORT_SECONDS)

    def report_failed(self, error: SyncdError) -> None:
        """Say so, once for each reason; a lost database is told of elsewhere."""
        self.heartbeat.lost()
        self.datasets = None  # what is there is unknown: write everything again
        self.consumer.task_failed("reporter", error, REPORT_SECONDS)
        reason = str(error)
        say = logger.warning if self.consumer.connected and reason != self.said else logger.debug
        say("report_failed", error=reason, hint=error.hint)
        self.said = reason

    async def report(self) -> None:
        """Write one report; raises ``DatabaseError``."""
        consumer = self.consumer
        name = consumer.settings.consumer
        datasets = {
            dataset.name: (dataset.state, dataset.index.count)
            for dataset in consumer.registry.listed()
        }
        async with consumer.busy:
            sources = consumer.sources
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
        self.quarantined, consumer.registry.quarantined = (
            by_dataset,
            by_reason,
        )  # whole: other threads read them
        position = consumer.oldest_position()
        at = json.dumps({"snapshot": str(position.snapshot), "outbox_id": position.outbox_id})
        async with self.control.transaction() as connection:
            if (
                self.opened != self.control.opened
            ):  # the server may have lost reports since, or be another one
                self.datasets, self.opened = None, self.control.opened
            await connection.execute(
                statement("consumer", "report_consumer"),
                [
                    consumer.state,
                    at,
                    consumer.lag_rows,
                    consumer.lag_seconds,
                    name,
                    consumer.run_id,
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
        """Datasets that are new, changed or gone."""
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
        """Rows that came into quarantine or left it."""
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
    """The rows that are listed: all where there is room, else of each reason in each source as many as of any other, those that came first."""
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
