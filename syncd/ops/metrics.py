"""All metrics: name, meaning, and source of the number.

Nothing is stored here: a scrape reads ``Counters`` and the parts' own attributes. So the code that
does the work knows nothing of Prometheus, and no path can forget a number. Datasets beyond the
first ``MAX_DATASETS`` are shown together as ``other``.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from syncd.ops.parts import Parts
from syncd.protocol.status_messages import DatasetStatus
from syncd.sync.registry.counters import OTHER, Durations, Searches
from syncd.types import DatasetName

GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "syncd_build_info": ("1, with the version.", ("version", "python", "consumer")),
    "syncd_lag_seconds": (
        "Seconds since the last completed pass while changes wait, otherwise 0.",
        ("dataset",),
    ),
    "syncd_lag_rows": ("Outbox rows that wait, at most.", ("dataset",)),
    "syncd_index_vectors": ("Rows that a search can find.", ("dataset",)),
    "syncd_index_tombstones": (
        "Entries of the index whose row was updated or deleted.",
        ("dataset",),
    ),
    "syncd_index_bytes": ("Memory and files of the index.", ("dataset",)),
    "syncd_index_recall": (
        "Recall at 10 that searches reach; 1 if they are exact.",
        ("dataset",),
    ),
    "syncd_index_recall_p5": (
        "The 5th percentile of the recall of single searches; 1 if they are exact.",
        ("dataset",),
    ),
    "syncd_checkpoint_last_success_timestamp_seconds": ("When the last checkpoint was saved.", ()),
    "syncd_listener_connected": ("1 while the listener is connected.", ()),
    "syncd_readers": ("Processes that answer searches beside the main process.", ()),
    "syncd_outbox_rows": ("Rows that the outbox keeps, at most.", ()),
    "syncd_quarantined": ("Live rows whose vector cannot be indexed.", ("dataset",)),
    "syncd_verify_last_success_timestamp_seconds": (
        "When every index was last compared with its table.",
        (),
    ),
}
COUNTERS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "syncd_deltas_applied_total": ("Changes applied to the index.", ("dataset", "op")),
    "syncd_searches_total": (
        "Searches; the outcome is ok or the kind of the error.",
        ("dataset", "outcome"),
    ),
    "syncd_checkpoint_failures_total": ("Checkpoints that could not be saved.", ()),
    "syncd_task_failures_total": (
        "Errors of a background task, which is started again.",
        ("task",),
    ),
    "syncd_reader_restarts_total": ("Readers that ended and were started again.", ()),
    "syncd_listener_reconnects_total": ("Lost connections of the listener.", ()),
    "syncd_wakeups_total": ("Wake-ups of the consumer, by their cause.", ("source",)),
    "syncd_verify_drift_total": (
        "Keys that differed from their table when they were compared.",
        ("dataset",),
    ),
    "syncd_repaired_total": ("Keys read again because they differed.", ("dataset",)),
    "syncd_rebuilds_total": (
        "Times that an existing dataset was read again as a whole.",
        ("dataset", "reason"),
    ),
}
HISTOGRAMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "syncd_apply_seconds": ("Seconds to apply the rows of one read to the index.", ()),
    "syncd_search_seconds": (
        "Seconds of answered searches, without the transfer to the client.",
        ("dataset",),
    ),
    "syncd_checkpoint_seconds": ("Seconds to save a checkpoint.", ()),
    "syncd_verify_seconds": ("Seconds to compare indexes with their tables.", ()),
}

Labels = tuple[str, ...]


class Metrics(Collector):
    """The service's metrics for Prometheus, in their own registry."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def render(self) -> bytes:
        """All metrics as text, for a worker thread: ten thousand series take a while."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """All families of metrics."""
        counters = self.parts.counters
        yield from self.gauges()
        known: dict[Labels, float] = {
            (counters.shown(one.name),): 0 for one in self.parts.consumer.registry.listed()
        }
        yield counter("syncd_deltas_applied_total", dict(counters.deltas_applied).items())
        yield counter("syncd_searches_total", self.outcomes().items())
        yield counter("syncd_checkpoint_failures_total", [((), counters.checkpoint_failures)])
        failures = dict(self.parts.consumer.registry.tasks.failures)
        yield counter(
            "syncd_task_failures_total",
            {(task,): number for task, number in failures.items()}.items(),
        )
        readers = self.parts.readers
        yield counter(
            "syncd_reader_restarts_total", [((), 0 if readers is None else readers.seats.restarts)]
        )
        yield counter("syncd_listener_reconnects_total", [((), self.parts.listener.reconnects)])
        yield counter(
            "syncd_wakeups_total",
            [((source,), n) for source, n in self.parts.consumer.wake.counts.items()],
        )
        # A series that begins with its first drift shows no increase: these series begin at 0.
        yield counter(
            "syncd_verify_drift_total",
            (known | {(one,): n for one, n in dict(counters.verify_drift).items()}).items(),
        )
        yield counter(
            "syncd_repaired_total",
            (known | {(one,): n for one, n in dict(counters.verify_repaired).items()}).items(),
        )
        yield counter("syncd_rebuilds_total", dict(counters.rebuilds).items())
        yield histogram("syncd_apply_seconds", {(): counters.apply_seconds})
        yield histogram(
            "syncd_search_seconds", {(one,): each.seconds for one, each in self.searches().items()}
        )
        yield histogram("syncd_checkpoint_seconds", {(): counters.checkpoint_seconds})
        yield histogram("syncd_verify_seconds", {(): counters.verify_seconds})

    def gauges(self) -> Iterator[Metric]:
        """The gauges."""
        parts = self.parts
        yield gauge(
            "syncd_build_info",
            {(parts.status.version, platform.python_version(), parts.settings.consumer): 1},
        )
        listed = parts.status.indexed()
        yield self.by_dataset("syncd_lag_seconds", listed, max, lambda one: one.lag_seconds)
        yield self.by_dataset(
            "syncd_lag_rows", listed, max, lambda one: parts.status.lag_rows(one.dataset)
        )
        yield self.by_dataset("syncd_index_vectors", listed, sum, lambda one: one.count)
        yield self.by_dataset("syncd_index_tombstones", listed, sum, lambda one: one.tombstones)
        yield self.by_dataset("syncd_index_bytes", listed, sum, lambda one: one.bytes)
        measured = [one for one in listed if one.recall is not None]
        yield self.by_dataset("syncd_index_recall", measured, min, lambda one: one.recall or 0.0)
        measured = [one for one in listed if one.recall_p5 is not None]
        yield self.by_dataset(
            "syncd_index_recall_p5", measured, min, lambda one: one.recall_p5 or 0.0
        )
        yield gauge("syncd_quarantined", self.quarantined(listed, parts.reporter.quarantined))
        yield gauge(
            "syncd_checkpoint_last_success_timestamp_seconds",
            when(parts.checkpointer.last_success_at),
        )
        yield gauge(
            "syncd_verify_last_success_timestamp_seconds", when(parts.verifier.last_success_at)
        )
        yield gauge("syncd_listener_connected", {(): int(parts.listener.connected)})
        yield gauge(
            "syncd_readers", {(): 0 if parts.readers is None else parts.readers.seats.count_ready()}
        )
        outbox_rows = parts.rotator.outbox_rows
        yield gauge("syncd_outbox_rows", {} if outbox_rows is None else {(): outbox_rows})

    def quarantined(
        self, listed: Iterable[DatasetStatus], rows: Mapping[DatasetName, int]
    ) -> dict[Labels, float]:
        """Rows in quarantine by label, 0 for a dataset without any.

        Rows of datasets without indexed rows count under ``OTHER``.
        """
        values: dict[Labels, float] = {
            (self.parts.counters.shown(one.dataset),): 0 for one in listed
        }
        for name, number in list(rows.items()):
            if name:
                label = self.parts.counters.shown(name)
                values[label,] = values.get((label,), 0) + number
        return values

    def by_dataset(
        self,
        name: str,
        listed: Iterable[DatasetStatus],
        together: Callable[[Iterable[float]], float],
        value: Callable[[DatasetStatus], float],
    ) -> Metric:
        """A gauge per dataset, and one for the datasets without their own label."""
        values: dict[Labels, float] = {}
        others: list[float] = []
        for one in listed:
            label = self.parts.counters.shown(one.dataset)
            if label == OTHER:
                others.append(value(one))
            else:
                values[label,] = value(one)
        if others:
            values[OTHER,] = together(others)
        return gauge(name, values)

    def searches(self) -> dict[str, Searches]:
        """Counted searches by label."""
        return dict(self.parts.counters.searches)

    def outcomes(self) -> dict[Labels, int]:
        """Searches by label and outcome."""
        return {
            (label, outcome): number
            for label, each in self.searches().items()
            for outcome, number in dict(each.outcomes).items()
        }


def when(at: datetime | None) -> dict[Labels, float]:
    """A time as seconds, if there is one: 0 would be an age of half a century."""
    return {} if at is None else {(): at.timestamp()}


def gauge(name: str, values: Mapping[Labels, float]) -> Metric:
    """A family of gauges."""
    text, labels = GAUGES[name]
    family = GaugeMetricFamily(name, text, labels=labels)
    for given, value in values.items():
        family.add_metric(given, value)
    return family


def counter(name: str, values: Iterable[tuple[Labels, float]]) -> Metric:
    """A family of counters."""
    text, labels = COUNTERS[name]
    family = CounterMetricFamily(name.removesuffix("_total"), text, labels=labels)
    for given, value in values:
        family.add_metric(given, value)
    return family


def histogram(name: str, values: Mapping[Labels, Durations]) -> Metric:
    """A family of histograms."""
    text, labels = HISTOGRAMS[name]
    family = HistogramMetricFamily(name, text, labels=labels)
    for given, seconds in values.items():
        family.add_metric(given, buckets(seconds), seconds.sum)
    return family


def buckets(seconds: Durations) -> list[tuple[str, float]]:
    """Cumulative counts by upper bound, as the text format needs them."""
    total, found = 0, []
    for bound, count in zip((*map(str, seconds.bounds), "+Inf"), list(seconds.counts), strict=True):
        total += count
        found.append((bound, float(total)))
    return found
