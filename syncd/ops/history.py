"""The last hour in memory: one sample every ten seconds, for the charts of the status page."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from itertools import accumulate

import anyio

from syncd.ops.parts import Parts
from syncd.sync.registry.counters import FAST_SECONDS

SAMPLE_SECONDS = 10.0
SAMPLES = 360


@dataclass(frozen=True, slots=True)
class Sample:
    """Rates and latencies of ten seconds. Latencies are None if there was no search."""

    at: float
    lag_seconds: float
    applied_per_second: float
    searches_per_second: float
    p50_seconds: float | None
    p99_seconds: float | None


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters at one moment."""

    at: float
    applied: int
    search_counts: tuple[int, ...]


class History:
    """Samples, the oldest first."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.samples: deque[Sample] = deque(maxlen=SAMPLES)
        self.before = self.totals()

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await anyio.sleep(SAMPLE_SECONDS)
            self.sample()
            self.parts.consumer.registry.tasks.well("history")

    def sample(self) -> None:
        """Add a sample of the time since the previous sample."""
        before, now = self.before, self.totals()
        seconds = max(now.at - before.at, 1e-9)
        counts = [
            new - old for new, old in zip(now.search_counts, before.search_counts, strict=True)
        ]
        self.samples.append(
            Sample(
                at=time.time(),
                lag_seconds=self.parts.consumer.lag_seconds,
                applied_per_second=(now.applied - before.applied) / seconds,
                searches_per_second=sum(counts) / seconds,
                p50_seconds=quantile(counts, 0.5),
                p99_seconds=quantile(counts, 0.99),
            )
        )
        self.before = now

    def totals(self) -> Totals:
        """The counters now."""
        counters = self.parts.counters
        counts = [0] * (len(FAST_SECONDS) + 1)
        for each in counters.searches.values():
            for place, count in enumerate(each.seconds.counts):
                counts[place] += count
        return Totals(time.monotonic(), counters.deltas_applied.total(), tuple(counts))


def quantile(counts: list[int], share: float) -> float | None:
    """A quantile of searches counted in buckets, in seconds; None without any search.

    It is interpolated linearly within the bucket, as Prometheus does it.
    """
    total = sum(counts)
    if not total:
        return None
    rank = share * total
    place = next(i for i, up_to in enumerate(accumulate(counts)) if up_to >= rank and counts[i])
    bounds = FAST_SECONDS
    if place == len(bounds):
        return bounds[-1]
    lower = bounds[place - 1] if place else 0.0
    return lower + (bounds[place] - lower) * (rank - sum(counts[:place])) / counts[place]
