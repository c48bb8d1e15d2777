"""Cuts of a fleet: one snapshot that one replica of each shard has views of.

Invariant: all answers at a cut have its position. Nothing is exported while no client asks for one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import anyio

from syncd.cluster import merge
from syncd.cluster.asking import Asking, no_shards
from syncd.cluster.leading import IDLE_SECONDS, Exported, Leader
from syncd.cluster.replica import Replica, call
from syncd.cluster.scatter import choice
from syncd.errors import NotReady, SyncdError, TimedOut
from syncd.protocol.cut_messages import CutParams, CutResult, HoldParams, HoldResult
from syncd.protocol.messages import Partial, WirePosition
from syncd.shard import Shard

FRESH_SECONDS = 0.05
"""Age up to which a cut answers a request that asks for no position."""
HOLD_SECONDS = 0.5
"""Longest wait for the passes under way to end. A shard that takes longer is missing in the cut."""
PASS_SECONDS = 5.0
"""Longest wait for the shards' passes at the snapshot."""
GRACE_SECONDS = 0.1
"""Time beyond that for the way."""
AGAIN_SECONDS = 0.1
"""Pause after an attempt in which a shard was late. The shards' own passes go on meanwhile."""

Replicas = Mapping[Shard, Sequence[Replica]]


@dataclass(frozen=True, slots=True)
class Cut:
    """A cut: the replicas that have it, and why the other shards do not.

    ``since`` is the time (``anyio.current_time``) after which its snapshot was taken.
    """

    position: WirePosition
    replicas: Replicas
    failures: Mapping[Shard, SyncdError]
    since: float


class Cuts:
    """Takes the cuts of one router, one at a time; requests share them."""

    def __init__(self, asking: Asking, leader: Leader) -> None:
        self.asking = asking
        self.leader = leader
        self.newest: Cut | None = None
        self.taken = 0
        """Number of cuts since the start."""
        self._taking = anyio.Lock()

    async def cut(self, since: float, until: float, partial: Partial) -> Cut:
        """A cut whose snapshot was taken after ``since``, within the time ``until``.

        Raises ``ShardsUnavailable`` if a shard is missing that the request does not allow to be,
        ``NotReady`` and ``TimedOut``.
        """
        while True:
            try:
                with anyio.fail_after(max(until - anyio.current_time(), 0.0)):
                    async with self._taking:
                        found = self.usable(since, partial)
                        if found is None:
                            found = self.newest = await self.take()
            except TimeoutError:
                raise TimedOut(
                    "no snapshot for all shards was taken in time",
                    hint="allow more with timeout_ms; see: syncd cluster status",
                ) from None
            if not found.failures or (partial == "allow" and found.replicas):
                return found
            late = all(self.is_late(*each) for each in found.failures.items())
            if not late or until - anyio.current_time() < HOLD_SECONDS + AGAIN_SECONDS:
                raise self.asking.unavailable(found.failures, {**found.replicas, **found.failures})
            await anyio.sleep(AGAIN_SECONDS)

    def is_late(self, shard: Shard, error: SyncdError) -> bool:
        """Whether a shard may be in the next cut: it was late, or its tables changed."""
        asked = choice(self.asking.fleet.shards.get(shard, ()))
        return bool(asked) and isinstance(error, NotReady | TimedOut)

    def usable(self, since: float, partial: Partial) -> Cut | None:
        """The newest cut, if it may answer."""
        found = self.newest
        if found is None or found.since < since or (found.failures and partial == "refuse"):
            return None
        present = self.asking.fleet.shards
        if found.replicas.keys() | found.failures.keys() != present.keys():
            return None  # another layout answers
        if any(
            each not in present[shard] for shard, some in found.replicas.items() for each in some
        ):
            return None
        return found if found.replicas else None

    async def close_idle(self) -> None:
        """Close the leader's connection when no cut is asked for any more, until cancelled."""
        while True:
            await anyio.sleep(IDLE_SECONDS / 2)
            if not self._taking.locked():
                await self.leader.close_idle()

    async def take(self) -> Cut:
        """Take a cut of one replica of each shard."""
        shards = self.asking.fleet.shards
        if not shards:
            raise no_shards()
        asked = {shard: choice(some)[:1] or list(some) for shard, some in shards.items()}
        async with self.leader.lead() as connection:
            failures: dict[Shard, SyncdError] = {}
            try:
                holding, positions = await self.hold(asked, failures)
                since = anyio.current_time()
                exported = await self.leader.export(connection, merge.oldest(positions))
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await self.release(asked)
                raise
            replicas = await self.bring(holding, exported, failures)
        self.taken += 1
        return Cut(exported.position, replicas, failures, since)

    async def hold(
        self, asked: Replicas, failures: dict[Shard, SyncdError]
    ) -> tuple[Replicas, list[WirePosition]]:
        """Let one replica of each shard hold; those that do, and their positions."""
        params = HoldParams(timeout_ms=round(HOLD_SECONDS * 1000))
        found = await self.asking.ask(
            call("hold", params, HoldResult), HOLD_SECONDS + GRACE_SECONDS, shards=asked
        )
        failures.update(found.failures)
        if not found.answers:
            raise self.asking.unavailable(failures, failures)
        holding = {shard: [replica] for shard, (replica, _) in found.answers.items()}
        positions = [
            position for _, one in found.answers.values() for position in one.positions.values()
        ]
        return holding, positions

    async def release(self, holding: Replicas) -> None:
        """Let passes go on."""
        asked = call("cut", CutParams(), CutResult)
        await self.asking.ask(asked, HOLD_SECONDS, shards=holding)

    async def bring(
        self, holding: Replicas, exported: Exported, failures: dict[Shard, SyncdError]
    ) -> Replicas:
        """Bring the shards to the leader's snapshot; those that are."""
        params = CutParams(
            exported.snapshot, exported.position, tuple(exported.tables), exported.blocked
        )
        found = await self.asking.ask(call("cut", params, CutResult), PASS_SECONDS, shards=holding)
        failures.update(found.failures)
        return {shard: [replica] for shard, (replica, _) in found.answers.items()}
