"""The session of a consumer: its name, its run, and the server that it is connected to.

The consumer's task fills it after each connect; background tasks read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import TypeVar, TypeVarTuple

import anyio
from anyio import to_thread

from syncd.postgres.connection import Patience
from syncd.postgres.identity import Nonce
from syncd.settings import Settings
from syncd.shard import WHOLE, Shard

POLL_SECONDS = 1.0
"""Longest time between passes, unless ``SYNCD_POLL_SECONDS`` is set."""
POLL_SECONDS_WITHOUT_NOTIFY = 0.02
"""The same, if the database's triggers do not notify."""

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


@dataclass(slots=True)
class Session:
    """One run of one consumer."""

    settings: Settings
    run_id: str
    patience: Patience = field(default_factory=Patience)
    address: str = ""
    """Address of this syncd for routers."""
    notifies: bool = True
    """Whether the database's triggers notify."""
    incarnation: str = ""
    """Identity of the database, as of the last connect."""
    fingerprint_probe: int = 0
    """Fingerprint that the server computes for a known row."""
    bucket_probe: int = 0
    """Hash that the server computes for a known key: it decides which rows a shard has."""
    nonce: Nonce | None = None
    """Nonce of the newest checkpoint that the database has confirmed."""
    name_since: datetime | None = None
    """Time since when this run holds the consumer's name; None before the first connect."""
    one_thread: anyio.CapacityLimiter = field(default_factory=lambda: anyio.CapacityLimiter(1))

    @property
    def consumer(self) -> str:
        """Name of the consumer."""
        return self.settings.consumer

    @property
    def shard(self) -> Shard:
        """The shard that the consumer follows."""
        return self.settings.own_shard or WHOLE

    @property
    def conninfo(self) -> str:
        """Connection string of the database."""
        return self.settings.conninfo

    @property
    def poll_seconds(self) -> float:
        """The longest time between passes."""
        return self.settings.poll_seconds or (
            POLL_SECONDS if self.notifies else POLL_SECONDS_WITHOUT_NOTIFY
        )

    async def in_thread(self, work: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        """Run blocking work on the passes' connection, in a worker thread, one piece at a time."""
        return await to_thread.run_sync(work, *arguments, limiter=self.one_thread)
