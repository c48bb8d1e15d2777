"""What starting and stopping a cluster needs of the engine that places processes on machines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from syncd.cluster.keeper import Kept, Place


@dataclass(frozen=True, slots=True)
class Node:
    """A machine. ``memory_bytes`` is the part of its memory that the engine may give away."""

    id: str
    host: str
    memory_bytes: float


class Engine(Protocol):
    """Keepers on machines, each with the name of its consumer. Methods may raise ``SyncdError``.

    A keeper whose machine is lost is started on another one.
    """

    def nodes(self) -> Sequence[Node]:
        """The machines that are alive."""

    def free_bytes(self) -> float:
        """Memory that is not given away, of all machines."""

    def names(self) -> set[str]:
        """The keepers that exist."""

    def kept(self, names: Collection[str]) -> Mapping[str, Kept]:
        """The states of those keepers that answer."""

    def place(self, place: Place, node: Node, memory_bytes: int) -> None:
        """Start a keeper on a machine."""

    def place_apart(
        self, places: Sequence[Place], homes: Mapping[str, Node], memory_bytes: int
    ) -> None:
        """Start the keepers of a shard's replicas, never two of them on one machine.

        ``homes`` are the machines that they had before, if they are known.
        """

    def stop(self, names: Collection[str]) -> set[str]:
        """End keepers with their processes; the names whose processes are known to have ended."""
