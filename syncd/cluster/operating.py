"""What an operator does with a cluster: look at it, verify it, give it another number of shards.

Every command here can be stopped at any step and run again: only the swap changes anything, and it
is one row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import anyio
import msgspec
import psycopg

from syncd.client.client import Client
from syncd.cluster import merge
from syncd.cluster.layout import Layout, Registered
from syncd.cluster.verifying import verify_together
from syncd.errors import DatabaseError, SyncdError
from syncd.postgres.connection import connect_blocking
from syncd.protocol.messages import VerifyResult, WirePosition
from syncd.settings import Settings
from syncd.shard import BUCKETS, Shard
from syncd.statements import statement
from syncd.types import State

LOOK_SECONDS = 5.0
"""Time in which a shard must answer ``status``, to be shown."""
FROZEN_SECONDS = 10.0
"""Time after which a shard that is asked for work counts as frozen."""
LOOK_AGAIN_SECONDS = 0.5
"""Time between two looks at shards that are not ready yet."""
CATCH_UP_MS = 600_000
"""How long new shards may take to include the commits before a swap."""
ROUTERS_SECONDS = 5.0
"""Time after a swap in which each router has read the layout: one without NOTIFY polls."""


class ReplicaState(msgspec.Struct, frozen=True, kw_only=True):
    """One replica of a shard. ``error`` is why it does not answer; null if it does."""

    shard: str
    replica: str
    consumer: str
    address: str
    state: State | None = None
    position: WirePosition | None = None
    lag_seconds: float | None = None
    error: str | None = None


class ClusterState(msgspec.Struct, frozen=True):
    """The shards of the layout that answers, and those of other layouts."""

    layout: int
    shards: list[ReplicaState]
    others: list[ReplicaState]

    @property
    def is_whole(self) -> bool:
        """Whether each shard of the layout has registered, and every replica of it answers."""
        return bool(self.layout) and all(each.error is None for each in self.shards)


def read_layout(settings: Settings) -> Layout:
    """The layout in the database."""
    with connect_blocking(settings.conninfo) as connection:
        return Layout.of_rows(connection.execute(statement("cluster", "read_layout")).fetchall())


def client_of(registered: Registered, settings: Settings, seconds: float) -> Client:
    """A client of a replica."""
    token = settings.token.get_secret_value() or None
    return Client(registered.address, token=token, timeout=seconds)


def look(settings: Settings) -> ClusterState:
    """Ask every replica for its state."""
    layout = read_layout(settings)
    shards: list[ReplicaState] = []
    for shard, registered in layout.replicas.items():
        shards += [look_at(each, settings) for each in registered] or [
            ReplicaState(
                shard=shard.name,
                replica="",
                consumer="",
                address="",
                error=f"it has not registered; start it: syncd serve --shard {shard.name}",
            )
        ]
    others = [look_at(each, settings) for each in layout.others]
    return ClusterState(layout.of, shards, others)


def look_at(registered: Registered, settings: Settings) -> ReplicaState:
    """Ask one replica for its state."""
    found = ReplicaState(
        shard=registered.shard.name,
        replica=registered.replica,
        consumer=registered.consumer,
        address=registered.address,
    )
    try:
        with client_of(registered, settings, LOOK_SECONDS) as client:
            status = client.status()
    except SyncdError as error:
        return msgspec.structs.replace(found, error=error.message)
    if status.shard != registered.shard.name:
        return msgspec.structs.replace(found, error=f"shard {status.shard} answers there")
    return msgspec.structs.replace(
        found, state=status.state, position=status.position, lag_seconds=status.lag_seconds
    )


def verify(settings: Settings, of: int | None = None, *, deep: bool = False) -> VerifyResult:
    """Have every replica of a layout compare its rows; the result is that of the whole tables.

    They compare at one snapshot, or each at its own if they cannot be brought to one.

    ``of`` is the layout's number of shards; None: the one that answers. Raises ``SyncdError`` if a
    shard does not answer, or if the shards do not have every bucket once.
    """
    layout = read_layout(settings)
    replicas = (
        [each for some in layout.replicas.values() for each in some]
        if of in (None, layout.of)
        else [each for each in layout.others if each.shard.of == of]
    )
    check_ranges({each.shard for each in replicas})
    results = anyio.run(partial(verify_together, settings, replicas, deep=deep))
    by_shard: dict[Shard, list[VerifyResult]] = {}
    for number, each in enumerate(replicas):
        if results is not None:
            found = results[number]
        else:
            with client_of(each, settings, FROZEN_SECONDS) as client:
                client.status()  # a verify has no time limit: a frozen shard would never answer it
                found = client.verify(deep=deep)
        by_shard.setdefault(each.shard, []).append(found)
    return merge.verify([worst(results) for _, results in sorted(by_shard.items())])


def worst(results: Sequence[VerifyResult]) -> VerifyResult:
    """Of the results of a shard's replicas: the first that found a difference, else the first."""
    differing = (one for one in results if not all(dataset.in_sync for dataset in one.datasets))
    return next(differing, results[0])


