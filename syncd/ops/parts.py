"""Parts of a running service that its operators see."""

from __future__ import annotations

from dataclasses import dataclass

from syncd.postgres.listener import Listener
from syncd.readers.pool import Readers
from syncd.rpc.methods import Methods
from syncd.settings import Settings
from syncd.sync.background.checkpoints import Checkpointer
from syncd.sync.background.reports import Reporter
from syncd.sync.background.rotation import Rotator
from syncd.sync.background.status import Status
from syncd.sync.background.verify import Verifier
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.registry.counters import Counters


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts that ``syncd.ops`` reads. It changes none of them."""

    settings: Settings
    consumer: Consumer
    checkpointer: Checkpointer
    listener: Listener
    reporter: Reporter
    verifier: Verifier
    rotator: Rotator
    status: Status
    methods: Methods
    readers: Readers | None
    """The reader processes; None if the main process answers alone."""

    @property
    def counters(self) -> Counters:
        """Counters since the start of the process."""
        return self.consumer.registry.counters
