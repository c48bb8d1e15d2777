"""A search that is counted when its answer is there."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Generator
from typing import Any, Protocol

from syncd.protocol import messages
from syncd.rpc.dispatch import drop


class Counting(Protocol):
    """What counts searches."""

    def count_answer(self, dataset: str, seconds: float) -> None:
        """One was answered."""

    def count_failure(self, dataset: str, error: BaseException) -> None:
        """One failed."""


class CountedSearch:
    """A search that has to wait, to be counted when it is over. It holds what is awaited, so that ``close`` reaches it."""

    __slots__ = ("begun", "dataset", "methods", "waited")

    def __init__(self, methods: Counting, dataset: str, begun: float, waited: Awaitable[messages.SearchResult]) -> None:
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
        """It is not awaited any more."""
        drop(self.waited)
