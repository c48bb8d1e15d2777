"""The builder: it makes searches fast by codes, merges, measurements and compactions.

It does one thing at a time, in one thread of the lowest priority. Searches and passes never wait
for it: when a build is complete, the index answers with it instead of the previous one.

When there is nothing to build, it checks the vector files that a start had no time to check. It has
a damaged dataset read again from PostgreSQL.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal
from weakref import WeakKeyDictionary

import anyio
import structlog

from syncd.errors import DamagedFile, SyncdError
from syncd.index.build.plan import Plan
from syncd.index.dataset import DatasetIndex
from syncd.index.storage.stopping import Cancelled
from syncd.index.view import View
from syncd.sync.background.checkpoints import Checkpointer
from syncd.sync.background.waiting import Waiting
from syncd.sync.registry.datasets import Dataset, Registry
from syncd.sync.registry.states import ANSWERING
from syncd.types import DatasetName

LOOK_SECONDS = 0.25
"""Time between two looks for work, when there was none."""
CALM = 4
"""The same time grows up to this many times, while looks find no new row and no other query.

A look takes a turn in the builder's thread: four of them a second cost 0.1 % of a core.
"""
LOOK_SECONDS_AT_READING = 0.05
"""The same, while a few datasets are read for the first time: codes are made meanwhile."""
FEW_READ = 100
"""Number of datasets that are a few. To look at 5,000 takes 20 ms of the interpreter."""
RETRY_SECONDS = 60.0
"""Time until the next attempt after a build that failed."""
NICENESS = 19
"""Priority of the builder's thread: the lowest."""
QUERIES_REST = 300.0
"""Seconds between two measurements of recall while other queries keep coming."""
MEASURING_REST = 10.0
"""Rest between two measurements of recall while rows keep coming, in durations of a measurement.

So measuring is at most a tenth of the work.
"""

logger = structlog.get_logger()


