"""The router's methods, over replicas that do what a test says."""

from __future__ import annotations

from typing import Any

import pytest

from syncd.cluster.fleet import Fleet
from syncd.cluster.layout import Registered
from syncd.cluster.replica import Replica
from syncd.cluster.router import Router
from syncd.errors import (
    DimensionMismatch,
    InvalidParams,
    NotReady,
    Overloaded,
    ServiceUnavailable,
    ShardsUnavailable,
    SyncdError,
    UnknownDataset,
)
from syncd.protocol.messages import (
    KeysParams,
    KeysResult,
    NoParams,
    SearchParams,
    SearchResult,
    WaitParams,
    WaitResult,
    WirePosition,
)
from syncd.shard import Shard

pytestmark = pytest.mark.anyio
OLD, NEW = WirePosition("5:5:", 1), WirePosition("9:9:", 2)
SEARCH = SearchParams(dataset="d", vector=[0.0])


class FakeClient:
    """Answers what it is told to each method, in turns."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes = list(outcomes)

    def begin(self, _: Any) -> None:
        """It has no open connection."""

    async def run(self, _: Any) -> Any:
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, SyncdError):
            raise outcome
        return outcome


def router(*shards: list[list[Any]]) -> Router:
    """A router of shards; each has replicas, and each replica its outcomes."""
    fleet = Fleet("", None)
    found: dict[Shard, list[Replica]] = {}
    for number, replicas in enumerate(shards):
        shard = Shard(len(shards), number)
        for place, outcomes in enumerate(replicas):
            one = Replica(Registered(f"s{number}-{place}", shard, "", "/x"), None)
            client: Any = FakeClient(*outcomes)
            one.client = client
            found.setdefault(shard, []).append(one)
    fleet.shards = found
    return Router(fleet, version="")


def hits(shard: str, position: WirePosition, *keys: int) -> SearchResult:
    return SearchResult(list(keys), [float(key) for key in keys], position, 0.0, positions={
        shard: position
    })  # fmt: skip


async def test_a_shard_without_the_dataset_has_answered() -> None:
    one = router([[hits("0/2", NEW, 3)]], [[UnknownDataset("d")]])
    one.fleet.shards[Shard(2, 1)][0].position = OLD
    found = await one.search(SEARCH)
    assert (found.keys, found.coverage, found.missing) == ([3], 1.0, [])
    assert found.positions == {"0/2": NEW, "1/2": OLD}
    assert found.position == OLD
    with pytest.raises(UnknownDataset):
        await router([[UnknownDataset("d")]], [[UnknownDataset("d")]]).search(SEARCH)


async def test_a_shard_whose_only_row_has_another_dimension_does_not_hide_the_other_rows() -> None:
    mismatch = DimensionMismatch("d", expected=3, got=1)
    found = await router([[hits("0/2", NEW, 0)]], [[mismatch]]).search(SEARCH)
    assert (found.keys, found.coverage, found.missing) == ([0], 1.0, [])
    for others in ([mismatch], [hits("0/2", NEW)], [UnknownDataset("d")]):
        with pytest.raises(DimensionMismatch):
            await router([others], [[mismatch]]).search(SEARCH)


@pytest.mark.parametrize(
    ("errors", "raised"),
    [
        ([NotReady("reading"), NotReady("reading")], NotReady),
        ([hits("0/2", NEW, 3), NotReady("reading")], ShardsUnavailable),
        ([hits("0/2", NEW, 3), Overloaded(3)], Overloaded),
        ([ServiceUnavailable("gone"), Overloaded(3)], ShardsUnavailable),
    ],
)
async def test_a_whole_answer_is_refused_with_the_kind_that_tells_most(
    errors: list[Any], raised: type[SyncdError]
) -> None:
    with pytest.raises(raised) as caught:
        await router(*([[error]] for error in errors)).search(SEARCH)
    assert type(caught.value) is raised


async def test_no_answer_at_all_is_not_a_partial_answer() -> None:
    partial = SearchParams(dataset="d", vector=[0.0], partial="allow")
    with pytest.raises(ShardsUnavailable, match="2 of 2 shards did not answer: 0/2: gone; 1/2"):
        await router(*[[[ServiceUnavailable("gone")]]] * 2).search(partial)


async def test_without_shards_status_says_so_and_reads_are_refused() -> None:
    empty = router()
    status = await empty.status(NoParams())
    assert (status.state, status.coverage, status.position) == ("failed", 0, None)
    for method, params in ((empty.search, SEARCH), (empty.keys, KeysParams("d"))):
        call: Any = method
        with pytest.raises(ShardsUnavailable, match="no shard has registered"):
            await call(params)


async def test_a_wait_ends_when_every_replica_that_answers_has_the_transaction() -> None:
    done = [WaitResult(NEW)]
    found = await router([done, [WaitResult(OLD)]], [done]).wait(WaitParams("5"))
    assert found.position in (OLD, NEW)
    found = await router([done, [ServiceUnavailable("gone")]], [done]).wait(WaitParams("5"))
    assert found.position == NEW
    with pytest.raises(ShardsUnavailable):
        await router([[ServiceUnavailable("gone")]], [done]).wait(WaitParams("5"))


async def test_pages_of_keys_go_from_shard_to_shard() -> None:
    def page(shard: str, following: int | None, *keys: int) -> KeysResult:
        return KeysResult(list(keys), following, {shard: NEW})

    one = router([[page("0/2", 2, 1, 2)]], [[page("1/2", None, 9)]])
    first = await one.keys(KeysParams("d", limit=2))
    assert (first.keys, first.next) == ([1, 2], "@0/2:2")
    one = router([[page("0/2", None, 3)]], [[page("1/2", None, 9)]])
    second = await one.keys(KeysParams("d", after_key=first.next, limit=1))
    assert (second.keys, second.next) == ([3], "@1/2:null")
    last = await one.keys(KeysParams("d", after_key=second.next))
    assert (last.keys, last.next) == ([9], None)
    wrongs: list[Any] = [3, "@0/3:2", ["@0/2:2"]]
    for wrong in wrongs:
        with pytest.raises(InvalidParams):
            await one.keys(KeysParams("d", after_key=wrong))
