"""What each RPC method does: the server's methods bound to the indexes and the consumer."""

from __future__ import annotations

import contextlib
import itertools
import time
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

import anyio
import numpy as np
from anyio import to_thread
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from syncd.errors import (
    DimensionMismatch,
    InvalidParams,
    NotReady,
    RequestError,
    TimedOut,
    TooLarge,
    UnknownDataset,
    UnknownKey,
    shortened,
)
from syncd.index.filters import Path, find_path, listed, parse_filter
from syncd.index.search import SearchResult as Found
from syncd.index.search import elements
from syncd.index.view import View
from syncd.postgres.listener import Listener
from syncd.rpc import messages
from syncd.rpc.dispatch import drop
from syncd.rpc.messages import WirePosition
from syncd.rpc.protocol import Method
from syncd.rpc.search_queue import SearchQueue
from syncd.rpc.wire import key_from_wire, key_to_wire, vector_from_wire, vector_to_wire
from syncd.sync.checkpoints import Checkpointer
from syncd.sync.consumer import Consumer
from syncd.sync.counters import OTHER
from syncd.sync.datasets import Dataset, Follower, Registry
from syncd.sync.verify import Verifier
from syncd.types import Key, Position, full_dataset_name

T = TypeVar("T")

IN_PLACE_ELEMENTS = 2_000_000
"""A search over fewer elements than this runs on the event loop: a hop to a worker thread costs 0.1 ms, as much as the search."""

ELEMENTS_AT_ONCE = 50_000_000
"""A search over so many takes some hundredths of a second; between two of them the request's time is looked at."""
IN_PLACE_KEYS = 1000
"""Looking up more than this is left to a worker thread."""