class Builder:
    """Builds for the datasets of a registry; ``recall`` is the recall that most searches want.

    ``rebuild`` has a dataset read again from its table.
    """

    def __init__(
        self,
        registry: Registry,
        rebuild: Callable[[DatasetName], Awaitable[object]],
        checkpointer: Checkpointer,
        recall: float,
    ) -> None:
        self.registry = registry
        self.read_again = rebuild
        self.checkpointer = checkpointer
        self.recall = recall
        self.waiting = Waiting(self.searches)
        self.stopping = threading.Event()
        self.content: WeakKeyDictionary[DatasetIndex, View] = WeakKeyDictionary()
        """View of each index for which there was nothing to do."""
        self.looked_at: WeakKeyDictionary[DatasetIndex, View] = WeakKeyDictionary()
        """View of each index at the last look."""
        self.measure_at: WeakKeyDictionary[DatasetIndex, float] = WeakKeyDictionary()
        self.queries_at: WeakKeyDictionary[DatasetIndex, float] = WeakKeyDictionary()
        """Time from which recall is measured again because other queries are asked."""
        self.missed: WeakKeyDictionary[DatasetIndex, bool] = WeakKeyDictionary()
        """Indexes of which it was said that searches miss the recall that most of them want."""
        self.retry_at: WeakKeyDictionary[DatasetIndex, float] = WeakKeyDictionary()
        self.pause_seconds = LOOK_SECONDS
        """Seconds until the next look for work, when the last one found none."""
        self.at_work_on: tuple[DatasetName, int] | None = None
        """Dataset of the build under way, and its rows when it began; None if nothing is built."""

    async def run(self) -> None:
        """Build until cancelled; then the build under way is given up."""
        thread = ThreadPoolExecutor(1, "syncd-build", initializer=be_nice)
        try:
            while True:
                datasets, read = [], []
                for each in self.registry.listed():
                    state = each.state
                    if state in ANSWERING:
                        datasets.append(each)
                    elif state == "backfilling":
                        read.append(each)
                wanted = await asyncio.wrap_future(thread.submit(self.look, datasets, read))
                for dataset, plan in wanted:
                    self.at_work_on = dataset.name, dataset.index.count
                    outcome = await asyncio.wrap_future(
                        thread.submit(self.work, dataset.name, dataset.index, plan)
                    )
                    if outcome == "damaged":
                        await self.rebuild(dataset)
                    elif outcome == "done" and plan is not None and plan.kind == "compact":
                        await self.save()
                if not wanted:
                    self.at_work_on = None
                    self.registry.tasks.well("builder")
                    soon = 0 < len(read) <= FEW_READ
                    await anyio.sleep(LOOK_SECONDS_AT_READING if soon else self.pause_seconds)
        finally:
            self.stopping.set()
            thread.shutdown(wait=False, cancel_futures=True)

    def look(
        self, datasets: list[Dataset], read: list[Dataset]
    ) -> list[tuple[Dataset, Plan | None]]:
        """Next work of each dataset, smallest dataset first; None as the plan: check its files.

        ``read`` are datasets that do not answer yet, because they are being read.
        """
        now = time.monotonic()
        wanted: list[tuple[Dataset, Plan | None]] = []
        self.pause_seconds = min(self.pause_seconds * 2, LOOK_SECONDS * CALM)
        for dataset in read:
            plan = dataset.index.plan_ahead(dataset.follower.expected_rows(dataset))
            if plan is not None and self.retry_at.get(dataset.index, 0.0) <= now:
                wanted.append((dataset, plan))
        for dataset in datasets:
            index, view = dataset.index, dataset.index.view
            resting = self.queries_at.get(index, 0.0) > now
            nothing_new = self.content.get(index) is view and (resting or not index.queries_changed)
            if nothing_new or self.retry_at.get(index, 0.0) > now:
                continue
            self.pause_seconds = LOOK_SECONDS
            self.waiting.cores.look()
            plan = index.plan_build(self.recall, for_queries=not resting)
            grows, self.looked_at[index] = self.looked_at.get(index) is not view, view
            if (
                plan is not None
                and plan.kind == "measure"
                and grows
                and self.measure_at.get(index, 0.0) > now
            ):
                continue
            if plan is not None and self.waiting.waits(dataset.name, index, plan, grows=grows):
                continue
            if plan is not None or not index.verified:
                wanted.append((dataset, plan))
            else:
                self.content[index] = view
        return sorted(wanted, key=lambda each: (each[1] is None, each[0].index.count))

    def searches(self, name: DatasetName) -> int:
        """Number of searches of a dataset so far."""
        found = self.registry.counters.searches.get(self.registry.counters.shown(name))
        return 0 if found is None else found.seconds.count

    def work(
        self, name: DatasetName, index: DatasetIndex, plan: Plan | None
    ) -> Literal["done", "failed", "damaged"]:
        """Do one thing. A failure leaves the index as it is; it is tried again later."""
        begun = time.monotonic()
        self.retry_at[index] = begun + RETRY_SECONDS
        try:
            if plan is None:
                index.scrub(self.stopping.is_set)
                used = True
            else:
                used = index.build(plan, self.stopping.is_set)
        except Cancelled:
            return "failed"
        except DamagedFile as error:
            logger.error("dataset_damaged", dataset=name, reason=str(error))
            return "damaged"
        except SyncdError as error:
            logger.error(
                "build_failed",
                dataset=name,
                what=plan and plan.kind,
                error=str(error),
                hint=error.hint,
            )
            return "failed"
        except Exception:  # an error of FAISS, or too little memory, must not end the service
            logger.exception("build_failed", dataset=name, what=plan and plan.kind)
            return "failed"
        del self.retry_at[index]
        if plan is not None:
            if plan.kind == "measure":
                now = time.monotonic()
                self.measure_at[index] = now + MEASURING_REST * (now - begun)
                if index.recall_of == "queries":
                    self.queries_at[index] = now + max(MEASURING_REST * (now - begun), QUERIES_REST)
                    self.judge(name, index)
            say = logger.info if plan.kind in ("train", "compact") else logger.debug
            say(
                "built",
                dataset=name,
                what=plan.kind,
                rows=index.count,
                seconds=round(time.monotonic() - begun, 2),
            )
        return "done" if used else "failed"

    def judge(self, name: DatasetName, index: DatasetIndex) -> None:
        """Say it, once, if the queries that are asked get less recall than most searches want."""
        try:
            measured = index.measure_reached(10, [self.recall], self.stopping.is_set)
        except Cancelled:
            return
        (reached,) = measured.targets or (None,)
        missed = reached is not None and reached.mean < self.recall
        if reached is not None and missed and not self.missed.get(index):
            recall = round(reached.mean, 3)
            logger.warning("recall_missed", dataset=name, recall=recall, wanted=self.recall)
            self.registry.alerts.add(
                "recall_missed",
                f"searches of {name} find {recall} of the nearest rows instead of {self.recall:g}, "
                f"over {measured.queries} queries that were asked",
                dataset=name,
                recall=recall,
                wanted=self.recall,
            )
        self.missed[index] = missed

    async def rebuild(self, dataset: Dataset) -> None:
        """Have a damaged dataset read from PostgreSQL; the present index answers until then.

        The rebuild goes on after the time-out.
        """
        with anyio.move_on_after(RETRY_SECONDS), contextlib.suppress(SyncdError):
            await self.read_again(dataset.name)

    async def save(self) -> None:
        """Save a checkpoint right after a compaction, so that the old files can be removed."""
        try:
            await self.checkpointer.save()
        except SyncdError as error:
            logger.error("checkpoint_failed", error=str(error), hint=error.hint)


def be_nice() -> None:
    """Give this thread the lowest priority.

    A search on the same core waits at most 0.3 ms for it; at normal priority 4 ms.
    """
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
