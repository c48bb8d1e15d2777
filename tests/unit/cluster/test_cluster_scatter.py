"""Scattering: which replica is asked when, and what becomes of a shard that does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic
from typing import Any, TypeVar

import anyio
import pytest

from syncd.client.calls import Call, status
from syncd.client.exchange import NoAnswer
from syncd.cluster.layout import Layout, Registered
from syncd.cluster.replica import LEAST_TIME_OUT_SECONDS, Replica
from syncd.cluster.scatter import Counts, scatter
from syncd.errors import InvalidFilter, NotReady, ServiceUnavailable, SyncdError, UnknownDataset
from syncd.protocol.messages import GetResult, WirePosition
from syncd.shard import Shard

T = TypeVar("T")
pytestmark = pytest.mark.anyio
CALL: Call[Any] = status()
SECONDS = 20.0


class Fake:
    """A replica that does what ``answer`` does."""

    connected = False

    def __init__(
        self,
        answer: Callable[[float | None], Awaitable[Any]],
        *,
        lag_seconds: float = 0.0,
        is_open: bool = False,
        hedge_seconds: float = SECONDS,
    ) -> None:
        self.answer = answer
        self.lag_seconds = lag_seconds
        self.is_open = is_open
        self.hedge_seconds = hedge_seconds
        self.error: SyncdError | None = None
        self.asked = 0

    def begin(self, _: Call[Any]) -> Any:
        if not self.connected:
            return None
        self.asked += 1
        return FakeSent(self.answer)

    def take(self, _: Call[Any], sent: Any) -> Any:
        return sent.future.result()

    async def ask(self, asked: Call[Any], seconds: float | None, sent: Any = None) -> Any:
        del asked
        if sent is None:
            self.asked += 1
            return await self.answer(seconds)
        with anyio.move_on_after(seconds):
            return await sent.future
        raise NoAnswer("it has not answered")


class FakeSent:
    """A request that was sent over an open connection."""

    def __init__(self, answer: Callable[[float | None], Awaitable[Any]]) -> None:
        self.future = asyncio.ensure_future(answer(None))
        self.began = monotonic()

    @property
    def is_answered(self) -> bool:
        done = self.future.done() and not self.future.cancelled()
        return done and self.future.exception() is None

    def forget(self) -> None:
        self.future.cancel()


@pytest.fixture(autouse=True, params=[True, False], ids=["connected", "not connected"])
def _connections(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the replicas have open connections: then requests are sent without tasks."""
    monkeypatch.setattr(Fake, "connected", request.param)


def says(value: Any) -> Callable[[float | None], Awaitable[Any]]:
    """Answers at once; an error is raised."""

    async def answer(_: float | None) -> Any:
        if isinstance(value, SyncdError):
            raise value
        return value

    return answer


async def freezes(seconds: float | None) -> Any:
    """Does not answer."""
    with anyio.move_on_after(seconds):
        await anyio.sleep_forever()
    raise NoAnswer("it has not answered")


async def asked(*shards: Sequence[Fake], seconds: float | None = SECONDS) -> tuple[Any, Counts]:
    """Scatter to shards, each with its replicas."""
    counts = Counts()
    layout = {Shard(len(shards), number): each for number, each in enumerate(shards)}
    with anyio.fail_after(SECONDS):
        return await scatter(layout, CALL, seconds, counts), counts


def values(found: Any) -> list[Any]:
    return [value for _, (_, value) in sorted(found.answers.items())]


async def test_each_shard_is_asked_once_and_a_frozen_one_of_64_takes_the_time_of_the_request() -> (
    None
):
    fakes = [[Fake(freezes if number == 7 else says(number))] for number in range(64)]
    found, _ = await asked(*fakes, seconds=0.3)
    assert values(found) == [number for number in range(64) if number != 7]
    assert list(map(str, found.failures)) == ["7/64"]
    assert all(each.asked == 1 for [each] in fakes)


async def test_an_error_of_the_request_is_raised_although_another_shard_is_frozen() -> None:
    with pytest.raises(InvalidFilter):
        await asked([Fake(freezes)], [Fake(says(InvalidFilter("bad")))], seconds=None)


