"""Requests to all shards of a fleet, and what their answers cover."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import anyio

from syncd.cluster import merge
from syncd.cluster.fleet import Fleet
from syncd.cluster.replica import Replica
from syncd.cluster.scatter import Counts, Scattered, scatter
from syncd.errors import (
    DimensionMismatch,
    NotReady,
    Overloaded,
    RequestError,
    ShardsUnavailable,
    SyncdError,
    TimedOut,
    UnknownDataset,
    UnknownKey,
)
from syncd.protocol.messages import At, MissingShard, Partial, WirePosition
from syncd.shard import Shard
from syncd.supervision import first_cause

REFUSE_HINT = 'wait, or ask for an answer without them: "partial": "allow"; see: syncd status'

T = TypeVar("T")
Found = Scattered[Replica, T]


class Covered(NamedTuple):
    """What an answer covers; see the RPC's members of these names."""

    positions: dict[str, WirePosition]
    coverage: float
    missing: list[MissingShard]


class Asking:
    """Asks the shards of one fleet."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.counts = Counts()

    async def ask(
        self,
        asked: Any,
        seconds: float | None,
        *,
        unknown: type[SyncdError] | tuple[type[SyncdError], ...] = (),
        shards: Mapping[Shard, Sequence[Replica]] | None = None,
    ) -> Found[Any]:
        """Ask one replica of each shard. ``unknown`` are errors of a shard without such rows."""
        asked_of = self.fleet.shards if shards is None else shards
        if not asked_of:
            raise no_shards()
        return await scatter(
            asked_of,
            asked,
            seconds,
            self.counts,
            answers=lambda error: isinstance(error, unknown),
        )

    async def ask_every_replica(
        self,
        asked: Any,
        seconds: float | None,
        *,
        unknown: type[SyncdError] | tuple[type[SyncdError], ...] = (),
    ) -> Found[Any]:
        """Ask all replicas of each shard. A shard fails if none of them answers.

        A replica that cannot be reached is left out. Another error of a replica is its shard's.
        """
        rounds: dict[int, dict[Shard, list[Replica]]] = {}
        for shard, replicas in self.fleet.shards.items():
            usable = [each for each in replicas if not each.is_open] or list(replicas[:1])
            for place, replica in enumerate(usable or [None]):
                rounds.setdefault(place, {})[shard] = [] if replica is None else [replica]
        if not rounds:
            return await self.ask(asked, seconds, unknown=unknown)
        found: Found[Any] = Scattered()

        async def ask(some: Mapping[Shard, Sequence[Replica]]) -> None:
            one: Found[Any] = await scatter(
                some,
                asked,
                seconds,
                self.counts,
                answers=lambda error: isinstance(error, unknown),
            )
            found.answers.update(one.answers)
            for shard, error in one.failures.items():
                found.failures.setdefault(shard, error)

        try:
            async with anyio.create_task_group() as tasks:
                for some in rounds.values():
                    tasks.start_soon(ask, some)
        except BaseExceptionGroup as group:
            raise first_cause(group) from None
        for shard in found.answers:
            error = found.failures.get(shard)
            if error is not None and type(error) not in (TimedOut, Overloaded):
                del found.failures[shard]
        for shard in found.failures:
            found.answers.pop(shard, None)
        return found

    def complete(self, found: Found[T], partial: Partial) -> dict[Shard, tuple[Replica, T]]:
        """The answers, in the order of the shards; raises unless they are all, or may be partial.

        A shard that knows no such row or dataset has answered.
        """
        lost = {shard: error for shard, error in found.failures.items() if not has_answered(error)}
        if lost and (partial == "refuse" or len(lost) == len(found.answers | found.failures)):
            raise self.unavailable(lost, {**found.answers, **found.failures})
        return dict(sorted(found.answers.items()))

    def unavailable(
        self, lost: Mapping[Shard, SyncdError], every: Mapping[Shard, object]
    ) -> SyncdError:
        """The error of a request that ``lost`` shards did not answer, of the ones in ``every``."""
        errors = list(lost.values())
        if all(isinstance(error, NotReady) for error in errors) and len(lost) == len(every):
            return errors[0]
        own = (TimedOut, Overloaded)
        plain = [error for error in errors if type(error) in own or is_internal(error)]
        if plain and len(plain) == len(errors):
            return plain[0]
        named = "; ".join(f"{shard.name}: {error.message}" for shard, error in sorted(lost.items()))
        return ShardsUnavailable(
            f"{len(lost)} of {len(every)} shards did not answer: {named}", hint=REFUSE_HINT
        )

    def covered(self, found: Found[Any], at: At | None = None) -> Covered:
        """What an answer made of these covers. Shards that answered at a cut are ``at`` it."""
        answered = [shard for shard, error in found.failures.items() if has_answered(error)]
        share = sum(shard.share for shard in (*found.answers, *answered))
        if isinstance(at, WirePosition):
            positions = {shard.name: at for shard in sorted([*found.answers, *answered])}
        else:
            positions = self.positions(found)
        return Covered(positions, share, missing(found))

    def positions(self, found: Found[Any]) -> dict[str, WirePosition]:
        """Positions of the shards that answered.

        The position of a shard that knows no such dataset is its last known one, if there is one.
        """
        positions: dict[str, WirePosition] = {}
        for shard in sorted(found.answers | found.failures):
            if shard in found.answers:
                replica, result = found.answers[shard]
                position = getattr(result, "position", None) or next(
                    iter(getattr(result, "positions", {}).values()), replica.position
                )
            elif has_answered(found.failures.get(shard)):
                replicas = self.fleet.shards.get(shard, ())  # the layout may have changed
                known = [each.position for each in replicas if each.position]
                position = merge.oldest(known) if known else None
            else:
                continue
            if position is not None:
                positions[shard.name] = position
        return positions

    def note_positions(self, results: Iterable[tuple[Replica, Any]]) -> None:
        """Note the positions of answers."""
        for replica, result in results:
            for position in result.positions.values():
                replica.note(position, replica.lag_seconds)


def no_shards() -> ShardsUnavailable:
    """The error if no shard has registered."""
    return ShardsUnavailable(
        "no shard has registered in the database", hint="start: syncd serve --shard 0/3"
    )


def has_answered(error: SyncdError | None) -> bool:
    """Whether an error says that a shard has no such row, dataset or vector."""
    return isinstance(error, UnknownDataset | UnknownKey | DimensionMismatch)


def is_internal(error: SyncdError) -> bool:
    """Whether a shard answered that it failed itself."""
    return isinstance(error, RequestError) and error.kind == RequestError.kind


def missing(found: Found[Any]) -> list[MissingShard]:
    """The shards that did not answer, with the reasons."""
    return [
        MissingShard(shard.name, error.message)
        for shard, error in sorted(found.failures.items())
        if not has_answered(error)
    ]
