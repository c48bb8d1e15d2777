"""Ray as the engine of a cluster. Only this module imports ray, and only if a command needs it.

An actor keeps one shard's process (see ``keeper``) and answers no search: a call to an actor takes
1 ms, a socket 0.02 ms, and searches must go on if Ray's head is lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from syncd.cluster.engine import Node
from syncd.cluster.keeper import Keeper, Kept, Place
from syncd.cluster.local_head import LocalHead, answers, not_installed
from syncd.errors import RayUnavailable, SettingsError
from syncd.host_port import split_host_port

NAMESPACE = "syncd"
"""Of the actors' names. Without one, each program gets a random namespace of its own."""
NAME = re.compile(r"shard-\d+-of-\d+(-[A-Za-z0-9_.-]+)?")
KEPT_SECONDS = 3.0
"""Time in which an actor must answer."""
PLACED_SECONDS = 60.0
"""Time in which Ray must reserve the machines of a shard's replicas."""
STOP_SECONDS = 60.0
"""Time in which an actor must have ended its process."""
OF_RAY = frozenset({"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTHONBREAKPOINT"})
"""Variables that Ray sets for its workers. With OMP_NUM_THREADS=1 the codes are built slowly."""
VARIABLES: Mapping[str, str] = {
    "RAY_AUTH_MODE": "token",  # the default since 2.60, not before
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""Read when ray is imported."""
OF_ACTORS: Mapping[str, str] = {
    # Else a worker that ends, for example because its raylet was killed, kills its children,
    # whichever session they are in.
    "RAY_kill_child_processes_on_worker_exit": "0",
}


class ShardActor:
    """The actor of one replica of a shard."""

    def __init__(self, place: Place) -> None:
        import ray

        self.node = ray.get_runtime_context().get_node_id()
        self.head = ray.get_runtime_context().gcs_address
        inherited = {
            name: value
            for name, value in os.environ.items()
            if name not in OF_RAY and not name.startswith("RAY_")
        }
        host = ray.util.get_node_ip_address()
        self.keeper = Keeper(place, host, inherited, self.may_start)
        self.keeper.start()

    def may_start(self) -> bool:
        """Whether the head answers, and counts this machine as alive.

        If it does not, Ray has started the shard on another machine, or ``down`` has ended it.
        """
        import ray

        if not answers(self.head):
            return False
        return any(each["NodeID"] == self.node and each["Alive"] for each in ray.nodes())

    def kept(self) -> Kept:
        """The state of the process."""
        return self.keeper.kept()

    def stop(self) -> None:
        """End the process."""
        self.keeper.stop()


@contextlib.contextmanager
def connected(address: str, local: Path | None = None) -> Iterator[RayEngine]:
    """Ray at ``host:port``, for the duration of a block. Raises ``RayUnavailable``.

    ``local`` is the data directory whose own Ray it is.
    """
    if local is not None:
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would come before the file
        os.environ.update(LocalHead(local).variables)
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise not_installed() from None
    if not answers(address):
        raise RayUnavailable(
            f"no Ray answers on {address}",
            hint=f"start it: ray start --head --port={address.rpartition(':')[2]}; "
            "or use this machine alone: --address local",
        )
    # a warning of detached actors in a placement group, which is what we want
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        with own_signals(), quiet():
            ray.init(
                address=address, namespace=NAMESPACE, log_to_driver=False, configure_logging=False
            )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise RayUnavailable(
            f"Ray on {address} does not accept this program: {first_line(error)}",
            hint="set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of that Ray, "
            "and install the same version of ray and of Python",
        ) from None
    try:
        yield RayEngine()
    except ray.exceptions.RayError as error:
        raise RayUnavailable(f"Ray on {address} failed: {first_line(error)}") from error
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raise ``SettingsError`` unless the address is ``host:port``: others may mean any Ray."""
    with contextlib.suppress(SettingsError):
        if "/" not in split_host_port(address)[0]:
            return
    raise SettingsError(
        f"{address!r} is not an address of Ray",
        hint="--address HOST:PORT, as ray start --head prints it; or --address local",
    )


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Put back this program's handler of SIGTERM: ``ray.init`` replaces it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Ray's library writes to stderr: the command says what is wrong."""
    sys.stderr.flush()
    kept = os.dup(2)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def first_line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


class RayEngine:
    """The actors of the Ray that this program is connected to."""

    def nodes(self) -> Sequence[Node]:
        """See ``Engine``."""
        import ray

        return [
            Node(each["NodeID"], each["NodeManagerAddress"], each["Resources"].get("memory", 0))
            for each in ray.nodes()
            if each["Alive"]
        ]

    def free_bytes(self) -> float:
        """See ``Engine``."""
        import ray

        return float(ray.available_resources().get("memory", 0))

    def names(self) -> set[str]:
        """See ``Engine``."""
        import ray

        return {name for name in ray.util.list_named_actors() if NAME.fullmatch(name)}

    def kept(self, names: Collection[str]) -> Mapping[str, Kept]:
        """See ``Engine``. Raises ``RayUnavailable`` if an actor cannot run at all."""
        import ray

        found: dict[str, Kept] = {}
        asked = {name: actor.kept.remote() for name, actor in actors(names).items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=KEPT_SECONDS)
        for name, answer in asked.items():
            try:
                found[name] = ray.get(answer, timeout=0)
            except (ray.exceptions.GetTimeoutError, ray.exceptions.ActorUnavailableError):
                continue
            except ray.exceptions.ActorDiedError as error:
                if "creation" not in str(error) and "__init__" not in str(error):
                    continue
                words = str(error).strip().splitlines()[-1][:300]
                raise RayUnavailable(
                    f"{name} cannot start on its machine: {words}",
                    hint="install the same syncd there: pip install 'syncd[ray]'; see: ray status",
                ) from None
        return found

    def place(self, place: Place, node: Node, memory_bytes: int) -> None:
        """See ``Engine``. If the machine is lost, Ray chooses another one."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        self._create(place, memory_bytes, NodeAffinitySchedulingStrategy(node.id, soft=True))

    def place_apart(
        self, places: Sequence[Place], homes: Mapping[str, Node], memory_bytes: int
    ) -> None:
        """See ``Engine``. A placement group holds for later starts too."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = ray.util.placement_group(
            [{"memory": memory_bytes}] * len(places),
            strategy="STRICT_SPREAD",
            name=group_name(places[0].name),
            lifetime="detached",
        )
        if not group.wait(PLACED_SECONDS):
            ray.util.remove_placement_group(group)
            raise RayUnavailable(
                f"Ray found no {len(places)} machines with {memory_bytes / 1e9:.2f} GB each for "
                f"the replicas of shard {places[0].shard}",
                hint="start another one: ray start --address=HOST:PORT; or use fewer --replicas",
            )
        on: dict[int, str] = ray.util.placement_group_table(group)["bundles_to_node_id"]
        bundles = assigned([homes[p.name].id if p.name in homes else "" for p in places], on)
        for place, bundle in zip(places, bundles, strict=True):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            self._create(place, memory_bytes, strategy)

    def _create(self, place: Place, memory_bytes: int, strategy: Any) -> None:
        import ray

        ray.remote(ShardActor).options(
            name=place.name,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=4,
            num_cpus=0,
            memory=memory_bytes,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": dict(OF_ACTORS)},
        ).remote(place)

    def stop(self, names: Collection[str]) -> set[str]:
        """See ``Engine``."""
        import ray

        found = actors(names)
        asked = {name: actor.stop.remote() for name, actor in found.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=STOP_SECONDS)
        stopped: set[str] = set()
        for name, answer in asked.items():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(answer, timeout=0)
                stopped.add(name)
            ray.kill(found[name], no_restart=True)
        left = {group_name(name) for name in self.names()}
        for each in ray.util.placement_group_table().values():
            mine = NAME.fullmatch(each["name"]) and each["state"] != "REMOVED"
            if mine and each["name"] not in left:
                ray.util.remove_placement_group(ray.util.get_placement_group(each["name"]))
        return stopped


def actors(names: Collection[str]) -> dict[str, Any]:
    """The actors with these names, as far as they exist."""
    import ray

    found: dict[str, Any] = {}
    for name in names:
        with contextlib.suppress(ValueError):
            found[name] = ray.get_actor(name, namespace=NAMESPACE)
    return found


def group_name(name: str) -> str:
    """Name of the placement group of a consumer's shard."""
    return "-".join(name.split("-")[:4])


def assigned(homes: Sequence[str], on: Mapping[int, str]) -> list[int]:
    """A bundle for each replica: the one on the node where it was before, if there is one."""
    free = dict(on)
    found: dict[int, int] = {}
    for place, home in enumerate(homes):
        bundle = next((number for number, node in free.items() if node == home), None)
        if bundle is not None:
            found[place] = bundle
            del free[bundle]
    left = iter(sorted(free))
    return [found[place] if place in found else next(left) for place in range(len(homes))]