def check_ranges(shards: Iterable[Shard]) -> None:
    """Raise ``DatabaseError`` unless the shards have every bucket, and none of them twice."""
    following = 0
    for shard in sorted(shards, key=lambda each: each.first_bucket):
        if shard.first_bucket != following:
            what = "two shards have" if shard.first_bucket < following else "no shard has"
            first, last = sorted((following, shard.first_bucket))
            raise DatabaseError(
                f"{what} the buckets {first} to {last - 1}; next is shard {shard.name}",
                hint="see: syncd cluster status",
            )
        following = shard.last_bucket + 1
    if following != BUCKETS:
        raise DatabaseError(
            f"no shard has the buckets {following} to {BUCKETS - 1}",
            hint="see: syncd cluster status",
        )


def reshard(settings: Settings, of: int, say: Callable[[str], None]) -> bool:
    """Let a layout of another size answer, as soon as all its shards are ready and verified.

    Returns False if a shard differs from its part of the tables: then nothing is swapped.
    """
    if read_layout(settings).of != of:
        wait_for_shards(settings, of, say)
        say(f"the {of} shards are ready: comparing them with their tables")
        found = verify(settings, of)
        failed = [each for each in found.sources if each.outcome == "failed"]
        if failed or not all(each.in_sync for each in found.datasets):
            say("a shard differs from its table: nothing was swapped")
            say(f"  next: syncd verify --repair on each shard, then: syncd cluster reshard {of}")
            return False
        catch_up(settings, of)
        swap(settings, of)
    say(f"the layout of {of} shards answers")
    if read_layout(settings).others:
        say(f"  next: after {ROUTERS_SECONDS:.0f} s, when each router has read it, stop the other")
        say("  shards, then delete their rows:")
        say(f"  DELETE FROM syncd.consumers WHERE layout <> {of};")  # noqa: S608 - only text
    return True


def catch_up(settings: Settings, of: int) -> None:
    """Return when every replica of a layout includes all commits until now.

    A client that has read a row from the present shards reads it from the new ones too.
    """
    with connect_blocking(settings.conninfo) as connection:
        row = connection.execute(statement("cluster", "read_token")).fetchone()
        assert row is not None
    for each in of_layout(read_layout(settings), of):
        with client_of(each, settings, FROZEN_SECONDS) as client:
            client.wait(str(row[0]), timeout_ms=CATCH_UP_MS)


def swap(settings: Settings, of: int) -> None:
    """Let a layout answer: both statements are one transaction."""
    with connect_blocking(settings.conninfo) as connection:
        connection.execute(statement("cluster", "swap_layout"), [of])
        notify_routers(connection)


def notify_routers(connection: psycopg.Connection) -> None:
    """Have the routers read the layout when the transaction commits."""
    connection.execute(statement("cluster", "notify"))


def of_layout(layout: Layout, of: int) -> list[Registered]:
    """The replicas of the layout with ``of`` shards."""
    every = [*layout.others, *(each for some in layout.replicas.values() for each in some)]
    return [each for each in every if each.shard.of == of]


def wait_for_shards(settings: Settings, of: int, say: Callable[[str], None]) -> None:
    """Return when every shard of a layout is ready; say what is waited for when that changes."""
    said = ""
    while True:
        states = [look_at(each, settings) for each in of_layout(read_layout(settings), of)]
        ready = {each.shard for each in states if each.state == "ready"}
        left = [Shard(of, number).name for number in range(of)]
        left = [name for name in left if name not in ready]
        if not left:
            return
        reasons = {each.shard: each.error or each.state for each in states}
        now = "; ".join(
            f"{name}: {reasons[name]}"
            if name in reasons
            else f"{name}: it has not registered; start it: syncd serve --shard {name}"
            for name in left
        )
        if now != said:
            say(f"waiting for shards: {now}")
            said = now
        time.sleep(LOOK_AGAIN_SECONDS)
