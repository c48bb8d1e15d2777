"""What wakes the consumer. A wake-up says "look", never "what": the pass finds out by itself."""

from __future__ import annotations

from typing import Literal

import anyio

WakeSource = Literal["connect", "notify", "poll", "request"]


class Wake:
    """Set by anybody, waited for by the consumer."""

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.counts: dict[WakeSource, int] = {"connect": 0, "notify": 0, "poll": 0, "request": 0}

    def __call__(self, source: WakeSource) -> None:
        """Have the consumer look now."""
        self.counts[source] += 1
        self.event.set()

    @property
    def is_set(self) -> bool:
        """Whether there was a wake-up since ``clear``."""
        return self.event.is_set()

    def clear(self) -> None:
        """Forget wake-ups so far: what they announced is seen by the look that follows."""
        if self.event.is_set():
            self.event = anyio.Event()

    async def wait(self, seconds: float) -> None:
        """Return at a wake-up, or after this long."""
        with anyio.move_on_after(seconds) as scope:
            await self.event.wait()
        if scope.cancelled_caught:
            self.counts["poll"] += 1
