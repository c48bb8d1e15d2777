"""A verify of all replicas of a cluster at one snapshot.

All of them capture their indexes and their tables at once, at the leader's snapshot. Then they
compare, two at a time, while the leader's transaction is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio

from syncd.cluster import merge
from syncd.cluster.layout import Registered
from syncd.cluster.leading import Leader, TooManyTables
from syncd.cluster.replica import Replica, call
from syncd.errors import NotReady, SyncdError, TimedOut
from syncd.protocol.cut_messages import CutParams, CutResult, HoldParams, HoldResult
from syncd.protocol.messages import VerifyParams, VerifyResult, WirePosition
from syncd.settings import Settings
from syncd.supervision import first_cause

TRY_SECONDS = 20.0
"""How long it is tried to bring all replicas to one snapshot."""
AGAIN_SECONDS = 0.2
"""Pause between two attempts."""
HOLD_SECONDS = 1.0
"""Longest wait for the passes under way to end."""
CAPTURE_SECONDS = 30.0
"""Longest wait for the passes at the snapshot."""
GRACE_SECONDS = 0.5
"""Time beyond that for the way."""
NAME = "cluster"
"""Name of the leader's connection, in place of a consumer's."""


async def verify_together(
    settings: Settings, registered: Sequence[Registered], *, deep: bool
) -> list[VerifyResult] | None:
    """The results of all replicas at one snapshot, in their order.

    None if they cannot be brought to one: a shard is behind, a table is locked or compared, or
    there are too many tables.
    Other errors of a replica are raised.
    """
    token = settings.token.get_secret_value() or None
    replicas = [Replica(each, token) for each in registered]
    leader = Leader(settings.conninfo, NAME)
    try:
        until = anyio.current_time() + TRY_SECONDS
        while True:
            try:
                position = await capture(leader, replicas)
                break
            except TooManyTables:
                return None
            except (NotReady, TimedOut):  # one that is frozen is named when it is asked alone
                if anyio.current_time() > until:
                    return None
            await anyio.sleep(AGAIN_SECONDS)
        verify = call("verify", VerifyParams(deep=deep, at=position), VerifyResult)
        return await ask_each(replicas, verify, None)
    finally:
        with anyio.CancelScope(shield=True):
            await leader.close()
            for each in replicas:
                await each.close()


async def capture(leader: Leader, replicas: Sequence[Replica]) -> WirePosition:
    """Let every replica capture its indexes at one snapshot; raises ``NotReady``."""
    hold = call("hold", HoldParams(timeout_ms=round(HOLD_SECONDS * 1000)), HoldResult)
    async with leader.lead() as connection:
        try:
            held: list[HoldResult] = await ask_each(replicas, hold, HOLD_SECONDS + GRACE_SECONDS)
            oldest = merge.oldest(one for each in held for one in each.positions.values())
            exported = await leader.export(connection, oldest, every=True)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await release(replicas)
            raise
        params = CutParams(
            exported.snapshot,
            exported.position,
            tuple(exported.tables),
            exported.blocked,
            verify=True,
        )
        await ask_each(replicas, call("cut", params, CutResult), CAPTURE_SECONDS + GRACE_SECONDS)
    return exported.position


async def release(replicas: Sequence[Replica]) -> None:
    """Let passes go on. A replica that does not answer lets them go on by itself."""
    for each in replicas:
        try:
            await each.ask(call("cut", CutParams(), CutResult), HOLD_SECONDS)
        except SyncdError:
            continue


async def ask_each(replicas: Sequence[Replica], asked: Any, seconds: float | None) -> list[Any]:
    """The answers of all replicas, in their order; raises the first error."""
    answers: dict[int, Any] = {}

    async def ask(number: int) -> None:
        answers[number] = await replicas[number].ask(asked, seconds)

    try:
        async with anyio.create_task_group() as tasks:
            for number in range(len(replicas)):
                tasks.start_soon(ask, number)
    except BaseExceptionGroup as group:
        raise first_cause(group) from None
    return [answers[number] for number in range(len(replicas))]
