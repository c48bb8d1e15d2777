"""The layout that answers, and where its replicas are, as the database knows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from syncd.shard import Shard


@dataclass(frozen=True, slots=True)
class Registered:
    """A consumer that is a shard.

    ``silent_seconds`` is the time since its last report to the database.
    """

    consumer: str
    shard: Shard
    replica: str
    address: str
    silent_seconds: float = field(compare=False, default=0.0)
    state: str = field(compare=False, default="")
    lag_seconds: float = field(compare=False, default=0.0)


@dataclass(frozen=True, slots=True)
class Layout:
    """The shards that are asked: all shards of ``of``, each with its replicas.

    ``of`` is 0 while no shard has registered. ``others`` are shards of other layouts.
    """

    of: int = 0
    replicas: Mapping[Shard, tuple[Registered, ...]] = field(default_factory=dict)
    others: tuple[Registered, ...] = ()

    @classmethod
    def of_rows(cls, rows: Iterable[tuple[Any, ...]]) -> Layout:
        """The layout of the rows of ``read_layout``."""
        of, found = 0, list[Registered]()
        for layout, name, number, shards, replica, address, silent, state, lag in rows:
            of = layout or 0
            if name is not None:
                shard = Shard(shards, number)
                found.append(Registered(name, shard, replica, address, silent, state, lag))
        return cls(
            of,
            {
                shard: tuple(each for each in found if each.shard == shard)
                for shard in (Shard(of, number) for number in range(of))
            },
            tuple(each for each in found if each.shard.of != of),
        )
