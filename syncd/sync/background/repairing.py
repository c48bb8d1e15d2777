"""Repairs: where a source's triggers are missing or switched off, put them right, as far as the role that syncd connects as may.

It takes the owner's rights. Where they are not given the source says what the owner is to run, and is compared with its table every minute.
Besides, what the schema remembers of a source is brought up to date when the look at the catalogue finds other names than those.
"""

from __future__ import annotations

import math
import time

import structlog

from syncd.errors import SyncdError
from syncd.postgres.control import Control
from syncd.statements import statement
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.source.followed import FollowedSource

RETRY_SECONDS = 60.0
"""Between two attempts that fail."""

logger = structlog.get_logger()


class Repairer:
    """Runs beside the consumer, on the connection for reports."""

    def __init__(self, consumer: Consumer, control: Control) -> None:
        self.consumer = consumer
        self.control = control
        self.said: dict[int, str] = {}

    async def run(self) -> None:
        """After each pass, repair the sources that want it, until cancelled."""
        while True:
            done = self.consumer.pass_done
            await self.repair_all()
            self.consumer.registry.tasks.well("repairer")
            await done.wait()

    async def repair_all(self) -> None:
        """Mend the sources that want it."""
        for followed in self.consumer.sources.values():
            if (
                followed.catalogue.repair_at <= time.monotonic()
                and followed.source.table is not None
            ):
                await self.repair(followed)
            if (
                followed.catalogue.remember_at <= time.monotonic()
                and followed.source.table is not None
            ):
                await self.remember(followed)

    async def repair(self, followed: FollowedSource) -> None:
        """Try once. What fails is said once, and tried again later while it is needed."""
        followed.catalogue.repair_at = math.inf
        try:
            changed = await self.call(followed.source.oid)
        except SyncdError as error:
            if followed.catalogue.weakness is not None:
                followed.catalogue.repair_at = time.monotonic() + RETRY_SECONDS
                if self.said.get(followed.source.id) != str(error):
                    self.said[followed.source.id] = str(error)
                    logger.error(
                        "triggers_not_repaired",
                        error=str(error),
                        reason=str(followed.catalogue.weakness),
                    )
            return
        self.said.pop(followed.source.id, None)
        if changed:
            logger.warning("triggers_repaired", source=followed.source.name)
            self.consumer.wake(
                "request"
            )  # the pass sees them, and compares what was written without them
        elif followed.catalogue.weakness is not None:
            followed.catalogue.repair_at = time.monotonic() + RETRY_SECONDS

    async def remember(self, followed: FollowedSource) -> None:
        """Try once. What fails is said once, and tried again later: rules that mean nothing any more cannot be compiled."""
        followed.catalogue.remember_at = time.monotonic() + RETRY_SECONDS
        try:
            async with self.control.transaction() as control:
                await control.execute(statement("catalogue", "limit_mend"))
                await control.execute(statement("catalogue", "remember"), [followed.source.id])
        except SyncdError as error:
            if self.said.get(-followed.source.id) != str(error):
                self.said[-followed.source.id] = str(error)
                logger.warning("rules_not_kept", source=followed.source.name, error=str(error))
        else:
            self.said.pop(-followed.source.id, None)

    async def call(self, oid: int) -> bool:
        """Whether triggers were changed; raises ``DatabaseError``."""
        async with self.control.transaction() as control:
            await control.execute(statement("catalogue", "limit_mend"))
            row = await (await control.execute(statement("catalogue", "mend"), [oid])).fetchone()
        return bool(row and row[0])
