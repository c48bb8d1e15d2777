"""Which searches run on the event loop: short ones always, longer ones as long as nobody else waits for it.

A hop to a worker thread and back costs 0.1 to 0.2 ms, as much as many a search. On the loop a search has one core, and whoever asks meanwhile waits;
so once somebody has waited, the longer ones are left to the threads for a while. With two cores that does not pay: the other is busy with those who
ask and with Postgres. Eight clients of a million rows got 2,117 answers a second on the loop, and 1,545 from two threads.
"""

from __future__ import annotations

from collections.abc import Callable

SHORT_ELEMENTS = 2_000_000
"""0.3 ms; what an element is, says ``syncd.index.search.plan.SearchPlan``."""
LONGER_ELEMENTS = 8_000_000
COMPANY_SECONDS = 0.02
LEAST_THREADS = 3


class InPlace:
    """Decides; ``anyone_waits`` says whether a client's request is there that has not been read, ``threads`` how many else could search."""

    def __init__(self, anyone_waits: Callable[[], bool], threads: int) -> None:
        self._anyone_waits = anyone_waits
        self._threads = threads
        self._company_until = float("-inf")

    def allows(self, cost: int, now: float) -> bool:
        """Whether a search of this cost runs on the loop; ``now`` in seconds."""
        return cost <= SHORT_ELEMENTS or (cost <= LONGER_ELEMENTS and now >= self._company_until)

    def ended(self, cost: int, now: float) -> None:
        """A search on the loop has ended: did it keep anybody waiting?"""
        if cost > SHORT_ELEMENTS and self._threads >= LEAST_THREADS and self._anyone_waits():
            self._company_until = now + COMPANY_SECONDS
