"""Builds what makes searches fast, beside everything else and one thing at a time: codes, merges, measurements, compactions.

In one thread of the lowest priority. Searches and passes never wait for it; it only ever gives an index something to answer with instead of what
it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakKeyDictionary

import anyio
import structlog

from syncd.errors import SyncdError
from syncd.index.building import Plan
from syncd.index.dataset import DatasetIndex
from syncd.index.training import Cancelled
from syncd.sync.checkpoints import Checkpointer
from syncd.sync.consumer import Consumer
from syncd.sync.datasets import ANSWERING, Dataset
from syncd.types import DatasetName

LOOK_SECONDS = 1.0
RETRY_SECONDS = 60.0
"""After something could not be built."""
NICENESS = 19

logger = structlog.get_logger()


class Builder:
    """See the module. ``recall`` is what most searches want."""

    def __init__(self, consumer: Consumer, checkpointer: Checkpointer, recall: float) -> None:
        self.consumer = consumer
        self.checkpointer = checkpointer
        self.recall = recall
        self.stopping = threading.Event()
        self.retry_at: WeakKeyDictionary[DatasetIndex, float] = WeakKeyDictionary()

    async def run(self) -> None:
        """Build what is wanted until cancelled; then what is under way is given up."""
        thread = ThreadPoolExecutor(1, "syncd-build", initializer=be_nice)
        try:
            while True:
                datasets = [each for each in self.consumer.registry.by_name.values() if each.state in ANSWERING]
                wanted = await asyncio.wrap_future(thread.submit(self.look, datasets))
                for dataset, plan in wanted:
                    done = await asyncio.wrap_future(thread.submit(self.build, dataset.name, dataset.index, plan))
                    if done and plan.kind == "compact":
                        await self.save()
                if not wanted:
                    await anyio.sleep(LOOK_SECONDS)
        finally:
            self.stopping.set()
            thread.shutdown(wait=False, cancel_futures=True)

    def look(self, datasets: list[Dataset]) -> list[tuple[Dataset, Plan]]:
        """What each dataset wants next, the smallest first."""
        now = time.monotonic()
        wanted = []
        for dataset in datasets:
            if self.retry_at.get(dataset.index, 0.0) <= now:
                plan = dataset.index.plan_build(self.recall)
                if plan is not None:
                    wanted.append((dataset, plan))
        return sorted(wanted, key=lambda each: each[0].index.count)

    def build(self, name: DatasetName, index: DatasetIndex, plan: Plan) -> bool:
        """Build one thing. What fails leaves the index as it is, and is tried again after a while."""
        begun = time.monotonic()
        try:
            used = index.build(plan, self.stopping.is_set)
        except Cancelled:
            return False
        except SyncdError as error:
            logger.error("build_failed", dataset=name, what=plan.kind, error=str(error))
        except Exception:  # what FAISS or the memory refuses must not end the service
            logger.exception("build_failed", dataset=name, what=plan.kind)
        else:
            say = logger.info if plan.kind in ("train", "compact") else logger.debug
            say("built", dataset=name, what=plan.kind, rows=index.count, seconds=round(time.monotonic() - begun, 2))
            return used
        self.retry_at[index] = time.monotonic() + RETRY_SECONDS
        return False

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
