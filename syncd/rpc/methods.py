"""The RPC methods, bound to the indexes and the consumer."""

from __future__ import annotations

import time
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import anyio
import msgspec
from anyio import to_thread

from syncd.errors import (
    InvalidParams,
    NotReady,
    TimedOut,
    TooLarge,
    UnknownDataset,
)
from syncd.protocol import messages, status_messages
from syncd.protocol.messages import WirePosition
from syncd.protocol.wire import key_from_wire, key_to_wire, keys_to_wire, vector_to_wire
from syncd.rpc.counted_search import CountedSearch
from syncd.rpc.in_place import InPlace
from syncd.rpc.inputs import Inputs
from syncd.rpc.prepared_search import PreparedSearch, search_together
from syncd.rpc.protocol import Method
from syncd.rpc.search_queue import SearchQueue
from syncd.sync.background.checkpoints import Checkpointer
from syncd.sync.background.diagnosis import Diagnosis
from syncd.sync.background.status import Status
from syncd.sync.background.verify import Verifier
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.registry.counters import OTHER
from syncd.sync.registry.datasets import Follower, Registry
from syncd.types import Token, full_dataset_name

T = TypeVar("T")

IN_PLACE_DATASETS = 500
"""Above this number of datasets a worker thread lists them: each takes 10 µs."""
IN_PLACE_KEYS = 1000
"""Above this number of keys a worker thread looks them up."""
MEASURED_TARGETS = (0.9, 0.95, 0.98, 0.99)
"""Targets for which ``recall`` is measured, in addition to the default target."""
IN_PLACE_ROWS = 5000
"""Above this number of quarantined rows a worker thread counts them: 5,000 take about 1 ms."""


