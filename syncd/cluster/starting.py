"""``syncd cluster up`` and ``down``.

Invariant: ``up`` starts only what is missing, so it can be stopped and run again. ``down`` needs
neither the engine nor its machines: a process whose name is taken in the database ends by itself.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import SecretStr

from syncd.cluster.engine import Engine, Node
from syncd.cluster.keeper import OF_ONE_PROCESS, STOP_SECONDS, Kept, Place, end
from syncd.cluster.layout import Layout, Registered
from syncd.cluster.operating import LOOK_SECONDS, ReplicaState, client_of, look_at, read_layout
from syncd.errors import RayUnavailable, ServiceUnavailable, SettingsError, SyncdError
from syncd.postgres.connection import connect_blocking
from syncd.postgres.schema import check_usable
from syncd.settings import Settings, name_of_shard
from syncd.shard import Shard
from syncd.statements import statement

REPLICAS = ("", *"bcdefghijklmnopqrstuvwxyz")
"""Names of a shard's replicas, in order."""
LOOK_AGAIN_SECONDS = 0.25
ASK_SECONDS = 2.0
"""Time between two questions to the keepers."""
PLACED_SECONDS = 60.0
"""A keeper that has not answered for this long has not been placed."""
FAILURES = 3
"""Ends in a row, each soon after a start, after which ``up`` gives up."""
ENDED_SECONDS = 60.0
"""How long ``down`` waits for processes whose names it has taken."""


def passed_on(settings: Settings) -> dict[str, str]:
    """The variables that give another process the settings that are set here."""
    found = {name: value for name, value in os.environ.items() if name.startswith("PG")}
    for name in sorted(settings.model_fields_set - OF_ONE_PROCESS - {"http"}):
        value = getattr(settings, name)
        if value is not None:
            text = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
            found[f"SYNCD_{name.upper()}"] = text
    return found


