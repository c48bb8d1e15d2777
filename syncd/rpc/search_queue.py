"""Searches in worker threads: at most one per core at once, and waiting ones in common FAISS calls.

A search starts at once if a thread is free. Otherwise it waits. When a thread becomes free, the
first waiting search runs, together with all others that fit into the same FAISS call. There is no
separate scheduler: the first search's own request runs the batch for the others. If a search's turn
would come after its time limit, it is refused on arrival.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

import anyio
from anyio import to_thread

from syncd.errors import Overloaded
from syncd.index.codes.calibration import EXACT_NS_PER_ELEMENT

BATCH_QUERIES = 64
"""Queries in one call at most."""

T = TypeVar("T")


class Queued(Protocol):
    """The part of a search that the queue uses."""

    @property
    def cost(self) -> int:
        """Expected cost, in elements: see ``syncd.index.search.plan.SearchPlan``."""

    @property
    def query_count(self) -> int:
        """Number of queries."""

    @property
    def together_with(self) -> object:
        """Searches with an equal value fit into one call; None: this search runs alone."""


Search = TypeVar("Search", bound=Queued)


class SearchQueue(Generic[Search, T]):
    """The queue. ``run_batch`` returns each search's result or error, in a worker thread."""

    def __init__(
        self, threads: int, run_batch: Callable[[Sequence[Search]], Sequence[T | Exception]]
    ) -> None:
        self._run_batch = run_batch
        self._threads = threads
        self._free = threads
        self._limiter = anyio.CapacityLimiter(threads)
        self._waiting: deque[_Waiting[Search, T]] = deque()
        self._cost = 0
        """Cost of all searches that wait or run, in elements."""

    async def run(self, search: Search, seconds: float) -> T:
        """A search's result, within about ``seconds``; raises its error, or ``Overloaded``."""
        mine: _Waiting[Search, T] = _Waiting(search)
        if self._free:
            self._free -= 1
            self._cost += mine.cost
        else:
            if self._cost * EXACT_NS_PER_ELEMENT / self._threads > seconds * 1e9:
                raise Overloaded(len(self._waiting))
            await self._wait_for_turn(mine, seconds)
        if mine.outcome is None:
            await self._lead(mine)
        assert mine.outcome is not None
        if isinstance(mine.outcome, Exception):
            raise mine.outcome
        return mine.outcome

    async def _wait_for_turn(self, mine: _Waiting[Search, T], seconds: float) -> None:
        self._waiting.append(mine)
        self._cost += mine.cost
        try:
            with anyio.fail_after(seconds):
                await mine.turn.wait()
        except BaseException as error:
            mine.gone = True
            if mine in self._waiting:
                self._waiting.remove(mine)
                self._cost -= mine.cost
            elif mine.outcome is None and mine.turn.is_set():  # its turn to run a batch
                self._cost -= mine.cost
                self._next_turn()
            if isinstance(error, TimeoutError):
                raise Overloaded(len(self._waiting)) from None
            raise

    async def _lead(self, mine: _Waiting[Search, T]) -> None:
        batch = [mine, *self._take_like(mine)]

        def work() -> None:
            outcomes = self._run_batch([each.search for each in batch])
            for each, outcome in zip(batch, outcomes, strict=True):
                each.outcome = outcome

        try:
            await to_thread.run_sync(work, limiter=self._limiter)
        finally:
            self._cost -= mine.cost
            for each in reversed(batch[1:]):
                if (
                    each.outcome is None and not each.gone
                ):  # the batch was cancelled before it began
                    self._waiting.appendleft(each)
                else:
                    self._cost -= each.cost
                    each.turn.set()
            self._next_turn()

    def _take_like(self, first: _Waiting[Search, T]) -> list[_Waiting[Search, T]]:
        common = first.search.together_with
        if common is None or not self._waiting:
            return []
        room = BATCH_QUERIES - first.search.query_count
        taken: list[_Waiting[Search, T]] = []
        left: deque[_Waiting[Search, T]] = deque()
        for each in self._waiting:
            if each.search.together_with == common and each.search.query_count <= room:
                room -= each.search.query_count
                taken.append(each)
            else:
                left.append(each)
        self._waiting = left
        return taken

    def _next_turn(self) -> None:
        if self._waiting:
            self._waiting.popleft().turn.set()
        else:
            self._free += 1


class _Waiting(Generic[Search, T]):
    """One search, from its arrival to its answer."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.cost = search.cost
        self.turn = anyio.Event()
        self.gone = False
        """Whether its request no longer waits for it."""
        self.outcome: T | Exception | None = None