class Methods:
    """The methods of one service. One instance serves all connections."""

    def __init__(
        self,
        consumer: Consumer,
        checkpointer: Checkpointer,
        verifier: Verifier,
        status: Status,
        *,
        inputs: Inputs,
        search_threads: int,
        recall: float,
    ) -> None:
        self.consumer = consumer
        self.registry: Registry = consumer.registry
        self.counters = consumer.registry.counters
        self.checkpointer = checkpointer
        self.verifier = verifier
        self.current = status
        self.diagnosis = Diagnosis(status)
        self.recall = recall
        self.search_limit = anyio.CapacityLimiter(search_threads)
        self.search_queue = SearchQueue(search_threads, search_together)
        self.in_place = InPlace(inputs.waiting, search_threads)

    def table(self) -> Mapping[str, Method[Any, Any]]:
        """The methods by name."""
        return {
            "search": Method(
                messages.SearchParams,
                messages.SearchResult,
                self.counted_search,
                "The nearest rows.",
            ),
            "get": Method(
                messages.GetParams, messages.GetResult, self.get, "Those keys that are indexed."
            ),
            "keys": Method(
                messages.KeysParams, messages.KeysResult, self.keys, "Every indexed key, in pages."
            ),
            "datasets": Method(
                messages.NoParams,
                list[status_messages.DatasetStatus],
                self.datasets,
                "Every dataset and its state.",
                immediate=True,
            ),
            "status": Method(
                messages.NoParams,
                status_messages.ServiceStatus,
                self.status,
                "The service's state.",
                immediate=True,
            ),
            "wait": Method(
                messages.WaitParams, messages.WaitResult, self.wait, "Wait for a transaction."
            ),
            "checkpoint": Method(
                messages.NoParams,
                messages.CheckpointResult,
                self.checkpoint,
                "Save a checkpoint now.",
            ),
            "verify": Method(
                messages.VerifyParams,
                messages.VerifyResult,
                self.verify,
                "Compare indexes with their tables.",
            ),
            "rebuild": Method(
                messages.RebuildParams,
                messages.RebuildResult,
                self.rebuild,
                "Build a dataset again and swap it in.",
            ),
            "recall": Method(
                messages.RecallParams,
                messages.RecallResult,
                self.measure_recall,
                "The recall that searches reach.",
            ),
            "why": Method(
                messages.WhyParams,
                status_messages.WhyResult,
                self.why,
                "Why a dataset is as it is.",
            ),
        }

    def counted_search(
        self, params: messages.SearchParams
    ) -> messages.SearchResult | Awaitable[messages.SearchResult]:
        """``search``, counted with its seconds and its outcome. Counting costs 0.5 µs."""
        begun = time.perf_counter()
        try:
            found = self.search(params)
        except Exception as error:
            self.count_failure(params.dataset, error)
            raise
        if isinstance(found, messages.SearchResult):
            self.count_answer(params.dataset, time.perf_counter() - begun)
            return found
        return CountedSearch(self, params.dataset, begun, found)

    def count_answer(self, dataset: str, seconds: float) -> None:
        """Count a search that was answered; datasets without rows are counted together."""
        name = full_dataset_name(dataset)
        counted = self.counters.searches_of(name if name in self.registry.by_name else OTHER)
        counted.answered(seconds)

    def count_failure(self, dataset: str, error: BaseException) -> None:
        """Count a search that failed; names that only a client knows are counted together."""
        name = full_dataset_name(dataset)
        is_cancelled = isinstance(error, GeneratorExit | CancelledError)
        kind = getattr(error, "kind", "cancelled" if is_cancelled else "internal_error")
        counted = self.counters.searches_of(name if name in self.registry.by_name else OTHER)
        counted.outcomes[kind] += 1

    def search(
        self, params: messages.SearchParams
    ) -> messages.SearchResult | Awaitable[messages.SearchResult]:
        """Run a small search here, a large one in a worker thread; wait if a position is asked."""
        if params.after is not None or params.consistency == "strong":
            return self.search_later(params)
        return self.run(self.prepare(params), params.timeout_ms / 1000)

    def prepare(self, params: messages.SearchParams) -> PreparedSearch:
        """Check a search's parameters; raises a ``RequestError``."""
        dataset = self.registry.find(params.dataset)
        return PreparedSearch(
            params, dataset, lag_seconds=self.current.lag_seconds(dataset), recall=self.recall
        )

    def run(
        self, search: PreparedSearch, seconds: float
    ) -> messages.SearchResult | Awaitable[messages.SearchResult]:
        """The answer, or an awaitable that gives it within about ``seconds``."""
        cost = search.cost
        if not self.in_place.allows(cost, time.monotonic()):
            return self.search_queue.run(search, seconds)
        try:
            return search.run()
        finally:
            self.in_place.ended(cost, time.monotonic())

    async def search_later(self, params: messages.SearchParams) -> messages.SearchResult:
        """Search at a position that the client asked for.

        The dataset may come into being before that position is reached.
        """
        deadline = anyio.current_time() + params.timeout_ms / 1000
        try:
            follower = self.registry.find(params.dataset).follower
            await self.wait_for_position(params, follower, deadline)
        except (UnknownDataset, NotReady) as error:
            try:
                # None: any source may bring the dataset into being
                await self.wait_for_position(params, None, deadline)
            except TimedOut:
                raise error from None
        found = self.run(self.prepare(params), max(deadline - anyio.current_time(), 0))
        return found if isinstance(found, messages.SearchResult) else await found

    async def wait_for_position(
        self, params: messages.SearchParams, follower: Follower | None, deadline: float
    ) -> None:
        """Return when one source, or all, are at the position that a search asks for.

        Raises ``TimedOut``.
        """
        if params.after is not None:
            seconds = max(deadline - anyio.current_time(), 0)
            await self.consumer.wait_for_token(parse_token(params.after), seconds, follower)
        if params.consistency == "strong":
            await self.consumer.wait_for_now(max(deadline - anyio.current_time(), 0), follower)

    def get(self, params: messages.GetParams) -> messages.GetResult | Awaitable[messages.GetResult]:
        """Those of the requested keys that are indexed."""
        dataset = self.registry.find(params.dataset)
        kind, columns = dataset.source.key_kind, dataset.source.key_kinds
        size = len(params.keys) * (dataset.index.dim or 0) * 4
        if params.vectors and size > messages.MAX_GET_BYTES:
            raise TooLarge(
                f"the vectors of {len(params.keys)} rows are more than {messages.MAX_GET_BYTES} "
                "bytes",
                hint="ask for fewer at once",
            )

        def read() -> messages.GetResult:
            rows = dataset.index.view.get(
                [key_from_wire(kind, key, columns) for key in params.keys], params.vectors
            )
            return messages.GetResult(
                [
                    messages.WireRow(key_to_wire(kind, key))
                    if vector is None
                    else messages.WireRow(key_to_wire(kind, key), vector_to_wire(vector))
                    for key, vector in rows
                ]
            )

        return read() if len(params.keys) <= IN_PLACE_KEYS else self.in_thread(read)

    def keys(self, params: messages.KeysParams) -> Awaitable[messages.KeysResult]:
        """One page of keys."""
        dataset = self.registry.find(params.dataset)
        kind = dataset.source.key_kind
        after = (
            None
            if params.after_key is None
            else key_from_wire(kind, params.after_key, dataset.source.key_kinds)
        )

        def read() -> messages.KeysResult:
            page = dataset.index.view.keys(after, params.limit)
            following = None if page.next is None else key_to_wire(kind, page.next)
            return messages.KeysResult(keys_to_wire(kind, page.keys), following)

        return self.in_thread(read)

    def datasets(
        self, _: messages.NoParams
    ) -> list[status_messages.DatasetStatus] | Awaitable[msgspec.Raw]:
        """Every known dataset, by name, with those that no longer have rows.

        A worker thread encodes the answer if there are more than ``IN_PLACE_DATASETS``.
        """
        if len(self.registry.by_name) + len(self.registry.retired) <= IN_PLACE_DATASETS:
            return self.current.datasets()
        return self.in_thread(lambda: msgspec.Raw(msgspec.json.encode(self.current.datasets())))

    def status(self, _: messages.NoParams) -> status_messages.ServiceStatus:
        """The state of the whole service."""
        return self.current.service()

    def why(
        self, params: messages.WhyParams
    ) -> status_messages.WhyResult | Awaitable[status_messages.WhyResult]:
        """Explain the state of one dataset.

        A worker thread does it if many rows are to be counted or many names compared.
        """
        name = full_dataset_name(params.dataset)
        if self.diagnosis.cost(name) > IN_PLACE_ROWS:
            return self.in_thread(lambda: self.diagnosis.of(name))
        return self.diagnosis.of(name)

    def measure_recall(self, params: messages.RecallParams) -> Awaitable[messages.RecallResult]:
        """Measure the recall that searches of a dataset reach."""
        dataset = self.registry.find(params.dataset)
        targets = sorted({*MEASURED_TARGETS, self.recall})

        def measure() -> messages.RecallResult:
            found = dataset.index.measure_reached(params.k, targets)
            return messages.RecallResult(
                dataset=dataset.name,
                k=params.k,
                of=found.of,
                queries=found.queries,
                targets=[
                    messages.RecallReached(
                        target=each.target,
                        mean=each.mean,
                        p5=each.p5,
                        least=each.least,
                        exact=each.exact,
                        milliseconds=each.seconds * 1000,
                    )
                    for each in found.targets
                ],
            )

        return self.in_thread(measure)

    async def wait(self, params: messages.WaitParams) -> messages.WaitResult:
        """Wait until every dataset includes a transaction."""
        position = await self.consumer.wait_for_token(
            parse_token(params.after), params.timeout_ms / 1000
        )
        return messages.WaitResult(WirePosition.of(position))

    async def checkpoint(self, _: messages.NoParams) -> messages.CheckpointResult:
        """Save a checkpoint now. It is completed even if the client leaves."""
        with anyio.CancelScope(shield=True):
            done = await self.checkpointer.save()
        return messages.CheckpointResult(
            WirePosition.of(done.position), done.seconds, done.bytes_written
        )

    async def verify(self, params: messages.VerifyParams) -> messages.VerifyResult:
        """Compare datasets with their tables, and repair them if the client asks for it."""
        if not self.consumer.passes_done:  # an empty result would mean: no differences
            raise NotReady(
                "nothing has been read yet: syncd is starting",
                hint="watch it with: syncd status --watch",
            )
        names = None if params.dataset is None else [self.registry.known(params.dataset).name]
        done = await self.verifier.verify(names, repair=params.repair, deep=params.deep)
        return messages.VerifyResult(
            WirePosition.of(done.position),
            [
                messages.DatasetVerified(
                    dataset=row.dataset,
                    in_sync=row.in_sync,
                    rows=row.rows,
                    indexed=row.indexed,
                    missing=row.missing,
                    extra=row.extra,
                    stale=row.stale,
                    repaired=row.repaired,
                    quarantined=row.quarantined,
                    sample=[key_to_wire(row.source.key_kind, key) for key in row.sample],
                )
                for row in done.datasets
            ],
            [
                messages.SourceVerified(each.source.name, each.outcome, each.reason)
                for each in done.sources
            ],
            done.seconds,
        )

    async def rebuild(self, params: messages.RebuildParams) -> messages.RebuildResult:
        """Build a dataset again. It answers searches meanwhile."""
        begun = time.monotonic()
        name = self.registry.known(params.dataset).name
        rows = await self.consumer.rebuild(name)
        return messages.RebuildResult(name, rows, time.monotonic() - begun)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run a long read in a worker thread, at most one per search thread at once."""
        return await to_thread.run_sync(work, limiter=self.search_limit)


def parse_token(token: str) -> Token:
    """Parse a request's token; raises ``InvalidParams``."""
    try:
        return Token.parse(token)
    except ValueError:
        raise InvalidParams(
            f"{token[:40]!r} is not a valid token", hint="take it from: SELECT syncd.token()"
        ) from None
