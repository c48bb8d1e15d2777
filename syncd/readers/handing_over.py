"""A reader's requests: answered here, or handed over to the main process.

Invariant: the client cannot tell which process answered. A request that is handed over counts
against the reader's own limits, and its answer is the main process's, with the client's id.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Generator, Mapping
from typing import Any

import anyio

from syncd.readers.link import ANSWER, CLIENT, Link, LinkLost, open_link
from syncd.rpc.connection import SPARE_METHODS, Connection
from syncd.rpc.dispatch import Dispatcher, Limits, failure_line
from syncd.rpc.protocol import Method, Request


class Handed:
    """A request that the main process answers; awaiting it gives the line of the answer."""

    __slots__ = ("_dispatcher", "_owner", "_request")

    def __init__(self, dispatcher: HandingOver, request: Request, owner: object) -> None:
        self._dispatcher = dispatcher
        self._request = request
        self._owner = owner

    def __await__(self) -> Generator[Any, Any, bytes | None]:
        return self._dispatcher.ask(self._request, self._owner).__await__()


class HandingOver(Dispatcher):
    """Runs the methods that it has, and hands all others over."""

    def __init__(
        self, methods: Mapping[str, Method[Any, Any]], limits: Limits, control: socket.socket
    ) -> None:
        super().__init__(methods, limits)
        self._control = control
        self._links: dict[object, Link] = {}
        self._opening = anyio.Lock(fast_acquire=True)

    def start(
        self, request: Request, size: int, owner: object = None
    ) -> bytes | Awaitable[Any] | None:
        """See ``Dispatcher``."""
        if request.method in self._methods:
            return super().start(request, size, owner)
        return self.hand_over(request, size, owner)

    def hand_over(
        self, request: Request, size: int, owner: object
    ) -> bytes | Awaitable[Any] | None:
        """Have the main process answer; returns what ``start`` returns."""
        if request.method not in SPARE_METHODS:
            try:
                self.admit(size)
            except Exception as error:  # noqa: BLE001 - the top of a request
                return failure_line(request, error)
        return Handed(self, request, owner)

    async def finish(self, request: Request, waited: Awaitable[Any]) -> bytes | None:
        """See ``Dispatcher``."""
        if not isinstance(waited, Handed):
            return await super().finish(request, waited)
        try:
            return await waited
        except Exception as error:  # noqa: BLE001 - the top of a request
            return failure_line(request, error)

    async def ask(self, request: Request, owner: object) -> bytes | None:
        """The main process's answer to a request; None for a notification."""
        link = self._links.get(owner) or await self._open(owner)
        if request.id is None:
            link.notify(request.method, bytes(request.params))
            return None
        return ANSWER + request.id + await link.ask(request.method, bytes(request.params))

    def closed(self, owner: object) -> None:
        """See ``Dispatcher``: the main process cancels the requests of a client that left."""
        link = self._links.pop(owner, None)
        if link is not None:
            link.close()

    async def _open(self, owner: object) -> Link:
        async with self._opening:
            link = self._links.get(owner)  # another request of this client may have been first
            if link is None:
                link = await open_link(self._control, CLIENT)
                if isinstance(owner, Connection) and owner.is_lost:
                    link.close()
                    raise LinkLost
                self._links[owner] = link
            return link
