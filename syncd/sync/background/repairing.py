"""The repairer: it repairs a source's triggers that are missing or disabled.

That takes the rights of the table's owner. If syncd's role does not have them, the source names the
command for the owner, and is compared with its table every minute.

It also updates the names that the schema keeps of a source, after a look at the catalogue has found
other names.
"""

from __future__ import annotations

import math
import time

import structlog
from psycopg import errors as pg

from syncd.errors import SyncdError
from syncd.postgres.control import Control
from syncd.statements import statement
from syncd.sync.consumer.progress import Progress
from syncd.sync.source.followed import FollowedSource

RETRY_SECONDS = 60.0
"""Time until the next attempt after one that failed."""
LOCKED_SECONDS = 1.0
"""The same if another session had locked the table."""

logger = structlog.get_logger()


class Repairer:
    """Repairs triggers after passes, on the connection for reports."""

    def __init__(self, progress: Progress, control: Control) -> None:
        self.progress = progress
        self.control = control
        self.not_repaired: dict[int, str] = {}
        """Last logged error of a repair, by source id."""
        self.not_kept: dict[int, str] = {}
        """Last logged error of an update of the kept names, by source id."""

    async def run(self) -> None:
        """After each pass, repair the sources that need it, until cancelled."""
        while True:
            done = self.progress.pass_done
            await self.repair_all()
            self.progress.registry.tasks.well("repairer")
            await done.wait()

    async def repair_all(self) -> None:
        """Repair the sources that need it."""
        for followed in self.progress.sources.values():
            if followed.source.table is None:
                continue
            if followed.catalogue.repair_at <= time.monotonic():
                await self.repair(followed)
            if followed.catalogue.remember_at <= time.monotonic():
                await self.remember(followed)

    async def repair(self, followed: FollowedSource) -> None:
        """Try once. A failure is logged once, and tried again later while a repair is needed."""
        source, catalogue = followed.source, followed.catalogue
        catalogue.repair_at = math.inf
        try:
            changed = await self.call(source.oid)
        except SyncdError as error:
            if catalogue.weakness is not None:
                catalogue.repair_at = time.monotonic() + RETRY_SECONDS
                if self.not_repaired.get(source.id) != str(error):
                    self.not_repaired[source.id] = str(error)
                    logger.error(
                        "triggers_not_repaired", error=str(error), reason=str(catalogue.weakness)
                    )
            return
        self.not_repaired.pop(source.id, None)
        if changed:
            logger.warning("triggers_repaired", source=source.name)
            self.progress.wake("request")  # the next pass sees them and begins a comparison
        elif catalogue.weakness is not None:
            catalogue.repair_at = time.monotonic() + RETRY_SECONDS

    async def remember(self, followed: FollowedSource) -> None:
        """Update the names that the schema keeps of a source; try once.

        It fails if a rule is no longer valid and cannot be compiled. A failure is logged once, and
        tried again later. If the table is locked, it is tried again soon.
        """
        source = followed.source
        followed.catalogue.remember_at = time.monotonic() + RETRY_SECONDS
        try:
            async with self.control.transaction() as control:
                await control.execute(statement("catalogue", "limit_remember"))
                await control.execute(statement("catalogue", "try_lock"), [source.oid])
                await control.execute(statement("catalogue", "remember"), [source.id])
        except SyncdError as error:
            if isinstance(error.__cause__, pg.LockNotAvailable):
                followed.catalogue.remember_at = time.monotonic() + LOCKED_SECONDS
            elif self.not_kept.get(source.id) != str(error):
                self.not_kept[source.id] = str(error)
                logger.warning("rules_not_kept", source=source.name, error=str(error))
        else:
            self.not_kept.pop(source.id, None)

    async def call(self, oid: int) -> bool:
        """Repair a table's triggers; returns whether they changed. Raises ``DatabaseError``."""
        async with self.control.transaction() as control:
            await control.execute(statement("catalogue", "limit_repair"))
            row = await (await control.execute(statement("catalogue", "repair"), [oid])).fetchone()
        return bool(row and row[0])
