"""The methods that a reader answers itself, and what it reports of them.

A search that waits for a position asks the main process to say when it is reached: by then that
position is published. The main process learns counts and a sample of the queries with each report.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Generator, Mapping
from random import random
from typing import Any, Generic, TypeVar

import msgspec

from syncd.index.asked import FILTER_BYTES
from syncd.index.rows.vectors import Vectors
from syncd.protocol import messages
from syncd.protocol.messages import Params, SearchParams
from syncd.readers.shelf import Busy, NotHere, ReaderDataset, Shelf
from syncd.rpc.dispatch import drop
from syncd.rpc.inputs import Inputs
from syncd.rpc.protocol import Method
from syncd.rpc.reads import Reads, failure_kind
from syncd.shard import Shard
from syncd.sync.registry.counters import Searches
from syncd.types import DatasetName

T = TypeVar("T")
P = TypeVar("P", bound=Params)

REPORTED_QUERIES = 512
"""Queries of one dataset in one report at most, until ``FIRST_QUERIES`` were reported: the main
process's sample is full then.
"""
FIRST_QUERIES = 2048
LATER_QUERIES = 32
"""Queries of one dataset in each later report at most; a report is sent each second."""
REPORT_BYTES = 4 << 20
"""Bytes of the queries in one report at most, before they are encoded.

The main process closes a link whose line is longer than its limit, 16 MiB.
"""
SEARCH_THREADS = 2
"""Searches in worker threads of one reader at once; the event loop runs the shorter ones."""


class NotYet(NotHere):
    """A search that is to be answered at a position that the main process knows."""

    def __init__(self, params: SearchParams) -> None:
        super().__init__()
        self.params = params


class CountedSearches(msgspec.Struct):
    """Searches of one dataset since the last report; see ``Searches``."""

    counts: list[int]
    seconds: float
    outcomes: dict[str, int]


class AskedQuery(msgspec.Struct, frozen=True):
    """A query of a search by codes: a row's own key, or a vector of little-endian float32."""

    dataset: DatasetName
    vector: bytes
    filter: msgspec.Raw
    key: msgspec.Raw


class ReportParams(Params, frozen=True):
    """What a reader did since its last report; ``answers`` is the number of the order it obeys."""

    seat: int
    searches: dict[DatasetName, CountedSearches]
    queries: list[AskedQuery]
    answers: int = 0


