"""Which builds wait: while writers keep all cores busy, new rows stay longer without codes.

Encoding takes cores from the writers, or would go on for long at the lowest priority. Without it
each search compares more rows, so a build does not wait if the dataset is searched. Invariant: a
tail that waits is bounded (``may_wait``), and is built at the next look that finds no new row.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from weakref import WeakKeyDictionary

from syncd.index.build.plan import Plan, may_wait
from syncd.index.dataset import DatasetIndex
from syncd.types import DatasetName

FREE_CORES = 1.5
"""Writers keep the cores busy if fewer cores than this are left to builds, which would use one.

The lowest priority of the builder's thread does not help other programs if the kernel shares the
cores out to sessions or services first (sched_autogroup, systemd): it took 0.6 of two cores from
eight writers.
"""
FREE_SHARE = 0.75
"""The same as a share of all cores: a single core that is idle is not kept busy."""
LEAST_SECONDS = 0.1
"""Shortest time over which that is measured: the system counts in steps of 10 ms."""
WAITING_SEARCHES = 100
"""Searches of a dataset during which a build waits.

To encode a row takes as long as to compare it with 150 queries (768 dimensions).
"""
STAT = Path("/proc/stat")


class Waiting:
    """Decides for each build; ``searches`` returns the number of searches of a dataset so far."""

    def __init__(self, searches: Callable[[DatasetName], int]) -> None:
        self.searches = searches
        self.cores = Cores()
        self.begun: WeakKeyDictionary[DatasetIndex, int] = WeakKeyDictionary()
        """Number of searches of each index when its build began to wait."""

    def waits(self, name: DatasetName, index: DatasetIndex, plan: Plan, *, grows: bool) -> bool:
        """Whether ``plan`` waits now; ``grows`` says whether rows came since the last look."""
        if grows and self.cores.busy and may_wait(index.view, plan):
            searches = self.searches(name)
            if searches - self.begun.setdefault(index, searches) <= WAITING_SEARCHES:
                return True
        self.begun.pop(index, None)
        return False


class Cores:
    """How busy the cores of this machine are, apart from builds. One thread looks, and builds."""

    def __init__(self, stat: Path = STAT) -> None:
        self.stat = stat
        self.looked_at = -math.inf
        self.free_seconds: float | None = None
        """Seconds of all cores that were left to builds, up to the last look; None if unknown."""
        self.least_free = min(FREE_CORES, FREE_SHARE * (os.cpu_count() or 1))
        """Number of free cores below which the cores are busy."""
        self.busy = False
        """Whether little was left to builds between the last two looks."""

    def look(self) -> None:
        """Compare with the last look."""
        now = time.monotonic()
        if now - self.looked_at < LEAST_SECONDS:
            return
        before, self.free_seconds = self.free_seconds, self.read()
        self.busy = (
            before is not None
            and self.free_seconds is not None
            and self.free_seconds - before < self.least_free * (now - self.looked_at)
        )
        self.looked_at = now

    def read(self) -> float | None:
        """``free_seconds``, now: the idle seconds and those of this thread.

        None if unknown: only Linux reports it (proc(5)), and some sandboxes report zeros. The time
        of other programs of a low priority counts as taken.
        """
        try:
            with self.stat.open(encoding="ascii") as file:
                name, _user, _nice, _system, idle, waiting, *_ = file.readline().split()
            ticks = int(idle) + int(waiting)
        except (OSError, ValueError):
            return None
        if name != "cpu" or not ticks:
            return None
        return ticks / os.sysconf("SC_CLK_TCK") + time.thread_time()
