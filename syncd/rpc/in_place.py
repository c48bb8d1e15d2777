"""Which searches run on the event loop: short ones always, longer ones as long as nobody waits for it.

A hop to a worker thread and back costs 0.1 to 0.2 ms, as much as many a search. On the loop a search has one core, and whoever asks meanwhile waits;
so as soon as somebody has, the longer ones are left to the threads for a while.
"""

from __future__ import annotations

SHORT_ELEMENTS = 2_000_000
"""0.3 ms; what an element is, says ``syncd.index.search.elements``."""
LONGER_ELEMENTS = 8_000_000
NEXT_SECONDS = 80e-6
"""A search that begins so soon after the last one ended has waited for it: a client that asks one after the other takes longer to read an answer."""
COMPANY_SECONDS = 0.01


class InPlace:
    """Decides, from when searches on the loop ended and when the next ones came."""

    def __init__(self) -> None:
        self._last_end = float("-inf")
        self._company_until = float("-inf")

    def allows(self, elements: int, now: float) -> bool:
        """Whether a search of this cost runs on the loop; ``now`` in seconds."""
        if now - self._last_end < NEXT_SECONDS:
            self._company_until = now + COMPANY_SECONDS
        return elements <= SHORT_ELEMENTS or (elements <= LONGER_ELEMENTS and now >= self._company_until)

    def ended(self, now: float) -> None:
        """A search on the loop has ended."""
        self._last_end = now
