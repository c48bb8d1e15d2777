"""The router's methods: each asks every shard and merges the answers.

Invariant: an answer holds the rows of all shards, or it names those that are missing and the
request allows it.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import anyio
import msgspec
import numpy as np

from syncd.cluster import merge
from syncd.cluster.asking import Asking, Found, missing, no_shards
from syncd.cluster.cuts import AGAIN_SECONDS, FRESH_SECONDS, Cuts
from syncd.cluster.fleet import NAME, Fleet
from syncd.cluster.leading import Leader
from syncd.cluster.replica import Replica, call
from syncd.cluster.scatter import Scattered
from syncd.errors import (
    DimensionMismatch,
    InvalidParams,
    NotReady,
    RequestError,
    ShardsUnavailable,
    SyncdError,
    TimedOut,
    UnknownDataset,
    UnknownKey,
)
from syncd.protocol import messages, status_messages
from syncd.protocol.messages import Params
from syncd.rpc.protocol import Method
from syncd.shard import Shard

GRACE_SECONDS = 0.1
"""Time beyond a request's own for the way: a shard says itself that the time ran out."""
READ_SECONDS = 5.0
"""Time of a read that has no time limit of its own."""
STATUS_SECONDS = 2.0
"""Time of ``status``, which answers without the shards that are late."""
NEXT_KEY = re.compile(r"@(\d+)/(\d+):(.*)", re.DOTALL)
"""The form of ``next``: a shard, and its own ``next`` as JSON."""


class Asked(NamedTuple):
    """The replicas to ask, None for any, and the errors of shards that are left out."""

    replicas: Mapping[Shard, Sequence[Replica]] | None = None
    failures: Mapping[Shard, SyncdError] = MappingProxyType({})


T = TypeVar("T")
P = TypeVar("P", bound=Params)


