"""Where replicas are placed, what their processes are given, and what is refused before a start."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import pytest

from syncd.cluster import ray, starting
from syncd.cluster.engine import Node
from syncd.cluster.keeper import Keeper, Kept, Place
from syncd.cluster.layout import Layout, Registered
from syncd.cluster.local_head import LocalHead
from syncd.errors import RayUnavailable, SettingsError
from syncd.settings import load_settings, name_of_shard
from syncd.shard import Shard

GB = 10**9
SECRET = "of a test"  # noqa: S105
NODES = [Node(name, f"10.0.0.{number}", 2 * GB) for number, name in enumerate("abc", 1)]


class Recorded:
    """An engine that notes what it is asked to start."""

    def __init__(self) -> None:
        self.placed: dict[str, str] = {}
        self.apart: list[tuple[str, ...]] = []

    def nodes(self) -> Sequence[Node]:
        return NODES

    def free_bytes(self) -> float:
        return 6.0 * GB

    def names(self) -> set[str]:
        return set(self.placed)

    def kept(self, names: Collection[str]) -> Mapping[str, Kept]:
        assert not names
        return {}

    def place(self, place: Place, node: Node, memory_bytes: int) -> None:
        assert memory_bytes == GB
        self.placed[place.name] = node.id

    def place_apart(
        self, places: Sequence[Place], homes: Mapping[str, Node], memory_bytes: int
    ) -> None:
        assert (dict(homes), memory_bytes) == ({}, GB)
        self.apart.append(tuple(each.name for each in places))

    def stop(self, names: Collection[str]) -> set[str]:
        return set(names)


def layout(**addresses: str) -> Layout:
    """A layout of three shards, of which those with these numbers have registered."""
    found: dict[Shard, tuple[Registered, ...]] = {Shard(3, number): () for number in range(3)}
    for name, address in addresses.items():
        shard = Shard(3, int(name[1:]))
        found[shard] = (Registered(name_of_shard(shard, ""), shard, "", address),)
    return Layout(3, found)


def started(found: Layout, places: Sequence[Place], *, apart: bool = False) -> Recorded:
    """What an engine is asked for."""
    engine = Recorded()
    starting.start(engine, starting.homes_of(found, NODES), places, NODES, GB, apart=apart)
    return engine


def places(shards: int = 3, replicas: int = 1, **settings: object) -> list[Place]:
    return starting.places_of(
        load_settings(token=SECRET, **settings), shards, replicas, None, local=False
    )


def test_shards_are_spread_and_one_that_runs_stays_on_its_machine() -> None:
    assert started(layout(), places()).placed == {
        "shard-0-of-3": "a",
        "shard-1-of-3": "b",
        "shard-2-of-3": "c",
    }
    found = layout(s2="tcp://10.0.0.1:5000", s1="tcp://10.0.0.9:5000")
    assert started(found, places()).placed == {
        "shard-0-of-3": "b",
        "shard-1-of-3": "c",
        "shard-2-of-3": "a",
    }


def test_replicas_of_a_shard_are_placed_apart() -> None:
    engine = started(layout(), places(2, 2), apart=True)
    assert engine.apart == [("shard-0-of-2", "shard-0-of-2-b"), ("shard-1-of-2", "shard-1-of-2-b")]
    found = layout(s0="tcp://10.0.0.1:5000")
    more = [place for place in places(3, 2) if place.name == "shard-0-of-3-b"]
    assert started(found, more, apart=True).placed == {"shard-0-of-3-b": "b"}


def test_a_replica_takes_the_bundle_on_the_machine_where_it_runs() -> None:
    assert ray.assigned(["c", "a"], {0: "a", 1: "c"}) == [1, 0]
    assert ray.assigned(["", "a"], {0: "a", 1: "c"}) == [1, 0]
    assert ray.assigned(["x", "x"], {0: "a", 1: "c"}) == [0, 1]


@pytest.mark.parametrize(
    ("nodes", "free", "missing", "replicas", "words"),
    [
        (NODES[:2], 4 * GB, 3, 3, "3 replicas of a shard need 3 machines, Ray has 2"),
        (NODES, 6 * GB, 7, 1, "7 shards with 1.00 GB each do not fit: Ray has 6.00 GB left"),
        (NODES, GB, 2, 1, "2 shards with 1.00 GB each do not fit: Ray has 1.00 GB left"),
    ],
)
def test_too_few_machines_or_too_little_memory_is_said_before_anything_starts(
    nodes: Sequence[Node], free: float, missing: int, replicas: int, words: str
) -> None:
    with pytest.raises(RayUnavailable, match=words) as raised:
        starting.check_room(nodes, free, missing, GB, replicas)
    assert "ray start --address=HOST:PORT" in raised.value.hint
    starting.check_room(NODES, 6 * GB, 6, GB, 3)


def test_shards_on_other_machines_need_a_token() -> None:
    with pytest.raises(SettingsError, match="no token is set"):
        starting.places_of(load_settings(token=""), 3, 1, None, local=False)


def test_processes_get_the_settings_of_the_command_but_not_those_of_one_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PGHOST", "db.internal")
    (place,) = places(1, dsn="dbname=app", checkpoint_seconds=7, consumer="mine", http="0.0.0.0:1")
    assert place.settings["PGHOST"] == "db.internal"
    assert place.settings["SYNCD_DSN"] == "dbname=app"
    assert place.settings["SYNCD_CHECKPOINT_SECONDS"] == "7.0"
    assert not {"SYNCD_CONSUMER", "SYNCD_HTTP"} & set(place.settings)
    assert SECRET not in repr(place)
    inherited = {"SYNCD_DATA_DIR": str(tmp_path), "SYNCD_SOCKET": "/other", "SYNCD_HTTP": ":1"}
    keeper = Keeper(place, "10.0.0.7", inherited)
    assert keeper.environment["SYNCD_DATA_DIR"] == str(tmp_path / "shard-0-of-1")
    assert keeper.environment["SYNCD_CONSUMER"] == "shard-0-of-1"
    assert keeper.environment["SYNCD_HTTP"] == ":1"
    assert "SYNCD_SOCKET" not in keeper.environment
    assert keeper.command[-4:] == ["--shard", "0/1", "--listen", "10.0.0.7:0"]
    assert load_settings(shard="0/1").consumer == place.name


def test_a_cluster_with_other_settings_is_not_taken_over() -> None:
    mine, others = places(1, dsn="dbname=app"), places(1, dsn="dbname=other")
    kept = {mine[0].name: Kept(mine[0].name, "a", 1, 0, "", "log", mine[0].digest)}
    starting.check_same(kept, mine)
    with pytest.raises(SettingsError, match="shard-0-of-1 already run with other settings"):
        starting.check_same(kept, others)


def test_a_replica_that_ends_again_and_again_stops_the_wait() -> None:
    kept = Kept("shard-0-of-1", "10.0.0.7", None, 3, "the database is gone", "/log", "")
    with pytest.raises(RayUnavailable, match=r"0-of-1 does not start .*: the database is gone"):
        starting.check_starting({kept.name: kept}, {kept.name: 0.0}, [kept.name])
    with pytest.raises(RayUnavailable, match="Ray has not started shard-0-of-1"):
        starting.check_starting({}, {kept.name: float("-inf")}, [kept.name])


@pytest.mark.parametrize("address", ["auto", "ray://10.0.0.1:10001", "10.0.0.1"])
def test_an_address_that_does_not_say_which_ray_is_refused(address: str) -> None:
    with pytest.raises(SettingsError, match="is not an address of Ray"):
        ray.check_address(address)


def test_without_the_extra_the_error_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayUnavailable) as raised, ray.connected("127.0.0.1:6379"):
        pass
    assert "pip install 'syncd[ray]'" in raised.value.hint
    with pytest.raises(RayUnavailable) as raised:
        LocalHead(tmp_path).start(print)
    assert "pip install 'syncd[ray]'" in raised.value.hint
