"""The choice of the searches that run on the event loop.

Short searches always run there. Longer ones run there while no other client waits for the loop. A
hop to a worker thread and back costs 0.1 to 0.2 ms, as much as many searches. But on the loop a
search has one core, and other clients wait meanwhile. So if a client had to wait, worker threads
run the longer searches for ``COMPANY_SECONDS``. With two cores this does not pay: the other core is
busy with the clients and with PostgreSQL. Measured with 8 clients and 1,000,000 rows: 2,117 answers
per second from the loop, 1,545 from two threads.
"""

from __future__ import annotations

from collections.abc import Callable

SHORT_ELEMENTS = 2_000_000
"""Cost of a search that always runs on the loop: 0.3 ms. ``SearchPlan.cost`` defines the unit."""
LONGER_ELEMENTS = 8_000_000
"""Cost of a search that runs on the loop if no other client waits."""
COMPANY_SECONDS = 0.02
"""How long longer searches are left to worker threads after a client had to wait."""
LEAST_THREADS = 3
"""With fewer search threads than this every search up to ``LONGER_ELEMENTS`` runs on the loop."""


class InPlace:
    """Chooses the searches that run on the loop.

    ``anyone_waits`` says whether a client has sent input that has not been read. ``threads`` is the
    number of worker threads for searches.
    """

    def __init__(self, anyone_waits: Callable[[], bool], threads: int) -> None:
        self._anyone_waits = anyone_waits
        self._threads = threads
        self._company_until = float("-inf")

    def allows(self, cost: int, now: float) -> bool:
        """Whether a search of this cost runs on the loop; ``now`` is in seconds."""
        return cost <= SHORT_ELEMENTS or (cost <= LONGER_ELEMENTS and now >= self._company_until)

    def ended(self, cost: int, now: float) -> None:
        """Note whether a search that has run on the loop kept a client waiting."""
        if cost > SHORT_ELEMENTS and self._threads >= LEAST_THREADS and self._anyone_waits():
            self._company_until = now + COMPANY_SECONDS