class Answering:
    """The methods of one reader."""

    def __init__(
        self,
        shelf: Callable[[Answering], Shelf],
        busy: Busy,
        inputs: Inputs,
        recall: float,
        shard: Shard,
    ) -> None:
        self.busy = busy
        self.shelf = shelf(self)
        self.reads: Reads[ReaderDataset] = Reads(
            self.shelf.find,
            ReaderDataset.lag_seconds,
            inputs=inputs,
            threads=SEARCH_THREADS,
            recall=recall,
            shard=shard,
        )
        self._searches: dict[DatasetName, Searches] = {}
        self._queries: dict[DatasetName, list[AskedQuery]] = {}
        self._seen: dict[DatasetName, int] = {}
        self._bytes = 0
        self._reported: Counter[DatasetName] = Counter()

    def table(self) -> Mapping[str, Method[Any, Any]]:
        """The methods by name."""
        return {
            "search": Method(SearchParams, messages.SearchResult, self.search, ""),
            "get": Method(messages.GetParams, messages.GetResult, self.guarded(self.get), ""),
            "keys": Method(
                messages.KeysParams, messages.KeysResult, self.guarded(self.reads.keys), ""
            ),
        }

    def get(self, params: messages.GetParams) -> messages.GetResult | Awaitable[messages.GetResult]:
        """Rows now. Raises ``NotHere`` if a cut is asked for: the main process keeps them."""
        if params.at is not None:
            raise NotHere
        return self.reads.get(params)

    def guarded(self, method: Callable[[P], T | Awaitable[T]]) -> Callable[[P], T | Awaitable[T]]:
        """A method that is busy until its answer is there."""

        def call(params: P) -> T | Awaitable[T]:
            ticket = self.busy.enter()
            try:
                found = method(params)
            except BaseException:
                self.busy.leave(ticket)
                raise
            if isinstance(found, Awaitable):
                return UnderWay(found, lambda _: self.busy.leave(ticket))
            self.busy.leave(ticket)
            return found

        return call

    def search(
        self, params: SearchParams
    ) -> messages.SearchResult | Awaitable[messages.SearchResult]:
        """Search now. Raises ``NotYet`` if a position is asked for, and ``NotHere``."""
        if params.at is not None:
            raise NotHere
        if params.after is not None or params.consistency == "strong":
            self.guarded(self.check_shared)(params)
            raise NotYet(params)
        begun, ticket = time.perf_counter(), self.busy.enter()
        name: list[DatasetName] = []

        def ended(error: BaseException | None) -> None:
            self.busy.leave(ticket)
            if name and not isinstance(error, NotHere):
                self.count(name[0], begun, error)

        try:
            name.append(self.shelf.find(params.dataset).name)
            found = self.reads.run(self.reads.prepare(params), params.timeout_ms / 1000)
        except BaseException as error:
            ended(error)
            raise
        if isinstance(found, Awaitable):
            return UnderWay(found, ended)
        ended(None)
        return found

    def check_shared(self, params: SearchParams) -> None:
        """Raise ``NotHere`` if the dataset of a search is not shared."""
        self.shelf.find(params.dataset)

    def count(self, name: DatasetName, begun: float, error: BaseException | None) -> None:
        """Count a search that ended."""
        searches = self._searches.get(name)
        if searches is None:
            searches = self._searches[name] = Searches()
        if error is None:
            searches.answered(time.perf_counter() - begun)
        else:
            searches.outcomes[failure_kind(error)] += 1

    def note_queries(self, name: DatasetName, params: SearchParams, queries: Vectors) -> None:
        """Sample the queries of a search: each one since the last report has the same chance.

        Left out are those that the main process would not keep, and those for which a report has no
        room. Any thread may call it: two at once may lose a query.
        """
        wanted = msgspec.json.encode(params.filter)
        if len(wanted) > FILTER_BYTES:
            return
        key = msgspec.json.encode(params.key)
        sample = self._queries.setdefault(name, [])
        room = REPORTED_QUERIES if self._reported[name] < FIRST_QUERIES else LATER_QUERIES
        for query in queries:
            seen = self._seen[name] = self._seen.get(name, 0) + 1
            place = len(sample)
            if place >= room:
                place = int(random() * seen)  # noqa: S311 - a sample, not a secret
                if place >= room:
                    continue
            asked = AskedQuery(name, query.tobytes(), msgspec.Raw(wanted), msgspec.Raw(key))
            grows = size_of(asked) - sum(map(size_of, sample[place : place + 1]))
            if self._bytes + grows <= REPORT_BYTES:
                self._bytes += grows
                sample[place : place + 1] = [asked]

    def tidy(self) -> None:
        """See ``Shelf.tidy``."""
        ticket = self.busy.enter()
        try:
            self.shelf.tidy()
        finally:
            self.busy.leave(ticket)

    def report(self, seat: int, answers: int = 0) -> ReportParams:
        """What happened since the last report."""
        searches, self._searches = self._searches, {}
        queries, self._queries, self._seen, self._bytes = self._queries, {}, {}, 0
        for name, some in queries.items():
            self._reported[name] += len(some)
        return ReportParams(
            seat=seat,
            searches={
                name: CountedSearches(each.seconds.counts, each.seconds.sum, dict(each.outcomes))
                for name, each in searches.items()
            },
            queries=[each for some in queries.values() for each in some],
            answers=answers,
        )


def size_of(query: AskedQuery) -> int:
    """Bytes of a query, before it is encoded."""
    return len(query.vector) + len(bytes(query.filter)) + len(bytes(query.key))


class UnderWay(Generic[T]):
    """An awaitable that calls ``ended`` once, with its error or None."""

    __slots__ = ("_ended", "_waited")

    def __init__(self, waited: Awaitable[T], ended: Callable[[BaseException | None], None]) -> None:
        self._waited = waited
        self._ended: Callable[[BaseException | None], None] | None = ended

    def __await__(self) -> Generator[Any, Any, T]:
        try:
            found = yield from self._waited.__await__()
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)
        return found

    def close(self) -> None:
        """Close the inner awaitable, if this one is never awaited."""
        drop(self._waited)
        self._end(GeneratorExit())

    def _end(self, error: BaseException | None) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended(error)
