"""Wake-ups of the consumer. A wake-up carries no data: the pass looks for changes by itself."""

from __future__ import annotations

from typing import Literal

import anyio

WakeSource = Literal["connect", "notify", "poll", "request"]


class Wake:
    """An event that any task sets and the consumer waits for."""

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.counts: dict[WakeSource, int] = {"connect": 0, "notify": 0, "poll": 0, "request": 0}

    def __call__(self, source: WakeSource) -> None:
        """Wake the consumer."""
        self.counts[source] += 1
        self.event.set()

    @property
    def is_set(self) -> bool:
        """Whether there was a wake-up since ``clear``."""
        return self.event.is_set()

    def clear(self) -> None:
        """Forget wake-ups so far: the look that follows sees their changes."""
        if self.event.is_set():
            self.event = anyio.Event()

    async def wait(self, seconds: float) -> None:
        """Return at a wake-up, or after this long."""
        with anyio.move_on_after(seconds) as scope:
            await self.event.wait()
        if scope.cancelled_caught:
            self.counts["poll"] += 1
