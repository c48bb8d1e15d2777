"""The RPC methods, bound to the indexes and the consumer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping
from typing import Any

import anyio
import msgspec

from syncd.errors import (
    InvalidParams,
    NotReady,
    TimedOut,
    UnknownDataset,
)
from syncd.protocol import messages, status_messages
from syncd.protocol.messages import WirePosition
from syncd.protocol.wire import key_to_wire
from syncd.rpc.at_cut import AtCut
from syncd.rpc.counted_search import CountedSearch
from syncd.rpc.inputs import Inputs
from syncd.rpc.protocol import Method
from syncd.rpc.reads import Reads, failure_kind
from syncd.shard import Shard
from syncd.sync.background.checkpoints import Checkpointer
from syncd.sync.background.diagnosis import Diagnosis
from syncd.sync.background.status import Status
from syncd.sync.background.verify import Verifier
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.registry.counters import OTHER
from syncd.sync.registry.datasets import Follower, Registry
from syncd.types import Token, full_dataset_name

IN_PLACE_DATASETS = 500
"""Above this number of datasets a worker thread lists them: each takes 10 µs."""
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
        shard: Shard,
    ) -> None:
        self.consumer = consumer
        self.registry: Registry = consumer.registry
        self.counters = consumer.registry.counters
        self.checkpointer = checkpointer
        self.verifier = verifier
        self.current = status
        self.diagnosis = Diagnosis(status)
        self.recall = recall
        self.reads = Reads(
            self.registry.find,
            status.lag_seconds,
            inputs=inputs,
            threads=search_threads,
            recall=recall,
            shard=shard,
        )
        self.at_cut = AtCut(consumer, verifier, self.reads)

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
                messages.GetParams,
                messages.GetResult,
                self.get,
                "Those keys that are indexed.",
            ),
            "keys": Method(
                messages.KeysParams,
                messages.KeysResult,
                self.reads.keys,
                "Every indexed key, in pages.",
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
            **self.at_cut.table(),
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
        counted = self.counters.searches_of(name if name in self.registry.by_name else OTHER)
        counted.outcomes[failure_kind(error)] += 1

    def search(
        self, params: messages.SearchParams
    ) -> messages.SearchResult | Awaitable[messages.SearchResult]:
        """Run a small search here, a large one in a worker thread; wait if a position is asked."""
        if params.after is not None or params.consistency == "strong":
            return self.search_later(params)
        if params.at is not None:
            return self.at_cut.search(params, fresh=False)
        return self.reads.run(self.reads.prepare(params), params.timeout_ms / 1000)

    async def search_later(self, params: messages.SearchParams) -> messages.SearchResult:
        """Search at a position that the client asked for.

        The dataset may come into being before that position is reached.
        """
        deadline = anyio.current_time() + params.timeout_ms / 1000
        await self.reach(params.dataset, params.after, params.consistency, params.timeout_ms / 1000)
        if params.at is not None:
            left = max(int((deadline - anyio.current_time()) * 1000), 0)
            later = msgspec.structs.replace(params, timeout_ms=left)
            return await self.at_cut.search(later, fresh=True)
        found = self.reads.run(self.reads.prepare(params), max(deadline - anyio.current_time(), 0))
        return found if isinstance(found, messages.SearchResult) else await found

    async def reach(
        self, dataset: str, after: str | None, consistency: str, seconds: float
    ) -> None:
        """Return when a dataset is at the position that a search asks for.

        The dataset may come into being before. Raises ``TimedOut``, and the error of a dataset that
        does not answer.
        """
        deadline = anyio.current_time() + seconds
        try:
            follower = self.registry.find(dataset).follower
            await self.wait_for_position(after, consistency, follower, deadline)
        except (UnknownDataset, NotReady) as error:
            try:
                # None: any source may bring the dataset into being
                await self.wait_for_position(after, consistency, None, deadline)
            except TimedOut:
                raise error from None

    async def wait_for_position(
        self, after: str | None, consistency: str, follower: Follower | None, deadline: float
    ) -> None:
        """Return when one source, or all, are at the position that a search asks for.

        Raises ``TimedOut``.
        """
        if after is not None:
            seconds = max(deadline - anyio.current_time(), 0)
            await self.consumer.wait_for_token(parse_token(after), seconds, follower)
        if consistency == "strong":
            await self.consumer.wait_for_now(max(deadline - anyio.current_time(), 0), follower)

    def get(self, params: messages.GetParams) -> messages.GetResult | Awaitable[messages.GetResult]:
        """Those of the requested keys that are indexed, now or at a cut."""
        return self.reads.get(params) if params.at is None else self.at_cut.get(params)

    def datasets(
        self, _: messages.NoParams
    ) -> list[status_messages.DatasetStatus] | Awaitable[msgspec.Raw]:
        """Every known dataset, by name, with those that no longer have rows.

        A worker thread encodes the answer if there are more than ``IN_PLACE_DATASETS``.
        """
        if len(self.registry.by_name) + len(self.registry.retired) <= IN_PLACE_DATASETS:
            return self.current.datasets()
        return self.reads.in_thread(
            lambda: msgspec.Raw(msgspec.json.encode(self.current.datasets()))
        )

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
            return self.reads.in_thread(lambda: self.diagnosis.of(name))
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

        return self.reads.in_thread(measure)

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
        done = (
            await self.verifier.verify(names, repair=params.repair, deep=params.deep)
            if params.at is None
            else await self.verifier.verify_cut(params.at.snapshot, deep=params.deep)
        )
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


def parse_token(token: str) -> Token:
    """Parse a request's token; raises ``InvalidParams``."""
    try:
        return Token.parse(token)
    except ValueError:
        raise InvalidParams(
            f"{token[:40]!r} is not a valid token", hint="take it from: SELECT syncd.token()"
        ) from None