def places_of(
    settings: Settings, shards: int, replicas: int, data_dir: Path | None, *, local: bool
) -> list[Place]:
    """All replicas of all shards; raises ``SettingsError`` if a setting is missing."""
    if not 1 <= replicas <= len(REPLICAS):
        raise SettingsError(f"{replicas} is not a number of replicas", hint="1 to 26")
    variables = passed_on(settings)
    if local:
        cores = max(settings.reader_count, 1)
        variables.setdefault("SYNCD_READERS", str(cores // (shards * replicas)))
    elif not settings.token.get_secret_value():
        raise SettingsError(
            "the shards listen on TCP but no token is set: any client could read the indexes",
            hint="export SYNCD_TOKEN=$(openssl rand -hex 32); routers need the same one",
        )
    return [
        Place(Shard(shards, number), replica, variables, data_dir, over_tcp=not local)
        for number in range(shards)
        for replica in REPLICAS[:replicas]
    ]


def check_database(settings: Settings) -> None:
    """Raise ``DatabaseError`` unless the database has the schema that the shards need."""
    with connect_blocking(settings.conninfo) as connection:
        check_usable(connection)


def up(
    engine: Engine,
    settings: Settings,
    places: Sequence[Place],
    memory_bytes: int,
    say: Callable[[str], None],
    *,
    apart: bool,
) -> bool:
    """Start the replicas that are missing, and return when all of them are ready.

    With ``apart``, no two replicas of a shard are on one machine. False if another layout answers.
    Raises ``SyncdError`` if they cannot be started; what has been started stays.
    """
    known = engine.names()
    check_same(engine.kept(known & {each.name for each in places}), places)
    missing = [each for each in places if each.name not in known]
    if missing:
        nodes = engine.nodes()
        replicas = max(Counter(each.shard for each in places).values())
        check_room(nodes, engine.free_bytes(), len(missing), memory_bytes, replicas if apart else 1)
        homes = homes_of(read_layout(settings), nodes)
        start(engine, homes, missing, nodes, memory_bytes, apart=apart)
        say(f"starting {', '.join(each.name for each in missing)}")
    wait_until_ready(engine, settings, [each.name for each in places], say)
    of, layout, names = places[0].shard.of, read_layout(settings), {each.name for each in places}
    lost = [
        each.consumer
        for each in registered_in(layout)
        if each.shard.of == of and each.consumer not in names and is_gone(each, settings)
    ]
    if lost:
        listed = ", ".join(f"'{name}'" for name in lost)
        say("the outbox is kept for replicas that do not run; if they are gone for good:")
        say(f"  DELETE FROM syncd.consumers WHERE name IN ({listed});")  # noqa: S608 - only text
    if layout.of != of:
        say(f"the layout of {layout.of} shards answers\n  next: syncd cluster reshard {of}")
    return layout.of == of


def check_same(kept: Mapping[str, Kept], places: Sequence[Place]) -> None:
    """Raise ``SettingsError`` if a replica runs with other settings."""
    digests = {each.name: each.digest for each in places}
    other = [name for name, each in kept.items() if each.digest != digests[name]]
    if other:
        raise SettingsError(
            f"{', '.join(sorted(other))} already run with other settings or for another database",
            hint="use the settings of the first start; or: syncd cluster down, then start again",
        )


def check_room(
    nodes: Sequence[Node], free_bytes: float, missing: int, memory_bytes: int, replicas: int
) -> None:
    """Raise ``RayUnavailable`` if the machines are too few or too small."""
    if len(nodes) < replicas:
        raise RayUnavailable(
            f"{replicas} replicas of a shard need {replicas} machines, Ray has {len(nodes)}",
            hint="start another one: ray start --address=HOST:PORT; or use fewer --replicas",
        )
    fits = sum(int(each.memory_bytes // memory_bytes) for each in nodes)
    if min(fits, int(free_bytes // memory_bytes)) < missing:
        raise RayUnavailable(
            f"{missing} shards with {memory_bytes / 1e9:.2f} GB each do not fit: Ray has "
            f"{free_bytes / 1e9:.2f} GB left on {len(nodes)} machines",
            hint="start another machine: ray start --address=HOST:PORT; "
            "or reserve less for each: --memory-gb",
        )


def start(
    engine: Engine,
    homes: Mapping[str, Node],
    missing: Sequence[Place],
    nodes: Sequence[Node],
    memory_bytes: int,
    *,
    apart: bool,
) -> None:
    """Start replicas: on the machine where one runs already, else where the fewest are."""
    load = Counter({each.id: 0 for each in nodes})
    load.update(homes[each.name].id for each in missing if each.name in homes)
    by_id = {each.id: each for each in nodes}
    for shard in dict.fromkeys(each.shard for each in missing):
        group = [each for each in missing if each.shard == shard]
        if apart and len(group) > 1:
            engine.place_apart(group, homes, memory_bytes)
            continue
        for each in group:
            node = homes.get(each.name)
            if node is None:
                others = {homes[name].id for name in names_of(shard) if name in homes}
                free = [id_ for id_ in load if not apart or id_ not in others]
                node = by_id[min(free or load, key=lambda id_: load[id_])]
                load[node.id] += 1
            engine.place(each, node, memory_bytes)


def names_of(shard: Shard) -> list[str]:
    """The consumers' names of all replicas that a shard may have."""
    return [name_of_shard(shard, replica) for replica in REPLICAS]


def homes_of(layout: Layout, nodes: Sequence[Node]) -> dict[str, Node]:
    """The machine of each registered replica, by the host of its address."""
    hosts = {each.host: each for each in nodes}
    found: dict[str, Node] = {}
    for each in registered_in(layout):
        host = urlsplit(each.address).hostname
        if host in hosts:
            found[each.consumer] = hosts[host]
    return found


def registered_in(layout: Layout) -> list[Registered]:
    """All replicas of all layouts."""
    return [*(each for some in layout.replicas.values() for each in some), *layout.others]


def states_of(settings: Settings, names: Sequence[str]) -> dict[str, ReplicaState]:
    """The states of the registered replicas with these names."""
    wanted = set(names)
    registered = [each for each in registered_in(read_layout(settings)) if each.consumer in wanted]
    return {each.consumer: look_at(each, settings) for each in registered}


def wait_until_ready(
    engine: Engine, settings: Settings, names: Sequence[str], say: Callable[[str], None]
) -> None:
    """Return when every replica is ready; say what is waited for when that changes."""
    said, asked_at, kept = "", 0.0, dict[str, Kept]()
    answered = dict.fromkeys(names, time.monotonic())
    while True:
        states = states_of(settings, names)
        left = [name for name in names if name not in states or states[name].state != "ready"]
        if not left:
            return
        if time.monotonic() - asked_at >= ASK_SECONDS:
            asked_at = time.monotonic()
            kept = dict(engine.kept(left))
            answered.update(dict.fromkeys(kept, asked_at))
            check_starting(kept, answered, left)
        counted = Counter(waited_for(states.get(name), kept.get(name)) for name in left)
        now = ", ".join(f"{number} {what}" for what, number in sorted(counted.items()))
        if now != said:
            say(f"waiting for {len(left)} of {len(names)}: {now}")
            said = now
        time.sleep(LOOK_AGAIN_SECONDS)


def waited_for(state: ReplicaState | None, kept: Kept | None) -> str:
    """Why a replica is not ready, in a few words."""
    if state is not None and state.state is not None:
        return state.state
    if kept is not None and kept.failures and kept.error:
        return f"{kept.name}: {kept.error.splitlines()[0]}"
    return "starting"


def check_starting(
    kept: Mapping[str, Kept], answered: Mapping[str, float], left: Sequence[str]
) -> None:
    """Raise ``RayUnavailable`` if a replica cannot start."""
    for name in left:
        each = kept.get(name)
        if each is not None and each.failures >= FAILURES:
            raise RayUnavailable(
                f"{name} does not start on {each.host}: {each.error}",
                hint=f"correct it, and run the command again; its log: {each.log}",
            )
        if each is None and time.monotonic() - answered[name] > PLACED_SECONDS:
            raise RayUnavailable(
                f"Ray has not started {name} for {PLACED_SECONDS:.0f} s",
                hint="see: ray status; it may need another machine, or less --memory-gb",
            )


def stop_kept(engine: Engine, shards: int | None) -> set[str]:
    """End the engine's keepers, of one layout or of all; the names whose processes have ended."""
    return engine.stop([name for name in engine.names() if shards in (None, size_of(name))])


def end_here(data_dir: Path, shards: int | None) -> set[str]:
    """End the shards' processes on this machine; the names of those that have ended."""
    names = [each.name for each in sorted(data_dir.glob("shard-*-of-*")) if size_of(each.name)]
    return {
        name
        for name in names
        if shards in (None, size_of(name)) and end(data_dir / name, STOP_SECONDS)
    }


def take_names(
    settings: Settings, shards: int | None, stopped: Collection[str], say: Callable[[str], None]
) -> list[str]:
    """End all other registered shards; the names of those that have not ended.

    It needs nothing but the database: a process whose name is taken ends by itself.
    """
    others = [
        each
        for each in registered_in(read_layout(settings))
        if shards in (None, each.shard.of) and each.consumer not in stopped
    ]
    answering = [each for each in others if not is_gone(each, settings)]
    if answering:
        names = ", ".join(each.consumer for each in answering)
        say(f"taking the names of {names}: the processes end by themselves")
    with connect_blocking(settings.conninfo) as connection:
        # also of those that do not answer: a machine may be cut off and return
        names_of_all = [each.consumer for each in others]
        connection.execute(statement("cluster", "take_names"), [names_of_all])
    until = time.monotonic() + ENDED_SECONDS
    while answering and time.monotonic() < until:
        time.sleep(LOOK_AGAIN_SECONDS)
        answering = [each for each in answering if not is_gone(each, settings)]
    return [f"{each.consumer} on {each.address}" for each in answering]


def size_of(name: str) -> int:
    """The number of shards of a consumer's layout; 0 if it is another name."""
    words = name.split("-")
    return int(words[3]) if len(words) > 3 and words[3].isdigit() else 0


def is_gone(registered: Registered, settings: Settings) -> bool:
    """Whether the replica does not run at its address."""
    try:
        with client_of(registered, settings, LOOK_SECONDS) as client:
            return client.status().consumer != registered.consumer
    except ServiceUnavailable:
        return True
    except SyncdError:  # it is frozen, or has another token
        return False
