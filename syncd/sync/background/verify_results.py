"""The results of the last verifies: differences in the log, in alerts and counters, and by name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import structlog

from syncd.sync.background.comparison import DatasetReport, Found
from syncd.sync.consumer.progress import Progress
from syncd.sync.registry.alerts import NAMED, named
from syncd.types import DatasetName

logger = structlog.get_logger()


class VerifyResults:
    """The last result for each dataset and each source."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.last: dict[DatasetName, tuple[datetime, bool]] = {}
        """Time of each dataset's last comparison, and whether it was in sync, or was repaired."""
        self.obstacles: dict[int, str] = {}
        """Reasons why sources could not be compared at the last attempt, by id."""

    def remember(self, found: Sequence[Found]) -> None:
        """Keep the result for each dataset."""
        now = datetime.now(UTC)
        compared = [each for each in found if each.report.outcome != "failed"]
        self.last.update(
            {row.dataset: (now, row.in_sync) for each in compared for row in each.datasets}
        )
        known = self.progress.registry.by_name
        self.last = {name: found for name, found in self.last.items() if name in known}

    def note_whole(self, found: Sequence[Found]) -> None:
        """Note sources that were compared as a whole, or could not be compared."""
        for each in found:
            source = each.report.source
            if each.report.outcome == "failed":
                self.obstacles[source.id] = each.report.reason
                continue
            self.obstacles.pop(source.id, None)
            followed = self.progress.sources.get(source.id)
            if followed is not None:
                followed.compared_at = datetime.now(UTC)

    def note(self, found: Sequence[Found]) -> None:
        """Keep the results, and report the differences, before any repair."""
        self.remember(found)
        differing = [
            row for each in found for row in each.datasets if row.missing or row.extra or row.stale
        ]
        if differing:
            self.alert_of_drift(differing)
        for each in found:
            if each.report.outcome == "failed":
                logger.error(
                    "verify_failed", source=each.report.source.name, reason=each.report.reason
                )
        for row in differing:
            self.progress.registry.counters.drifted(
                row.dataset, row.missing + row.extra + row.stale
            )
            logger.error(
                "drift_found",
                dataset=row.dataset,
                missing=row.missing,
                extra=row.extra,
                stale=row.stale,
                sample=row.sample,
            )

    def alert_of_drift(self, differing: Sequence[DatasetReport]) -> None:
        """Alert of datasets that differed from their tables."""
        names = [
            f"{row.dataset} ({row.missing} missing, {row.extra} extra, {row.stale} stale)"
            for row in differing
        ]
        self.progress.registry.alerts.add(
            "drift",
            f"indexes differed from their tables: {named(names)}",
            datasets=[
                {
                    "dataset": row.dataset,
                    "missing": row.missing,
                    "extra": row.extra,
                    "stale": row.stale,
                }
                for row in differing[:NAMED]
            ],
            count=len(differing),
        )