class Router:
    """The methods of one router. One instance serves all connections."""

    def __init__(self, fleet: Fleet, *, version: str) -> None:
        self.fleet = fleet
        self.asking = Asking(fleet)
        self.cuts = Cuts(self.asking, Leader(fleet.conninfo, NAME))
        self.version = version
        self.searches: Counter[str] = Counter()
        """Searches by outcome: ok, partial, or the kind of the error."""
        self.begun = time.monotonic()

    def table(self) -> Mapping[str, Method[Any, Any]]:
        """The methods by name."""
        m, s = messages, status_messages
        listed = list[s.DatasetStatus]
        return {
            "search": Method(m.SearchParams, m.SearchResult, self.search, "The nearest rows."),
            "get": Method(m.GetParams, m.GetResult, self.get, "Those keys that are indexed."),
            "keys": Method(m.KeysParams, m.KeysResult, self.keys, "Every indexed key, in pages."),
            "datasets": Method(m.NoParams, listed, self.datasets, "Every dataset and its state."),
            "status": Method(m.NoParams, s.ServiceStatus, self.status, "The shards' state."),
            "wait": Method(m.WaitParams, m.WaitResult, self.wait, "Wait for a transaction."),
            "checkpoint": Method(
                m.NoParams, m.CheckpointResult, self.checkpoint, "Save checkpoints now."
            ),
            "verify": Method(
                m.VerifyParams, m.VerifyResult, self.verify, "Compare indexes with their tables."
            ),
            "rebuild": Method(
                m.RebuildParams, m.RebuildResult, self.rebuild, "Build a dataset again."
            ),
            "recall": Method(
                m.RecallParams, m.RecallResult, self.recall, "The recall that searches reach."
            ),
            "why": Method(m.WhyParams, s.WhyResult, self.why, "Why a dataset is as it is."),
        }

    # Reads

    async def search(self, params: messages.SearchParams) -> messages.SearchResult:
        """The nearest rows of all shards."""
        try:
            found = await self.search_all(params)
        except Exception as error:
            self.searches[getattr(error, "kind", RequestError.kind)] += 1
            raise
        self.searches["partial" if found.missing else "ok"] += 1
        return found

    async def search_all(self, params: messages.SearchParams) -> messages.SearchResult:
        """``search``, without the counting."""
        until = anyio.current_time() + params.timeout_ms / 1000 + GRACE_SECONDS
        if params.at == "cut":
            return await self.search_at_cut(params, until)
        return await self.search_shards(params, until, Asked())

    async def search_at_cut(
        self, params: messages.SearchParams, until: float
    ) -> messages.SearchResult:
        """Search at one snapshot of all shards, taken after the position that is asked for."""
        since = anyio.current_time() - FRESH_SECONDS
        if params.after is not None:  # once one shard has its rows, a snapshot has them too
            left = max(until - anyio.current_time(), 0.0)
            token = messages.WaitParams(params.after, timeout_ms=params.timeout_ms)
            waited = await self.asking.ask(call("wait", token, messages.WaitResult), left)
            self.asking.complete(waited, params.partial)
        if params.after is not None or params.consistency == "strong":
            since = anyio.current_time()
            params = msgspec.structs.replace(params, after=None, consistency="eventual")
        late: SyncdError | None = None
        while True:
            try:
                cut = await self.cuts.cut(since, until, params.partial)
            except TimedOut as error:
                raise late or error from None
            at = msgspec.structs.replace(params, at=cut.position)
            try:
                return await self.search_shards(at, until, Asked(cut.replicas, cut.failures))
            except (NotReady, ShardsUnavailable) as error:
                # a source was behind, or a shard was started again: it may be in the next cut
                late = error
                left = until - anyio.current_time() - AGAIN_SECONDS
                if params.partial == "allow" or left < 0:
                    raise
            await anyio.sleep(AGAIN_SECONDS)
            since = anyio.current_time()

    async def search_shards(
        self, params: messages.SearchParams, until: float, of: Asked
    ) -> messages.SearchResult:
        """Search some replicas, and merge their answers."""
        k, without = params.k, None
        if params.key is not None:
            params, without = await self.by_vector(params, until - anyio.current_time(), of)
        seconds = max(until - anyio.current_time(), 0.0)
        asked = call("search", params, messages.SearchResult)
        found = await self.asking.ask(
            asked, seconds, unknown=(UnknownDataset, DimensionMismatch), shards=of.replicas
        )
        found.failures.update(of.failures)
        results = self.asking.complete(found, params.partial)
        refuse_other_dimension(found, many=params.vectors is not None)
        if not results:
            raise UnknownDataset(params.dataset)
        for replica, result in results.values() if params.at is None else ():
            replica.note(result.position, result.lag_seconds)
        merged: messages.SearchResult = merge.search(
            [result for _, result in results.values()],
            k,
            many=params.vectors is not None,
            without=without,
        )
        covered = self.asking.covered(found, params.at)
        position = merge.oldest(covered.positions.values())
        return msgspec.structs.replace(merged, position=position, **covered._asdict())

    async def by_vector(
        self, params: messages.SearchParams, seconds: float, of: Asked
    ) -> tuple[messages.SearchParams, messages.WireKey]:
        """A search for the vector of the row ``key``, and that key as answers name it.

        Only one shard has the row. Its vector is asked for once the shard is at the position that
        the search asks for.
        """
        if params.after is not None or params.consistency == "strong":
            reaching = msgspec.structs.replace(params, k=1, include=None, filter=None)
            found = await self.asking.ask(
                call("search", reaching, messages.SearchResult),
                seconds,
                unknown=(UnknownDataset, UnknownKey),
            )
            self.asking.complete(found, params.partial)
        wanted = messages.GetParams(
            dataset=params.dataset,
            keys=[params.key or 0],
            vectors=True,
            at=params.at,
            partial=params.partial,
        )
        found_rows, results = await self.rows(wanted, seconds, of)
        for result in results:
            for row in result.rows:
                vector = np.asarray(row.vector, dtype="<f4").tobytes()
                k = min(params.k + 1, messages.MAX_RESULTS)
                by = msgspec.structs.replace(params, key=None, vector=vector, k=k)
                return by, row.key
        if missing(found_rows):  # it may be in one of them
            self.asking.complete(found_rows, "refuse")
        raise UnknownKey(params.dataset, params.key)

    async def get(self, params: messages.GetParams) -> messages.GetResult:
        """Those of the requested keys that any shard has."""
        of = Asked()
        if params.at == "cut":
            now = anyio.current_time()
            cut = await self.cuts.cut(now - FRESH_SECONDS, now + READ_SECONDS, params.partial)
            of = Asked(cut.replicas, cut.failures)
            params = msgspec.structs.replace(params, at=cut.position)
        found, results = await self.rows(params, READ_SECONDS, of)
        rows = merge.get(results, params.keys)
        return messages.GetResult(rows, *self.asking.covered(found, params.at))

    async def rows(
        self, params: messages.GetParams, seconds: float, of: Asked
    ) -> tuple[Found[messages.GetResult], list[messages.GetResult]]:
        """What the shards have of some keys; raises ``UnknownDataset`` if no shard knows it."""
        found: Found[messages.GetResult] = await self.asking.ask(
            call("get", params, messages.GetResult),
            seconds,
            unknown=UnknownDataset,
            shards=of.replicas,
        )
        found.failures.update(of.failures)
        results = self.asking.complete(found, params.partial)
        if not results:
            raise UnknownDataset(params.dataset)
        if params.at is None:
            self.asking.note_positions(results.values())
        return found, [result for _, result in results.values()]

    async def keys(self, params: messages.KeysParams) -> messages.KeysResult:
        """One page of keys: those of the first shard come first.

        Every shard is asked, so a missing one is noticed on each page.
        """
        layout = self.fleet.shards
        if not layout:
            raise no_shards()
        shards = sorted(layout)
        first, after = self.place_of(params.after_key, len(shards))
        found: Found[messages.KeysResult] = Scattered()
        keys: list[messages.WireKey] = []
        following: messages.WireKey | None = None
        for shard in shards:
            here = shard.number >= first and following is None
            page = messages.KeysParams(
                dataset=params.dataset,
                after_key=after if shard.number == first else None,
                limit=max(params.limit - len(keys), 1) if here else 1,
            )
            one = await self.asking.ask(
                call("keys", page, messages.KeysResult),
                READ_SECONDS,
                unknown=UnknownDataset,
                shards={shard: layout[shard]},
            )
            found.answers |= one.answers
            found.failures |= one.failures
            for _, result in one.answers.values() if here else ():
                keys += result.keys
                last = shard == shards[-1]
                if result.next is not None or (len(keys) >= params.limit and not last):
                    at = shard.number + (result.next is None)
                    following = f"@{at}/{shard.of}:{msgspec.json.encode(result.next).decode()}"
        results = self.asking.complete(found, params.partial)
        if not results:
            raise UnknownDataset(params.dataset)
        self.asking.note_positions(results.values())
        return messages.KeysResult(keys, following, *self.asking.covered(found))

    def place_of(self, after: Any, shards: int) -> tuple[int, Any]:
        """The shard at which a page begins, and the key in it; raises ``InvalidParams``."""
        if after is None:
            return 0, None
        parts = NEXT_KEY.fullmatch(after) if isinstance(after, str) else None
        if parts is None or int(parts[2]) != shards:
            raise InvalidParams(
                "after_key is not the `next` of a page of this cluster's present layout",
                hint="pass the `next` of the previous page, or begin without after_key",
            )
        return int(parts[1]), msgspec.json.decode(parts[3])

    # State

    async def datasets(self, _: messages.NoParams) -> list[status_messages.DatasetStatus]:
        """Every dataset that any shard has."""
        asked = call("datasets", messages.NoParams(), list[status_messages.DatasetStatus])
        found = await self.asking.ask(asked, READ_SECONDS)
        return merge.datasets([one for _, one in self.asking.complete(found, "refuse").values()])

    async def status(self, _: messages.NoParams) -> status_messages.ServiceStatus:
        """The state of the cluster. It answers whatever the shards do."""
        asked = call("status", messages.NoParams(), status_messages.ServiceStatus)
        found: Found[Any] = Scattered()
        if self.fleet.shards:
            found = await self.asking.ask(asked, STATUS_SECONDS)
        for replica, one in found.answers.values():
            if one.position is not None:
                replica.note(one.position, one.lag_seconds)
        return self.status_of(found)

    def status_of(
        self, found: Found[status_messages.ServiceStatus]
    ) -> status_messages.ServiceStatus:
        """One status from those of the shards that answered."""
        parts = [one for _, one in found.answers.values()]
        covered = self.asking.covered(found)
        saved = [one.checkpoint for one in parts if one.checkpoint.at is not None]
        errors = [one.database_error for one in parts if one.database_error]
        return status_messages.ServiceStatus(
            version=self.version,
            consumer="route",
            state="failed"
            if found.failures or not parts
            else merge.worst(one.state for one in parts),
            position=merge.oldest(covered.positions.values()) if covered.positions else None,
            lag_rows=max((one.lag_rows or 0 for one in parts), default=0),
            lag_seconds=max((one.lag_seconds for one in parts), default=0.0),
            listener_connected=self.fleet.is_listening,
            checkpoint=min(
                saved, key=lambda one: str(one.at), default=status_messages.CheckpointStatus()
            ),
            quarantined=sum(one.quarantined for one in parts),
            uptime_seconds=time.monotonic() - self.begun,
            work=[work for one in parts for work in one.work],
            quarantine=[row for one in parts for row in one.quarantine],
            database_error=self.fleet.database_error or next(iter(errors), None),
            failing_tasks=[task for one in parts for task in one.failing_tasks],
            **covered._asdict(),
        )

    async def why(self, params: messages.WhyParams) -> status_messages.WhyResult:
        """What the shard in the worst state knows of a dataset."""
        asked = call("why", params, status_messages.WhyResult)
        found = self.asking.complete(await self.asking.ask(asked, READ_SECONDS), "refuse")
        results: list[status_messages.WhyResult] = [one for _, one in found.values()]
        return min(
            results,
            key=lambda one: merge.WORST_FIRST.index(one.status.state) if one.status else 100,
        )

    async def recall(self, params: messages.RecallParams) -> messages.RecallResult:
        """The recall that searches of all shards reach."""
        asked = call("recall", params, messages.RecallResult)
        return merge.recall(await self.all_of(asked, params.dataset))

    # Work

    async def wait(self, params: messages.WaitParams) -> messages.WaitResult:
        """Wait until every replica that answers includes a transaction: any may be asked next."""
        seconds = params.timeout_ms / 1000 + GRACE_SECONDS
        asked = call("wait", params, messages.WaitResult)
        found = await self.asking.ask_every_replica(asked, seconds)
        results = self.asking.complete(found, "refuse")
        return messages.WaitResult(merge.oldest(one.position for _, one in results.values()))

    async def checkpoint(self, params: messages.NoParams) -> messages.CheckpointResult:
        """Have every replica save a checkpoint."""
        asked = call("checkpoint", params, messages.CheckpointResult)
        results = self.asking.complete(await self.asking.ask_every_replica(asked, None), "refuse")
        return merge.checkpoint([one for _, one in results.values()])

    async def verify(self, params: messages.VerifyParams) -> messages.VerifyResult:
        """Compare the datasets of all shards with their tables."""
        asked = call("verify", params, messages.VerifyResult)
        return merge.verify(await self.all_of(asked, params.dataset))

    async def rebuild(self, params: messages.RebuildParams) -> messages.RebuildResult:
        """Build a dataset of all shards again."""
        asked = call("rebuild", params, messages.RebuildResult)
        found = await self.asking.ask_every_replica(asked, None, unknown=UnknownDataset)
        results = self.asking.complete(found, "refuse")
        if not results:
            raise UnknownDataset(params.dataset)
        return merge.rebuild([one for _, one in results.values()])

    async def all_of(self, asked: Any, dataset: str | None) -> list[Any]:
        """The answers of all shards that know a dataset, to a request without a time limit."""
        found: Found[Any] = await self.asking.ask(asked, None, unknown=UnknownDataset)
        results = self.asking.complete(found, "refuse")
        if not results:
            raise UnknownDataset(dataset or "")
        return [one for _, one in results.values()]


def refuse_other_dimension(found: Found[messages.SearchResult], *, many: bool) -> None:
    """Raise ``DimensionMismatch`` if a shard did, and no other shard found a row.

    A shard takes a dataset's dimension from its own rows. If its only row has another dimension,
    then one syncd would have that row in quarantine, and would find the others.
    """
    mismatches = [one for one in found.failures.values() if isinstance(one, DimensionMismatch)]
    keys: list[Any] = [result.keys for _, result in found.answers.values()]
    if mismatches and not any(any(map(len, each)) if many else each for each in keys):
        raise mismatches[0]