async def test_a_late_replica_is_not_waited_for() -> None:
    late = Fake(freezes, hedge_seconds=0.0)
    quick = Fake(says("b"), lag_seconds=5)
    found, counts = await asked([quick, late], seconds=None)
    assert values(found) == ["b"]
    assert (late.asked, counts.hedges, counts.retries) == (1, 1, 0)


@pytest.mark.parametrize("error", [NotReady("reading"), ServiceUnavailable("gone")])
async def test_another_replica_is_asked_for_one_that_fails(error: SyncdError) -> None:
    found, counts = await asked([Fake(says(error)), Fake(says("b"), lag_seconds=5)])
    assert (values(found), counts.retries) == (["b"], 1)
    found, _ = await asked([Fake(says(error)), Fake(says(error))])
    assert list(found.failures.values()) == [error]


async def test_an_answer_that_a_dataset_is_unknown_is_not_asked_for_again() -> None:
    with pytest.raises(UnknownDataset):
        await asked([Fake(says(UnknownDataset("d"))), Fake(says("b"), lag_seconds=5)])


async def test_a_fresh_replica_is_asked_before_a_late_one_and_an_open_one_never() -> None:
    fresh, late, opened = Fake(says(1)), Fake(says(2), lag_seconds=3), Fake(says(3), is_open=True)
    for _ in range(5):
        await asked([opened, late, fresh])
    assert (fresh.asked, late.asked, opened.asked) == (5, 0, 0)
    opened.error = NoAnswer("frozen")
    found, _ = await asked([opened], [])
    assert [str(error) for error in found.failures.values()] == [
        "frozen",
        "no syncd has registered for it",
    ]


class FakeClient:
    """Answers what it is told, in place of a replica's client."""

    def __init__(self) -> None:
        self.outcome: Any = None

    async def end(self, call: Call[Any], _: Any, __: float | None) -> Any:
        return await self.run(call)

    async def run(self, _: Call[Any]) -> Any:
        if isinstance(self.outcome, SyncdError):
            raise self.outcome
        return self.outcome


def replica() -> tuple[Replica, FakeClient]:
    one = Replica(Registered("shard-1-of-3", Shard(3, 1), "", "/nowhere"), None)
    client: Any = FakeClient()
    one.client = client
    return one, client


async def test_after_two_time_outs_a_replica_gets_only_probes_until_one_is_answered() -> None:
    one, client = replica()
    client.outcome = NoAnswer("late")
    for seconds in (0.1, LEAST_TIME_OUT_SECONDS, 0.1):
        with pytest.raises(NoAnswer):
            await one.ask(CALL, seconds)
        assert not one.is_open
    with pytest.raises(NoAnswer):
        await one.ask(CALL, LEAST_TIME_OUT_SECONDS)
    assert one.is_open
    other, client_of_other = replica()
    client_of_other.outcome = NoAnswer("late")
    sent: Any = FakeSent(says(None))
    sent.began -= LEAST_TIME_OUT_SECONDS  # its time is over
    for _ in range(2):
        with pytest.raises(NoAnswer):
            await other.ask(CALL, 0.0, sent)
    assert other.is_open
    client.outcome = NotReady("reading")  # an error is an answer
    await one.probe()
    assert not one.is_open


async def test_an_answer_of_another_shard_is_refused() -> None:
    one, client = replica()
    position = WirePosition("1:1:", 1)
    client.outcome = GetResult([], {"1/3": position})
    assert await one.ask(CALL, 1.0) == client.outcome
    client.outcome = GetResult([], {"0/3": position})
    with pytest.raises(ServiceUnavailable, match="shard 0/3 answers on /nowhere"):
        await one.ask(CALL, 1.0)


def test_a_layout_has_its_own_shards_and_names_the_others() -> None:
    rows = [(2, "a", 0, 2, "", "x", 0.0, "ready", 0.0), (2, "b", 0, 3, "", "y", 0.0, "ready", 0.0)]
    layout = Layout.of_rows(rows)
    assert [(str(shard), len(found)) for shard, found in layout.replicas.items()] == [
        ("0/2", 1),
        ("1/2", 0),
    ]
    assert [each.consumer for each in layout.others] == ["b"]
    assert Layout.of_rows([(None,) + (None,) * 8]).of == 0
