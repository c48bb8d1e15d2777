"""The oracle over a cluster: shards, a router that is asked for every comparison, and reshards.

The router lists the keys of one shard after the other. So a comparison finds a row that no shard
has, and one that two of them have.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from syncd.client.client import Client
from syncd.cluster import operating
from syncd.errors import ShardsUnavailable
from syncd.settings import load_settings
from tests.daemon import Daemon
from tests.faults.following import until
from tests.oracle.machine import ALWAYS_THERE, Oracle, prepared
from tests.oracle.writes import run

LAYOUTS = (3, 2)
"""Numbers of shards: the first one, and the other one of a reshard."""


class Cluster(Daemon):
    """A router, which clients ask, and the shards of the layout that answers."""

    def __init__(self, conninfo: str, folder: Path, number: int, of: int = LAYOUTS[0]) -> None:
        super().__init__(conninfo, folder / "route")
        self.command = "route"
        self.number = number
        self.generations = itertools.count()
        self.shards = self.make_shards(of)

    def make_shards(self, of: int) -> list[Daemon]:
        """The shards of a layout, not yet started, with directories of their own."""
        folder = self.data_dir.parent / f"{next(self.generations)}-of-{of}"
        return [
            prepared(Daemon(self.conninfo, folder / str(n), shard=f"{n}/{of}"), self.number)
            for n in range(of)
        ]

    @property
    def parts(self) -> list[Daemon]:
        """Every process."""
        return [*self.shards, self]

    @property
    def is_whole(self) -> bool:
        """Whether every process runs."""
        return all(each.process is not None for each in self.parts)

    def start(self, *arguments: str) -> Cluster:
        """Start what does not run, and wait until it is ready."""
        start_all(self.shards)
        if self.process is None:
            super().start(*arguments)
        return self

    def reshard(self, of: int) -> None:
        """Let another number of shards answer, as an operator does."""
        new = self.make_shards(of)
        start_all(new)
        old, self.shards = self.shards, [*self.shards, *new]  # all are ended with the example
        settings = load_settings(dsn=self.conninfo)
        said: list[str] = []
        assert operating.reshard(settings, of, said.append), said
        with self.client() as client:
            until_layout(client, of)
        for each in old:
            each.stop()
        self.shards = new


def until_layout(client: Client, of: int) -> None:
    """Return when the router asks the shards of a layout."""
    names = {f"{number}/{of}" for number in range(of)}
    until(lambda: client.status().positions.keys() == names, f"{of} shards answer")


def start_all(daemons: Sequence[Daemon]) -> None:
    """Start those that do not run, at once, and wait until they are ready."""
    started = [each for each in daemons if each.process is None]
    for each in started:
        each.spawn()
    for each in started:
        assert each.process is not None
        line = each.wait_for_line(each.process)
        assert line.startswith(b"ready"), f"{line!r}\n{each.log.read_text()}"


class ShardedOracle(Oracle):
    """The machine with a cluster in place of one syncd."""

    daemon: Cluster
    # A shard takes the dimension of a dataset from its own rows. A row of another length that is
    # alone in its shard is not in quarantine there.
    put_misfit: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.turns = itertools.count()
        self.begun = self.compared = self.events()

    def events(self) -> Counter[str]:
        """What has happened, without comparisons."""
        left_out = ("comparisons", "longest_wait_ms")
        return Counter({name: n for name, n in self.counts.items() if name not in left_out})

    def make_daemon(self, number: int) -> Cluster:
        """The cluster of an example, not yet started."""
        return Cluster(self.conninfo, self.folder / self.name, number)

    @property
    def is_up(self) -> bool:
        """Whether every process runs."""
        return self.daemon.is_whole

    @precondition(lambda self: self.is_up)
    @rule(of=st.sampled_from(LAYOUTS))
    def reshard(self, of: int) -> None:
        """Let another number of shards answer; ``of`` if that one does not answer yet."""
        if of == len(self.daemon.shards):
            of = next(other for other in LAYOUTS if other != of)
        with self.explained():
            self.daemon.reshard(of)
            run(self.db, "DELETE FROM syncd.consumers WHERE layout <> %s", [of])
        self.seen.clear()
        self.counts["reshards"] += 1

    @rule()
    def settle(self) -> None:
        """Compare, unless nothing has happened since: Hypothesis begins with such an example."""
        if self.events() != self.compared:
            super().settle()
            self.compared = self.events()

    def end_syncd(self, how: str) -> None:
        """Kill or stop one process, by turns. Without a shard there is no answer."""
        part = self.daemon.parts[next(self.turns) % len(self.daemon.parts)]
        getattr(part, how)()
        if part is self.daemon:
            self.counts["routers_ended"] += 1
            return
        self.seen.clear()
        absent = str(part.settings["shard"])
        with self.daemon.client() as client, pytest.raises(ShardsUnavailable, match=absent):
            client.search(ALWAYS_THERE, [1, 2, 3, 4])

    def logs(self) -> Sequence[Path]:
        """Logs of all processes."""
        return [each.log for each in self.daemon.parts]

    def finish(self) -> None:
        """Compare, reshard, kill a part and compare again; nothing if nothing has happened."""
        if self.events() == self.begun:
            return
        self.settle()
        if not self.is_up:
            self.start_syncd()
        self.reshard(of=LAYOUTS[0])
        self.break_syncd(how="kill")
        self.settle()

    def clean_up(self) -> None:
        """Leave no process behind."""
        for each in self.daemon.parts:
            if each.process is not None:
                each.kill()
