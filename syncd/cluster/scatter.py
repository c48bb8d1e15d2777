"""One request to every shard: to one replica each, to another one if it fails or is late.

It knows neither the network nor the results. Invariant: each shard has answered, or is in
``failures`` with the reason, within the time of the request.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

import anyio

from syncd.client.async_link import Sent
from syncd.client.calls import Call
from syncd.errors import (
    NotReady,
    Overloaded,
    RequestError,
    ServiceUnavailable,
    SyncdError,
    TimedOut,
    Unauthorized,
)
from syncd.shard import Shard

FRESHER_SECONDS = 1.0
"""A replica that is this much behind another one is asked after it."""

T = TypeVar("T")
turns = itertools.count()


class Asked(Protocol):
    """The part of a replica that scattering uses."""

    lag_seconds: float
    error: SyncdError | None

    @property
    def is_open(self) -> bool:
        """Whether it gets no requests at present."""

    @property
    def hedge_seconds(self) -> float:
        """Delay after which another replica is asked as well."""

    def begin(self, asked: Call[Any]) -> Sent | None:
        """Send a request now, if there is an open connection."""

    def take(self, asked: Call[T], sent: Sent) -> T:
        """The answer of a request that is answered; raises ``SyncdError``."""

    async def ask(self, asked: Call[T], seconds: float | None, sent: Sent | None = None) -> T:
        """Send a request, unless it was ``sent``, and wait; raises ``SyncdError``."""


R = TypeVar("R", bound=Asked)


@dataclass(slots=True)
class Scattered(Generic[R, T]):
    """The shards' answers, each with its replica, and the errors of the other shards."""

    answers: dict[Shard, tuple[R, T]] = field(default_factory=dict)
    failures: dict[Shard, SyncdError] = field(default_factory=dict)


@dataclass(slots=True)
class Counts:
    """What was done beyond one request to each shard."""

    hedges: int = 0
    """Replicas asked because another one was late."""
    retries: int = 0
    """Replicas asked because another one failed."""


def is_final(error: SyncdError) -> bool:
    """Whether an error is about the request itself: no other replica answers it otherwise."""
    retried = (NotReady, Overloaded, TimedOut, Unauthorized)
    return (
        isinstance(error, RequestError)
        and not isinstance(error, retried)
        and error.kind != RequestError.kind
    )


def choice(replicas: Sequence[R]) -> list[R]:
    """The replicas to ask, in order: those that answered last, the fresher ones, by turns."""
    usable = [each for each in replicas if not each.is_open]
    if len(usable) < 2:
        return usable
    turn = next(turns) % len(usable)
    return sorted(
        usable[turn:] + usable[:turn],
        key=lambda each: (each.error is not None, each.lag_seconds // FRESHER_SECONDS),
    )


def down(replicas: Sequence[Asked]) -> SyncdError:
    """The error of a shard that has no replica to ask."""
    for each in replicas:
        if each.error is not None:
            return each.error
    return ServiceUnavailable("no syncd has registered for it", hint="start it")


async def ask_one(
    replicas: Sequence[R],
    asked: Call[T],
    seconds: float | None,
    counts: Counts,
    sent: Sent | None = None,
) -> tuple[R, T]:
    """The first answer of a shard's replicas, with its replica; raises ``SyncdError``.

    ``sent`` is the request to the first of ``replicas``, which are in the order of ``choice`` then.
    """
    chosen = choice(replicas) if sent is None else list(replicas)
    if not chosen:
        raise down(replicas)
    if len(chosen) == 1:
        return chosen[0], await chosen[0].ask(asked, seconds, sent)
    begun = anyio.current_time()
    waited = 0.0 if sent is None else monotonic() - sent.began
    send, receive = anyio.create_memory_object_stream[tuple[R, list[T], SyncdError | None]](
        len(chosen)
    )
    failures: list[SyncdError] = []
    under_way = 0
    waiting = list(chosen)

    async def ask(replica: R, sent: Sent | None = None) -> None:
        left = None if seconds is None else max(seconds - (anyio.current_time() - begun), 0.0)
        try:
            await send.send((replica, [await replica.ask(asked, left, sent)], None))
        except SyncdError as error:
            await send.send((replica, [], error))

    with send, receive:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, waiting.pop(0), sent)
            under_way += 1
            while True:
                if waiting and not under_way:
                    counts.retries += bool(failures)
                    tasks.start_soon(ask, waiting.pop(0))
                    under_way += 1
                late = max(chosen[0].hedge_seconds - waited, 0.0) if waiting else None
                waited = 0.0
                with anyio.move_on_after(late) as patience:
                    replica, found, error = await receive.receive()
                if patience.cancelled_caught:
                    counts.hedges += 1
                    tasks.start_soon(ask, waiting.pop(0))
                    under_way += 1
                    continue
                under_way -= 1
                if error is None:
                    tasks.cancel_scope.cancel()
                    return replica, found[0]
                failures.append(error)
                if is_final(error) or (not under_way and not waiting):
                    tasks.cancel_scope.cancel()
                    break
    raise next(filter(is_final, failures), failures[0])