class Methods:
    """See the module. One instance serves all connections."""

    def __init__(
        self,
        consumer: Consumer,
        checkpointer: Checkpointer,
        verifier: Verifier,
        listener: Listener | None,
        *,
        version: str,
        search_threads: int,
        recall: float,
    ) -> None:
        self.consumer = consumer
        self.registry: Registry = consumer.registry
        self.counters = consumer.registry.counters
        self.checkpointer = checkpointer
        self.verifier = verifier
        self.listener = listener
        self.version = version
        self.begun = time.monotonic()
        self.recall = recall
        self.search_limit = anyio.CapacityLimiter(search_threads)
        self.search_queue = SearchQueue(search_threads, search_together)

    def table(self) -> Mapping[str, Method[Any, Any]]:
        """The methods by name."""
        return {
            "search": Method(messages.SearchParams, messages.SearchResult, self.counted_search, "The nearest rows."),
            "get": Method(messages.GetParams, messages.GetResult, self.get, "Which of some keys are indexed."),
            "keys": Method(messages.KeysParams, messages.KeysResult, self.keys, "Every indexed key, in pages."),
            "datasets": Method(
                messages.NoParams, list[messages.DatasetStatus], self.datasets, "What is indexed.", immediate=True
            ),
            "status": Method(
                messages.NoParams, messages.ServiceStatus, self.status, "How the service is.", immediate=True
            ),
            "wait": Method(messages.WaitParams, messages.WaitResult, self.wait, "Wait for a transaction."),
            "checkpoint": Method(
                messages.NoParams, messages.CheckpointResult, self.checkpoint, "Save a checkpoint now."
            ),
            "verify": Method(
                messages.VerifyParams, messages.VerifyResult, self.verify, "Compare indexes with their tables."
            ),
            "rebuild": Method(
                messages.RebuildParams, messages.RebuildResult, self.rebuild, "Build a dataset anew and swap it in."
            ),
        }

    def counted_search(self, params: messages.SearchParams) -> messages.SearchResult | Awaitable[messages.SearchResult]:
        """``search``, counted with its seconds and its outcome. That costs half a microsecond."""
        begun = time.perf_counter()
        try:
            found = self.search(params)
        except Exception as error:
            self.count_failure(params.dataset, error)
            raise
        if isinstance(found, messages.SearchResult):
            self.counters.searches_of(full_dataset_name(params.dataset)).answered(time.perf_counter() - begun)
            return found
        return CountedSearch(self, params.dataset, begun, found)

    def count_failure(self, dataset: str, error: BaseException) -> None:
        """A search failed; names that only a client knows are counted together."""
        name = full_dataset_name(dataset)
        kind = getattr(
            error, "kind", "cancelled" if isinstance(error, GeneratorExit | CancelledError) else "internal_error"
        )
        self.counters.searches_of(name if name in self.registry.by_name else OTHER).outcomes[kind] += 1

    def search(self, params: messages.SearchParams) -> messages.SearchResult | Awaitable[messages.SearchResult]:
        """Small searches in place, large ones in worker threads, and those that wait for a position after it."""
        if params.after is not None or params.consistency == "strong":
            return self.search_later(params)
        search = PreparedSearch(self, params)
        if search.elements <= IN_PLACE_ELEMENTS:
            return search.run()
        return self.search_queue.run(search, params.timeout_ms / 1000)

    async def search_later(self, params: messages.SearchParams) -> messages.SearchResult:
        """Search at a position that the caller asked for. The dataset may be one that is formed on the way there."""
        deadline = anyio.current_time() + params.timeout_ms / 1000
        try:
            await self.wait_for_position(params, self.registry.find(params.dataset).follower, deadline)
        except (UnknownDataset, NotReady) as error:
            try:
                await self.wait_for_position(params, None, deadline)  # any source may be the one that forms it
            except TimedOut:
                raise error from None
        search = PreparedSearch(self, params)
        if search.elements <= IN_PLACE_ELEMENTS:
            return search.run()
        return await self.search_queue.run(search, max(deadline - anyio.current_time(), 0))

    async def wait_for_position(
        self, params: messages.SearchParams, follower: Follower | None, deadline: float
    ) -> None:
        """Return once the position, of one source or of all, is what a search asks for; raises ``TimedOut``."""
        if params.after is not None:
            seconds = max(deadline - anyio.current_time(), 0)
            await self.consumer.wait_for_xid(parse_token(params.after), seconds, follower)
        if params.consistency == "strong":
            await self.consumer.wait_for_now(max(deadline - anyio.current_time(), 0), follower)

    def get(self, params: messages.GetParams) -> messages.GetResult | Awaitable[messages.GetResult]:
        """Those of the keys that are indexed."""
        dataset = self.registry.find(params.dataset)
        kind = dataset.source.key_kind
        size = len(params.keys) * (dataset.index.dim or 0) * 4
        if params.vectors and size > messages.MAX_GET_BYTES:
            raise TooLarge(
                f"the vectors of {len(params.keys)} rows are more than {messages.MAX_GET_BYTES} bytes",
                hint="ask for fewer at once",
            )

        def read() -> messages.GetResult:
            rows = dataset.index.get([key_from_wire(kind, key) for key in params.keys], params.vectors)
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
        after = None if params.after_key is None else key_from_wire(kind, params.after_key)

        def read() -> messages.KeysResult:
            page = dataset.index.keys(after, params.limit)
            following = None if page.next is None else key_to_wire(kind, page.next)
            return messages.KeysResult([key_to_wire(kind, key) for key in page.keys], following)

        return self.in_thread(read)

    def datasets(self, _: messages.NoParams) -> list[messages.DatasetStatus]:
        """Every dataset that is known, by name."""
        return self.dataset_statuses()

    def dataset_statuses(self) -> list[messages.DatasetStatus]:
        """The same; from any thread."""
        return [self.dataset_status(dataset) for _, dataset in sorted(self.registry.by_name.items())]

    def dataset_status(self, dataset: Dataset) -> messages.DatasetStatus:
        """One dataset."""
        index = dataset.index
        verified_at, in_sync = self.verifier.last.get(dataset.name, (None, None))
        return messages.DatasetStatus(
            dataset=dataset.name,
            source=dataset.source.name,
            state=dataset.state,
            count=index.count,
            tombstones=index.tombstones,
            dim=index.dim,
            metric=dataset.source.metric,
            index=index.kind(self.recall),
            recall=None if index.dim is None else index.recall(self.recall),
            verified=index.verified,
            bytes=index.bytes_memory + index.bytes_disk,
            bytes_memory=index.bytes_memory,
            lag_seconds=self.lag_seconds(dataset),
            verified_at=verified_at,
            in_sync=in_sync,
        )

    def status(self, _: messages.NoParams) -> messages.ServiceStatus:
        """The whole service."""
        consumer, checkpointer = self.consumer, self.checkpointer
        return messages.ServiceStatus(
            version=self.version,
            consumer=consumer.settings.consumer,
            state=consumer.state,
            position=WirePosition.of(consumer.oldest_position()),
            lag_rows=consumer.lag_rows,
            lag_seconds=consumer.lag_seconds,
            listener_connected=self.listener is not None and self.listener.connected,
            checkpoint=messages.CheckpointStatus(
                checkpointer.last_at, checkpointer.last_seconds, checkpointer.last_error
            ),
            quarantined=sum(len(watched.quarantine) for watched in consumer.sources.values()),
            uptime_seconds=time.monotonic() - self.begun,
            work=self.work(),
        )

    def work(self) -> list[messages.Work]:
        """Tables that are read or compared as a whole just now."""
        found = []
        for watched in self.consumer.sources.values():
            scan = watched.scan
            if scan is not None and scan.beside and scan.only is not None:
                found.append(messages.Work("rebuilding", ", ".join(scan.only), scan.rows, scan.expected or 0))
            elif scan is not None:
                found.append(messages.Work("reading", watched.source.name, scan.rows, scan.expected or 0))
        compared = self.verifier.compared
        if compared is not None:
            found.append(messages.Work("verifying", "", compared, self.verifier.expected))
        return found

    async def wait(self, params: messages.WaitParams) -> messages.WaitResult:
        """Until every dataset includes a transaction."""
        position = await self.consumer.wait_for_xid(parse_token(params.after), params.timeout_ms / 1000)
        return messages.WaitResult(WirePosition.of(position))

    async def checkpoint(self, _: messages.NoParams) -> messages.CheckpointResult:
        """Save now; a client that goes away does not stop it half-way."""
        with anyio.CancelScope(shield=True):
            done = await self.checkpointer.save()
        return messages.CheckpointResult(WirePosition.of(done.position), done.seconds, done.bytes_written)

    async def verify(self, params: messages.VerifyParams) -> messages.VerifyResult:
        """Compare, and mend where asked."""
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
            [messages.SourceVerified(each.source.name, each.outcome, each.reason) for each in done.sources],
            done.seconds,
        )

    async def rebuild(self, params: messages.RebuildParams) -> messages.RebuildResult:
        """Build a dataset anew; it answers all the while."""
        begun = time.monotonic()
        name = self.registry.known(params.dataset).name
        rows = await self.consumer.rebuild(name)
        return messages.RebuildResult(name, rows, time.monotonic() - begun)

    def lag_rows(self, dataset: str) -> int:
        """Outbox rows that this dataset may still have to see, at most; 0 for one that is gone."""
        found = self.registry.by_name.get(full_dataset_name(dataset))
        if found is None or not found.follower.lags:
            return 0
        return max(self.consumer.newest_outbox_id - found.follower.cursor.position.outbox_id, 0)

    def lag_seconds(self, dataset: Dataset) -> float:
        """Since the last completed pass over this dataset's source, while changes of it wait."""
        consumer = self.consumer
        if consumer.connected and not dataset.follower.lags:
            return 0.0
        return consumer.behind(dataset.follower)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Run a long reading beside the event loop, as many at once as there are cores for it."""
        return await to_thread.run_sync(work, limiter=self.search_limit)


class CountedSearch:
    """A search that has to wait, to be counted when it is over. It holds what is awaited, so that ``close`` reaches it."""

    __slots__ = ("begun", "dataset", "methods", "waited")

    def __init__(self, methods: Methods, dataset: str, begun: float, waited: Awaitable[messages.SearchResult]) -> None:
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
        seconds = time.perf_counter() - self.begun
        self.methods.counters.searches_of(full_dataset_name(self.dataset)).answered(seconds)
        return found

    def close(self) -> None:
        """It is not awaited any more."""
        drop(self.waited)


class PreparedSearch:
    """A search whose parameters have been checked, at one view of one dataset."""

    def __init__(self, methods: Methods, params: messages.SearchParams) -> None:
        self.params = params
        self.deadline = time.monotonic() + params.timeout_ms / 1000
        self.dataset = methods.registry.find(params.dataset)
        self.kind = self.dataset.source.key_kind
        self.lag_seconds = methods.lag_seconds(self.dataset)
        self.recall = 1.0 if params.exact else params.recall or methods.recall
        # The position is read before the view, so that it never claims more than the answer holds.
        self.position: Position = self.dataset.follower.cursor.position
        self.view: View = self.dataset.index.view
        self.filter = parse_filter(params.filter or {}, self.view.columns, self.dataset.name)
        self.included = {name: self.read_path(name) for name in params.include or ()}
        self.exclude: Key | None = None
        self.queries = self.read_queries()

    @property
    def elements(self) -> int:
        """How much there is to compare."""
        cost = elements(self.view, len(self.queries), self.params.k, 1.0 if self.filter is not None else self.recall)
        if self.filter is not None and self.view.attributes is not None:
            cost += self.view.attributes.cost(self.view.count, self.filter)
        return cost

    @property
    def query_count(self) -> int:
        """How many queries there are."""
        return len(self.queries)

    @property
    def together_with(self) -> object:
        """Searches of which this is equal may be one; None for "more like this row", which leaves out its own, and for a filter."""
        if self.exclude is not None or self.filter is not None:
            return None
        return id(self.dataset), self.queries.shape[1], self.params.k, self.recall, self.params.max_distance

    def look_at(self, position: Position, view: View) -> None:
        """Search a newer view than the one of the request's arrival."""
        self.position, self.view = position, view

    def read_path(self, name: str) -> Path:
        """A column to include."""
        path = find_path(name, self.view.columns)
        if path is None:
            raise InvalidParams(
                f"dataset {self.dataset.name!r} has no column {shortened(name)!r} to include",
                hint=f"columns: {listed(self.view.columns)}; attach the table again with other columns => for others",
            )
        return path

    def read_queries(self) -> NDArray[np.float32]:
        """The query vectors, (q, dim) float32."""
        params = self.params
        if params.vector is not None:
            return vector_from_wire(params.vector)[None, :]
        if params.vectors is not None:
            queries = [vector_from_wire(vector) for vector in params.vectors]
            for query in queries:
                if len(query) != len(queries[0]):  # one of them is wrong, whatever the dataset's dimension is
                    raise DimensionMismatch(
                        self.dataset.name, expected=self.view.dim or len(queries[0]), got=len(query)
                    )
            return np.stack(queries) if queries else np.empty((0, self.view.dim or 0), dtype=np.float32)
        assert params.key is not None
        self.exclude = key_from_wire(self.kind, params.key)
        vector = self.view.vector_of(self.exclude)
        if vector is None:
            raise UnknownKey(self.dataset.name, params.key)
        return vector[None, :]

    def run(self) -> messages.SearchResult:
        """Search; safe in any thread."""
        return self.result(self.search_in_time(self.queries))

    def result(self, found: Sequence[Found]) -> messages.SearchResult:
        """The answer, of one found for each query."""
        params = self.params
        keys: list[Any] = [self.wire_keys(one) for one in found]
        distances: list[Any] = [one.distances.tolist() for one in found]
        columns: dict[str, list[Any]] | UnsetType = UNSET
        if self.included:
            columns = self.columns_of(found)
        if params.vectors is None:
            keys, distances = keys[0], distances[0]
        return messages.SearchResult(keys, distances, WirePosition.of(self.position), self.lag_seconds, columns)

    def columns_of(self, found: Sequence[Found]) -> dict[str, list[Any]]:
        """The values of the included columns, in the order of the keys."""
        attributes, paths = self.view.attributes, list(self.included.values())
        assert attributes is not None
        each = [attributes.values(paths, self.view.find(one.keys)) for one in found]
        if self.params.vectors is None:
            return dict(zip(self.included, each[0], strict=True))
        return {name: [values[place] for values in each] for place, name in enumerate(self.included)}

    def search_in_time(self, queries: NDArray[np.float32]) -> list[Found]:
        """What is nearest to these queries, all else as asked.

        Some of them at a time, since nothing stops a search of FAISS' half-way; raises ``TimedOut`` between them.
        """
        params, found, passing = self.params, list[Found](), self.view.where(self.filter)
        at_once = max(ELEMENTS_AT_ONCE // max(elements(passing, 1, params.k, self.recall), 1), 1)
        for start in range(0, max(len(queries), 1), at_once):
            if start and time.monotonic() > self.deadline:
                raise TimedOut(
                    f"{start} of {len(queries)} vectors were searched in {params.timeout_ms} ms",
                    hint="send fewer at once, or allow more with timeout_ms",
                )
            found += self.dataset.index.search(
                queries[start : start + at_once],
                params.k,
                exclude=self.exclude,
                max_distance=params.max_distance,
                view=passing,
                recall=self.recall,
            )
        return found

    def wire_keys(self, found: Found) -> list[Any]:
        """One query's keys as JSON has them."""
        return [key_to_wire(self.kind, key) for key in found.keys]


def search_together(searches: Sequence[PreparedSearch]) -> list[messages.SearchResult | Exception]:
    """The answers to searches that have all but their queries in common, from one call where that succeeds."""
    answers: list[messages.SearchResult | Exception] = []
    if len(searches) > 1:
        dataset = searches[0].dataset
        position = dataset.follower.cursor.position  # before the view, as ever
        view = dataset.index.view
        for each in searches:
            each.look_at(position, view)
        with contextlib.suppress(RequestError):  # one query is bad: each for itself
            found = iter(searches[0].search_in_time(np.concatenate([each.queries for each in searches])))
            return [each.result(list(itertools.islice(found, each.query_count))) for each in searches]
    for each in searches:
        try:
            answers.append(each.run())
        except Exception as error:  # noqa: BLE001 - the request's own task raises it
            answers.append(error)
    return answers


def parse_token(token: str) -> int:
    """A token as a transaction id; raises ``InvalidParams``."""
    if not (token.isascii() and token.isdigit() and len(token) <= 20):
        raise InvalidParams(f"{token[:40]!r} is no token", hint="take it from: SELECT syncd.token()")
    return int(token)
