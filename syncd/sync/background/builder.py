"""Builds what makes searches fast, beside everything else and one thing at a time: codes, merges, measurements, compactions.

In one thread of the lowest priority. Searches and passes never wait for it; it only ever gives an index something to answer with instead of what
it has. When there is nothing to build it reads the vector files that a start was too short for, and has a damaged dataset read again from Postgres.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
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
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.registry.datasets import Dataset
from syncd.sync.registry.states import ANSWERING
from syncd.types import DatasetName

LOOK_SECONDS = 0.25
RETRY_SECONDS = 60.0
"""After something could not be built."""
NICENESS = 19
MEASURING_REST = 10.0
"""While rows keep coming, recall is measured again after so many times as long as that took: it is a tenth of the work at most."""

logger = structlog.get_logger()


class Builder:
    """See the module. ``recall`` is what most searches want."""

    def __init__(self, consumer: Consumer, checkpointer: Checkpointer, recall: float) -> None:
        self.consumer = consumer
        self.checkpointer = checkpointer
        self.recall = recall
        self.stopping = threading.Event()
        self.content: WeakKeyDictionary[DatasetIndex, View] = WeakKeyDictionary()
        """Views for which there was nothing to do."""
        self.looked_at: WeakKeyDictionary[DatasetIndex, View] = WeakKeyDictionary()
        """The view that each index had at the last look."""
        self.measure_at: WeakKeyDictionary[DatasetIndex, float] = WeakKeyDictionary()
        self.retry_at: WeakKeyDictionary[DatasetIndex, float] = WeakKeyDictionary()
        self.at_work_on: tuple[DatasetName, int] | None = None
        """The dataset that something is built for, and its rows when that began; None once a look has found nothing to do."""

    async def run(self) -> None:
        """Build what is wanted until cancelled; then what is under way is given up."""
        thread = ThreadPoolExecutor(1, "syncd-build", initializer=be_nice)
        try:
            while True:
                datasets = [
                    each for each in self.consumer.registry.listed() if each.state in ANSWERING
                ]
                wanted = await asyncio.wrap_future(thread.submit(self.look, datasets))
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
                    self.consumer.registry.tasks.well("builder")
                    await anyio.sleep(LOOK_SECONDS)
        finally:
            self.stopping.set()
            thread.shutdown(wait=False, cancel_futures=True)

    def look(self, datasets: list[Dataset]) -> list[tuple[Dataset, Plan | None]]:
        """What each dataset wants next, the smallest first; where that is no plan, its files are to be checked."""
        now = time.monotonic()
        wanted: list[tuple[Dataset, Plan | None]] = []
        for dataset in datasets:
            index, view = dataset.index, dataset.index.view
            if self.content.get(index) is view or self.retry_at.get(index, 0.0) > now:
                continue
            plan = index.plan_build(self.recall)
            grows, self.looked_at[index] = self.looked_at.get(index) is not view, view
            if (
                plan is not None
                and plan.kind == "measure"
                and grows
                and self.measure_at.get(index, 0.0) > now
            ):
                continue
            if plan is not None or not index.verified:
                wanted.append((dataset, plan))
            else:
                self.content[index] = view
        return sorted(wanted, key=lambda each: (each[1] is None, each[0].index.count))

    def work(
        self, name: DatasetName, index: DatasetIndex, plan: Plan | None
    ) -> Literal["done", "failed", "damaged"]:
        """Do one thing. What fails leaves the index as it is, and is tried again after a while."""
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
        except Exception:  # what FAISS or the memory refuses must not end the service
            logger.exception("build_failed", dataset=name, what=plan and plan.kind)
            return "failed"
        del self.retry_at[index]
        if plan is not None:
            if plan.kind == "measure":
                now = time.monotonic()
                self.measure_at[index] = now + MEASURING_REST * (now - begun)
            say = logger.info if plan.kind in ("train", "compact") else logger.debug
            say(
                "built",
                dataset=name,
                what=plan.kind,
                rows=index.count,
                seconds=round(time.monotonic() - begun, 2),
            )
        return "done" if used else "failed"

    async def rebuild(self, dataset: Dataset) -> None:
        """Have a damaged dataset read from Postgres, beside the index that goes on answering."""
        with (
            anyio.move_on_after(RETRY_SECONDS),
            contextlib.suppress(SyncdError),
        ):  # it is read to the end all the same
            await self.consumer.rebuild(dataset.name)

    async def save(self) -> None:
        """A checkpoint right after a compaction, so that the old files can go."""
        try:
            await self.checkpointer.save()
        except SyncdError as error:
            logger.error("checkpoint_failed", error=str(error), hint=error.hint)


def be_nice() -> None:
    """Give this thread the lowest priority: a search that shares its core waits 0.3 ms at most, and 4 ms otherwise."""
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