async def scatter(
    shards: Mapping[Shard, Sequence[R]],
    asked: Call[T],
    seconds: float | None,
    counts: Counts,
    *,
    answers: Callable[[SyncdError], bool] = lambda _: False,
) -> Scattered[R, T]:
    """Ask each shard once.

    An error of the request itself is raised, and the others are not waited for, unless ``answers``
    says that it is an answer: then it is among the failures.

    The requests are sent at once, without tasks, which took most of the time of a request. Only a
    shard whose first replica is late, fails, or has no open connection gets a task.
    """
    found: Scattered[R, T] = Scattered()
    final: list[SyncdError] = []
    begun = monotonic()
    order = {shard: choice(replicas) for shard, replicas in shards.items()}
    sent: dict[Shard, Sent] = {}
    try:
        for shard, chosen in order.items():
            first = chosen[0].begin(asked) if chosen else None
            if first is not None:
                sent[shard] = first
        if sent:
            await until_answered(sent.values(), patience_of(order, sent, seconds))
        for shard, one in sent.items():
            if one.is_answered:
                with suppress(SyncdError):  # another shard answers there: asked again below
                    found.answers[shard] = order[shard][0], order[shard][0].take(asked, one)
        if len(found.answers) == len(shards):
            return found
        left = None if seconds is None else max(seconds - (monotonic() - begun), 0.0)

        async def ask(shard: Shard, replicas: Sequence[R]) -> None:
            first = sent.get(shard)
            some = replicas if first is None else order[shard]
            try:
                found.answers[shard] = await ask_one(some, asked, left, counts, first)
            except SyncdError as error:
                found.failures[shard] = error
                if is_final(error) and not answers(error):
                    final.append(error)
                    tasks.cancel_scope.cancel()

        async with anyio.create_task_group() as tasks:
            for shard, replicas in shards.items():
                if shard not in found.answers:
                    tasks.start_soon(ask, shard, replicas)
    finally:
        for one in sent.values():
            one.forget()
    if final:
        raise final[0]
    return found


def patience_of(
    order: Mapping[Shard, Sequence[Asked]], sent: Mapping[Shard, Sent], seconds: float | None
) -> float | None:
    """How long to wait before a shard needs a task; None: until all have answered."""
    if len(sent) < len(order):
        return 0.0
    hedges = (some[0].hedge_seconds for some in order.values() if len(some) > 1)
    return min((each for each in (seconds, *hedges) if each is not None), default=None)


async def until_answered(sent: Collection[Sent], seconds: float | None) -> None:
    """Return when each request is answered, when one has failed, or after ``seconds``."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    left = len(sent)

    def end() -> None:
        if not ended.done():
            ended.set_result(None)

    def note(one: Sent) -> None:
        nonlocal left
        left -= 1
        if not left or not one.is_answered:
            end()

    timer = None if seconds is None else loop.call_later(seconds, end)
    notes = [(one.future, lambda _, one=one: note(one)) for one in sent]
    for future, noted in notes:
        future.add_done_callback(noted)
    try:
        await ended
    finally:
        if timer is not None:
            timer.cancel()
        for future, noted in notes:
            future.remove_done_callback(noted)
