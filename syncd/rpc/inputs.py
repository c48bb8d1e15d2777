"""Whether any client's input waits to be read: a busy event loop keeps that client waiting."""

from __future__ import annotations

import select

MOST_CONNECTIONS = 64
"""Above this number of connections one is assumed to wait: polling all would cost too much."""


class Inputs:
    """The descriptors of open connections, each with its owner.

    The owner is kept because the system gives a closed socket's descriptor to the next socket.
    """

    def __init__(self) -> None:
        self._poll = select.poll()
        self._owners: dict[int, object] = {}

    def add(self, descriptor: int, owner: object) -> None:
        """Watch a connection that was opened."""
        self._poll.register(descriptor, select.POLLIN)
        self._owners[descriptor] = owner

    def remove(self, descriptor: int, owner: object) -> None:
        """Stop watching a closed connection; if another one has its descriptor now, keep that."""
        if self._owners.get(descriptor) is owner:
            del self._owners[descriptor]
            self._poll.unregister(descriptor)

    def waiting(self) -> bool:
        """Whether any connection has input. This takes 2 µs with 10 connections."""
        return len(self._owners) > MOST_CONNECTIONS or any(
            event & select.POLLIN for _, event in self._poll.poll(0)
        )
