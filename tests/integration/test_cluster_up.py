"""``syncd cluster up`` and ``down``, with real processes and an engine in this process.

Ray itself is in ``test_ray.py``: its 250 MB take CI too long.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import psycopg
import pytest

from syncd.cluster import starting
from syncd.cluster.engine import Node
from syncd.cluster.keeper import Keeper, Kept, Place, end, is_locked
from syncd.cluster.operating import look
from syncd.errors import RayUnavailable
from syncd.settings import Settings, load_settings

SECONDS = 60.0
HOST = "127.0.0.1"
SAID: list[str] = []
TOKEN = "of a test"  # noqa: S105


class Threads:
    """An engine whose keepers are threads of this process, on one machine."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.keepers: dict[str, Keeper] = {}

    def nodes(self) -> Sequence[Node]:
        return [Node("a", HOST, 1e9)]

    def free_bytes(self) -> float:
        return 1e9

    def names(self) -> set[str]:
        return set(self.keepers)

    def kept(self, names: Collection[str]) -> Mapping[str, Kept]:
        return {name: each.kept() for name, each in self.keepers.items() if name in names}

    def place(self, place: Place, node: Node, memory_bytes: int) -> None:
        assert memory_bytes <= node.memory_bytes
        inherited = os.environ | {"SYNCD_DATA_DIR": str(self.data_dir), "SYNCD_HTTP": "off"}
        self.keepers[place.name] = Keeper(place, node.host, inherited)
        self.keepers[place.name].start()

    def place_apart(
        self, places: Sequence[Place], homes: Mapping[str, Node], memory_bytes: int
    ) -> None:
        raise AssertionError(f"one machine has no room for {places}, {homes}, {memory_bytes}")

    def stop(self, names: Collection[str]) -> set[str]:
        for name in names:
            self.keepers.pop(name).stop()
        return set(names)

    def lose(self, name: str) -> None:
        """Lose a keeper as a killed actor is lost: its process runs on."""
        self.keepers.pop(name)._stopping.set()


@pytest.fixture
def settings(db: psycopg.Connection, database: str, tmp_path: Path) -> Settings:
    """Settings of a database with a table."""
    db.execute("CREATE TABLE numbers (id bigint PRIMARY KEY, v real[])")
    db.execute("SELECT syncd.attach('numbers', metric => 'l2')")
    db.execute("INSERT INTO numbers SELECT i, ARRAY[i, 1] FROM generate_series(1, 100) i")
    return load_settings(dsn=database, data_dir=tmp_path, token=TOKEN)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Threads]:
    found = Threads(tmp_path)
    yield found
    for each in found.keepers.values():
        each.stop()
    for folder in tmp_path.glob("shard-*"):  # of a keeper that the test has lost
        assert end(folder, SECONDS)


def up(engine: Threads, settings: Settings, shards: int = 2) -> dict[str, int]:
    """Run ``up``; the process of each shard."""
    places = starting.places_of(settings, shards, 1, None, local=False)
    assert starting.up(engine, settings, places, 10**8, SAID.append, apart=False)
    until(lambda: look(settings).is_whole)
    return {name: int(each.kept().pid or 0) for name, each in engine.keepers.items()}


def until(true: Callable[[], bool]) -> None:
    """Return when a condition holds; fails after a minute."""
    late = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < late
        time.sleep(0.01)


def test_up_starts_what_is_missing_and_takes_over_what_runs_and_down_leaves_no_process(
    engine: Threads, settings: Settings, tmp_path: Path
) -> None:
    first = up(engine, settings)
    assert up(engine, settings) == first
    name, other = "shard-0-of-2", "shard-1-of-2"
    with psycopg.connect(settings.conninfo) as db:
        (address,) = db.execute("SELECT address FROM syncd.consumers WHERE shard = 0").fetchone()  # type: ignore[misc]
    assert address.startswith(f"tcp://{HOST}:")
    engine.lose(name)
    assert up(engine, settings) == first
    os.kill(first[name], signal.SIGKILL)
    until(lambda: engine.keepers[name].kept().pid not in (None, first[name]))
    second = up(engine, settings)
    assert (second[other], second[name] != first[name]) == (first[other], True)
    assert engine.keepers[name].kept().error == "it ended"
    # A keeper that is lost, as if its machine were cut off: its process ends all the same.
    engine.lose(other)
    stopped = starting.stop_kept(engine, None)
    assert stopped == {name}
    assert starting.take_names(settings, None, stopped, SAID.append) == []
    assert not any(is_locked(tmp_path / each) for each in (name, other))
    assert starting.take_names(settings, None, set(), SAID.append) == []


def test_a_shard_that_cannot_start_is_named_with_its_error(
    engine: Threads, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "FAILURES", 1)
    (tmp_path / "shard-0-of-1" / "syncd.sock").mkdir(parents=True)
    with pytest.raises(RayUnavailable, match="shard-0-of-1 does not start on") as raised:
        up(engine, settings, 1)
    assert "syncd.sock" in raised.value.message
    assert "shard-0-of-1/serve.log" in raised.value.hint


def test_no_process_is_started_while_the_head_does_not_answer(
    settings: Settings, tmp_path: Path
) -> None:
    asked = threading.Event()
    (place,) = starting.places_of(settings, 1, 1, tmp_path, local=True)

    def head_is_lost() -> bool:
        asked.set()
        return False

    keeper = Keeper(place, HOST, os.environ, head_is_lost)
    keeper.start()
    try:
        assert asked.wait(SECONDS)
    finally:
        keeper.stop()
    assert keeper.kept().pid is None
    assert not keeper.log.exists()
