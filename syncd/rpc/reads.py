"""The methods that read datasets: ``search`` at the present position, ``get`` and ``keys``.

They know neither the database nor the consumer, so readers have them too.
"""

from __future__ import annotations

import time
from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import anyio
from anyio import to_thread

from syncd.errors import TooLarge
from syncd.protocol import messages
from syncd.protocol.wire import key_from_wire, key_to_wire, keys_to_wire, vector_to_wire
from syncd.rpc.in_place import InPlace
from syncd.rpc.inputs import Inputs
from syncd.rpc.prepared_search import PreparedSearch, search_together
from syncd.rpc.search_queue import SearchQueue
from syncd.rpc.searched import Searched
from syncd.shard import Shard

T = TypeVar("T")
D = TypeVar("D", bound=Searched)

IN_PLACE_KEYS = 1000
"""Above this number of keys a worker thread looks them up."""


def failure_kind(error: BaseException) -> str:
    """The outcome under which a search that failed is counted."""
    is_cancelled = isinstance(error, GeneratorExit | CancelledError)
    return getattr(error, "kind", "cancelled" if is_cancelled else "internal_error")


class Reads(Generic[D]):
    """The methods over the datasets that ``find`` returns.

    ``lag_seconds`` gives a dataset's lag. ``recall`` is the default for a request that names none.
    ``shard`` is the one whose rows the datasets have.
    """

    def __init__(
        self,
        find: Callable[[str], D],
        lag_seconds: Callable[[D], float],
        *,
        inputs: Inputs,
        threads: int,
        recall: float,
        shard: Shard,
    ) -> None:
        self.find = find
        self.shard = shard
        self.lag_seconds = lag_seconds
        self.recall = recall
        self.limit = anyio.CapacityLimiter(threads)
        self.queue = SearchQueue(threads, search_together)
        self.in_place = InPlace(inputs.waiting, threads)

    def prepare(self, params: messages.SearchParams) -> PreparedSearch:
        """Check a search's parameters; raises a ``RequestError``."""
        dataset = self.find(params.dataset)
        return self.prepare_on(params, dataset, self.lag_seconds(dataset))

    def prepare_on(
        self, params: messages.SearchParams, dataset: Searched, lag_seconds: float
    ) -> PreparedSearch:
        """``prepare`` for a dataset that has been found."""
        return PreparedSearch(
            params, dataset, lag_seconds=lag_seconds, recall=self.recall, shard=self.shard
        )

    def run(
        self, search: PreparedSearch, seconds: float
    ) -> messages.SearchResult | Awaitable[messages.SearchResult]:
        """Run a small search here, a large one in a worker thread.

        Returns the answer, or an awaitable that gives it within about ``seconds``.
        """
        cost = search.cost
        if not self.in_place.allows(cost, time.monotonic()):
            return self.queue.run(search, seconds)
        try:
            return search.run()
        finally:
            self.in_place.ended(cost, time.monotonic())

    def get(self, params: messages.GetParams) -> messages.GetResult | Awaitable[messages.GetResult]:
        """Those of the requested keys that are indexed."""
        return self.get_of(self.find(params.dataset), params)

    def get_of(
        self, dataset: Searched, params: messages.GetParams
    ) -> messages.GetResult | Awaitable[messages.GetResult]:
        """``get`` for a dataset that has been found."""
        kind, columns = dataset.key_kind, dataset.key_kinds
        position, view = dataset.look()
        size = len(params.keys) * (view.dim or 0) * 4
        if params.vectors and size > messages.MAX_GET_BYTES:
            raise TooLarge(
                f"the vectors of {len(params.keys)} rows are more than {messages.MAX_GET_BYTES} "
                "bytes",
                hint="ask for fewer at once",
            )

        def read() -> messages.GetResult:
            rows = view.get(
                [key_from_wire(kind, key, columns) for key in params.keys], params.vectors
            )
            return messages.GetResult(
                [
                    messages.WireRow(key_to_wire(kind, key))
                    if vector is None
                    else messages.WireRow(key_to_wire(kind, key), vector_to_wire(vector))
                    for key, vector in rows
                ],
                {self.shard.name: position},
                self.shard.share,
            )

        return read() if len(params.keys) <= IN_PLACE_KEYS else self.in_thread(read)

    def keys(self, params: messages.KeysParams) -> Awaitable[messages.KeysResult]:
        """One page of keys."""
        dataset = self.find(params.dataset)
        kind = dataset.key_kind
        position, view = dataset.look()
        after = (
            None
            if params.after_key is None
            else key_from_wire(kind, params.after_key, dataset.key_kinds)
        )

        def read() -> messages.KeysResult:
            page = view.keys(after, params.limit)
            following = None if page.next is None else key_to_wire(kind, page.next)
            return messages.KeysResult(
                keys_to_wire(kind, page.keys),
                following,
                {self.shard.name: position},
                self.shard.share,
            )

        return self.in_thread(read)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run a long read in a worker thread, at most one per search thread at once."""
        return await to_thread.run_sync(work, limiter=self.limit)
