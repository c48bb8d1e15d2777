"""A search that is counted when it ends."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Generator
from typing import Any, Protocol

from syncd.protocol import messages
from syncd.rpc.dispatch import drop


class Counting(Protocol):
    """The counters of searches."""

    def count_answer(self, dataset: str, seconds: float) -> None:
        """Count a search that was answered."""

    def count_failure(self, dataset: str, error: BaseException) -> None:
        """Count a search that failed."""


class CountedSearch:
    """An awaitable of a search that has to wait, counted when it ends.

    It holds the inner awaitable, so that ``close`` reaches it.
    """

    __slots__ = ("begun", "dataset", "methods", "waited")

    def __init__(
        self,
        methods: Counting,
        dataset: str,
        begun: float,
        waited: Awaitable[messages.SearchResult],
    ) -> None:
        self.methods = methods
        self.dataset = dataset
        self.begun = begun
        self.waited = waited

    def __await__(self) -> Generator[Any, Any, messages.SearchResult]:
        try:
            found = yield from self.waited.__await__()
        except BaseException as error:
            self.methods.count_failure(self.dataset, error)
            raise
        self.methods.count_answer(self.dataset, time.perf_counter() - self.begun)
        return found

    def close(self) -> None:
        """Close the inner awaitable, if this one is never awaited."""
        drop(self.waited)
