"""Reads at a cut, and the methods by which a leader takes one; see ``syncd.sync.consumer.cuts``."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping
from typing import Any

import anyio

from syncd.errors import DatabaseError, InvalidParams, NotReady, TimedOut
from syncd.protocol import cut_messages, messages
from syncd.protocol.messages import At, WirePosition
from syncd.rpc.protocol import Method
from syncd.rpc.reads import Reads
from syncd.sync.background.verify import Verifier
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.consumer.cuts import Imported, Kept, KeptDataset

FRESH_SECONDS = 0.05
"""Age up to which a cut answers a request that asks for no position.

A cut of its own costs a request a pass.
"""


class AtCut:
    """The reads of one service at cuts."""

    def __init__(self, consumer: Consumer, verifier: Verifier, reads: Reads[Any]) -> None:
        self.consumer = consumer
        self.verifier = verifier
        self.cuts = consumer.cuts
        self.reads = reads

    def table(self) -> Mapping[str, Method[Any, Any]]:
        """The leader's methods by name."""
        c = cut_messages
        return {
            "hold": Method(c.HoldParams, c.HoldResult, self.hold, "", listed=False),
            "cut": Method(c.CutParams, c.CutResult, self.cut, "", listed=False),
        }

    async def search(self, params: messages.SearchParams, *, fresh: bool) -> messages.SearchResult:
        """Search at a cut. ``fresh``: its snapshot must not be older than this call."""
        deadline = anyio.current_time() + params.timeout_ms / 1000
        dataset = await self.dataset(params.dataset, params.at, deadline, fresh=fresh)
        prepared = self.reads.prepare_on(params, dataset, dataset.age_seconds)
        found = self.reads.run(prepared, max(deadline - anyio.current_time(), 0))
        return found if isinstance(found, messages.SearchResult) else await found

    async def get(self, params: messages.GetParams) -> messages.GetResult:
        """Rows at a cut."""
        deadline = anyio.current_time() + messages.DEFAULT_TIMEOUT_MS / 1000
        dataset = await self.dataset(params.dataset, params.at, deadline, fresh=False)
        found = self.reads.get_of(dataset, params)
        return await found if isinstance(found, Awaitable) else found

    async def dataset(
        self, name: str, at: At | None, deadline: float, *, fresh: bool
    ) -> KeptDataset:
        """A dataset at a cut that is kept, or at the cut of another pass."""
        if isinstance(at, WirePosition):
            return self.cuts.find(self.cuts.at(at), name)
        self.consumer.registry.find(name)
        since = time.monotonic() - (0 if fresh else FRESH_SECONDS)
        kept = self.cuts.newest(since)
        self.cuts.own_wanted += 1
        try:
            with anyio.fail_after(max(deadline - anyio.current_time(), 0)):
                while True:
                    try:
                        if kept is not None:
                            return self.cuts.find(kept, name)
                    except NotReady:
                        self.consumer.registry.find(name)
                    kept = await self.next_cut()
        except DatabaseError as error:
            raise NotReady(f"no snapshot can be taken: {error.message}", hint=error.hint) from None
        except TimeoutError:
            raise self.consumer.timed_out("no pass has brought the dataset to a snapshot") from None
        finally:
            self.cuts.own_wanted -= 1

    async def next_cut(self) -> Kept | None:
        """The cut of the next pass that begins; None if the pass kept none."""
        consumer, since = self.consumer, time.monotonic()
        needed = consumer.passes_begun + 1
        await consumer.next_pass_until(lambda: consumer.passes_done >= needed)
        return self.cuts.newest(since)

    async def hold(self, params: cut_messages.HoldParams) -> cut_messages.HoldResult:
        """Take no snapshot until ``cut``."""
        if not self.consumer.connected:
            error = self.consumer.unreachable()
            raise NotReady(f"no snapshot can be imported: {error.message}", hint=error.hint)
        try:
            await self.cuts.hold(params.timeout_ms / 1000)
        except TimedOut as error:
            raise NotReady(error.message, hint=error.hint) from None
        position = WirePosition.of(self.consumer.position)
        return cut_messages.HoldResult({self.reads.shard.name: position})

    async def cut(self, params: cut_messages.CutParams) -> cut_messages.CutResult:
        """Bring the indexes to the leader's snapshot, and keep their views."""
        imported = None
        if params.snapshot is not None:
            if params.position is None:
                raise InvalidParams("a snapshot without a position")
            imported = Imported(
                params.snapshot, params.position, frozenset(params.tables), params.blocked
            )
        if imported is not None and params.verify:
            await self.verifier.take_cut(imported)
        else:
            await self.cuts.take(imported)
        position = params.position or WirePosition.of(self.consumer.position)
        return cut_messages.CutResult({self.reads.shard.name: position})
