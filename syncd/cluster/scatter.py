"""One request to every shard: to one replica each, to another one if it fails or is late.

It knows neither the network nor the results. Invariant: each shard has answered, or is in
``failures`` with the reason, within the time of the request.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import anyio

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

    async def ask(self, asked: Call[T], seconds: float | None) -> T:
        """Send a request; raises ``SyncdError``."""


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
    replicas: Sequence[R], asked: Call[T], seconds: float | None, counts: Counts
) -> tuple[R, T]:
    """The first answer of a shard's replicas, with its replica; raises ``SyncdError``."""
    chosen = choice(replicas)
    if not chosen:
        raise down(replicas)
    if len(chosen) == 1:
        return chosen[0], await chosen[0].ask(asked, seconds)
    begun = anyio.current_time()
    send, receive = anyio.create_memory_object_stream[tuple[R, list[T], SyncdError | None]](
        len(chosen)
    )
    failures: list[SyncdError] = []
    under_way = 0
    waiting = list(chosen)

    async def ask(replica: R) -> None:
        left = None if seconds is None else max(seconds - (anyio.current_time() - begun), 0.0)
        try:
            await send.send((replica, [await replica.ask(asked, left)], None))
        except SyncdError as error:
            await send.send((replica, [], error))

    with send, receive:
        async with anyio.create_task_group() as tasks:
            while True:
                if waiting and not under_way:
                    counts.retries += bool(failures)
                    tasks.start_soon(ask, waiting.pop(0))
                    under_way += 1
                late = chosen[0].hedge_seconds if waiting else None
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
    """
    found: Scattered[R, T] = Scattered()
    final: list[SyncdError] = []

    async def ask(shard: Shard, replicas: Sequence[R]) -> None:
        try:
            found.answers[shard] = await ask_one(replicas, asked, seconds, counts)
        except SyncdError as error:
            found.failures[shard] = error
            if is_final(error) and not answers(error):
                final.append(error)
                tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        for shard, replicas in shards.items():
            tasks.start_soon(ask, shard, replicas)
    if final:
        raise final[0]
    return found
