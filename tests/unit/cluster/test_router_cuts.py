"""Cuts of a router, over replicas and a leader that do what a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from syncd.cluster import cuts
from syncd.cluster.leading import Exported
from syncd.cluster.router import Router
from syncd.errors import NotReady, ServiceUnavailable, ShardsUnavailable, UnknownDataset
from syncd.protocol.cut_messages import CutResult, HoldResult
from syncd.protocol.messages import SearchParams, SearchResult, WirePosition
from syncd.shard import Shard
from tests.unit.cluster.test_router import OLD, hits, router

pytestmark = pytest.mark.anyio
AT = WirePosition("7:7:", 5)
SEARCH = SearchParams(dataset="d", vector=[0.0], at="cut")
STRONG = SearchParams(dataset="d", vector=[0.0], at="cut", consistency="strong")


class FakeLeader:
    """A leader that exports ``AT``, and counts."""

    def __init__(self) -> None:
        self.exports = 0

    @asynccontextmanager
    async def lead(self) -> AsyncIterator[None]:
        yield

    async def export(self, _: object, oldest: WirePosition) -> Exported:
        assert oldest == OLD
        self.exports += 1
        return Exported("name", AT)


def cutting(*shards: list[Any]) -> tuple[Router, FakeLeader]:
    """A router of shards with one replica each, and its leader."""
    one, leader = router(*([outcomes] for outcomes in shards)), FakeLeader()
    fake: Any = leader
    one.cuts.leader = fake
    return one, leader


def cut(shard: str, found: Any) -> list[Any]:
    """The answers of a shard: to hold, to the snapshot, to the search."""
    return [HoldResult({shard: OLD}), CutResult({shard: AT}), found]


def at_cut(shard: str, *keys: int) -> SearchResult:
    return hits(shard, AT, *keys)


async def test_every_shard_that_answers_is_at_the_snapshot() -> None:
    one, leader = cutting(
        cut("0/2", at_cut("0/2", 3)),
        cut("1/2", UnknownDataset("d")),
    )
    one.fleet.shards[Shard(2, 1)][0].position = OLD
    found = await one.search(SEARCH)
    assert (found.keys, found.coverage) == ([3], 1.0)
    assert found.positions == {"0/2": AT, "1/2": AT}
    assert found.position == AT
    assert leader.exports == 1


async def test_without_a_cut_nothing_is_exported_and_requests_at_once_share_one() -> None:
    one, leader = cutting([at_cut("0/1", 1)])
    await one.search(SearchParams(dataset="d", vector=[0.0]))
    assert leader.exports == 0
    one, leader = cutting(cut("0/1", at_cut("0/1", 1)))
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(one.search, STRONG)
    assert leader.exports == 1


async def test_a_shard_that_has_lost_the_cut_is_in_the_next_one() -> None:
    first = cut("1/2", NotReady("not kept"))
    one, leader = cutting(
        cut("0/2", at_cut("0/2", 1)) + cut("0/2", at_cut("0/2", 1)),
        first + cut("1/2", at_cut("1/2", 2)),
    )
    assert (await one.search(SEARCH)).keys == [1, 2]
    assert leader.exports == 2


async def test_a_late_shard_is_waited_for_or_missing_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shards() -> tuple[list[Any], list[Any]]:
        # in the first cut the second shard does not hold
        return (
            cut("0/2", at_cut("0/2", 1))[:2] + cut("0/2", at_cut("0/2", 1)),
            [NotReady("it reads"), *cut("1/2", at_cut("1/2", 2))],
        )

    one, leader = cutting(*shards())
    assert (await one.search(SEARCH)).keys == [1, 2]
    assert leader.exports == 2
    here, late = shards()
    one, leader = cutting([*here[:2], at_cut("0/2", 1)], late)
    found = await one.search(SearchParams(dataset="d", vector=[0.0], at="cut", partial="allow"))
    assert (found.keys, found.positions) == ([1], {"0/2": AT})
    assert [(each.shard, each.reason) for each in found.missing] == [("1/2", "it reads")]
    one, leader = cutting(here, [NotReady("it reads")])
    hurried = SearchParams(dataset="d", vector=[0.0], at="cut", timeout_ms=60_000)
    monkeypatch.setattr(cuts, "HOLD_SECONDS", 100.0)  # no time for another attempt
    with pytest.raises(ShardsUnavailable, match="1 of 2 shards did not answer: 1/2: it reads"):
        await one.search(hurried)


async def test_a_shard_that_is_gone_is_not_waited_for() -> None:
    one, _ = cutting(cut("0/2", at_cut("0/2", 1)), [ServiceUnavailable("gone")])
    with pytest.raises(ShardsUnavailable, match="1/2: gone"):
        await one.search(SEARCH)
    assert await one.search(SearchParams(dataset="d", vector=[0.0], at="cut", partial="allow"))


async def test_another_layout_takes_another_cut() -> None:
    one, leader = cutting(cut("0/1", at_cut("0/1", 1)))
    await one.search(SEARCH)
    other, _ = cutting(cut("0/2", at_cut("0/2", 1)), cut("1/2", at_cut("1/2", 2)))
    one.fleet.shards = other.fleet.shards
    assert (await one.search(SEARCH)).keys == [1, 2]
    assert leader.exports == 2
