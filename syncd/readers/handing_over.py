"""A reader's requests: answered here, or handed over to the main process.

Invariant: the client cannot tell which process answered. A request that is handed over counts
against the reader's own limits, and its answer is the main process's, with the client's id.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any

import anyio
import msgspec

from syncd.protocol import messages
from syncd.protocol.messages import Params
from syncd.readers.answering import NotYet
from syncd.readers.link import ANSWER, CLIENT, Link, LinkLost, open_link
from syncd.readers.shelf import NotHere
from syncd.rpc.connection import SPARE_METHODS, Connection
from syncd.rpc.dispatch import Dispatcher, Limits, drop, failure_line
from syncd.rpc.protocol import Method, MethodNotFoundError, Request

OWN_METHODS = "reader."
"""Beginning of the names of methods that only readers call."""
REACH = f"{OWN_METHODS}reach"


class ReachParams(Params, frozen=True):
    """Wait for the position that a search asks for."""

    dataset: str
    after: str | None
    consistency: str
    timeout_ms: float


class Later:
    """A request that has to wait; awaiting it gives the line of its answer."""

    __slots__ = ("_answer", "_waited")

    def __init__(
        self, answer: Callable[[], Awaitable[bytes | None]], waited: object = None
    ) -> None:
        self._answer = answer
        self._waited = waited

    def __await__(self) -> Generator[Any, Any, bytes | None]:
        return self._answer().__await__()

    def close(self) -> None:
        """Close what was to be awaited, if this is never awaited."""
        if isinstance(self._waited, Awaitable):
            drop(self._waited)


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
        try:
            if request.method.startswith(OWN_METHODS):
                raise MethodNotFoundError(request.method)  # noqa: TRY301 - as a failing method
            if request.method not in self._methods:
                if request.method not in SPARE_METHODS:
                    self.admit(size)
                return Later(lambda: self.ask(request, owner))
            outcome = self.outcome(request, size)
        except NotHere as error:
            return self._not_now(error, request, owner)
        except Exception as error:  # noqa: BLE001 - the top of a request
            return failure_line(request, error)
        if isinstance(outcome, Awaitable):
            return Later(lambda: self._here(outcome, request, owner), outcome)
        return self.answer(request, outcome)

    async def finish(self, request: Request, waited: Awaitable[Any]) -> bytes | None:
        """See ``Dispatcher``."""
        try:
            line: bytes | None = await waited
        except Exception as error:  # noqa: BLE001 - the top of a request
            return failure_line(request, error)
        return line

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

    def _not_now(self, error: NotHere, request: Request, owner: object) -> Later:
        if isinstance(error, NotYet):
            return Later(lambda: self._reached(error.params, request, owner))
        return Later(lambda: self.ask(request, owner))

    async def _here(self, waited: Awaitable[Any], request: Request, owner: object) -> bytes | None:
        try:
            result = await waited
        except NotHere:  # it was withdrawn meanwhile
            return await self.ask(request, owner)
        return self.answer(request, result)

    async def _reached(
        self, params: messages.SearchParams, request: Request, owner: object
    ) -> bytes | None:
        """Have the main process reach the position, then answer here."""
        deadline = time.monotonic() + params.timeout_ms / 1000
        link = self._links.get(owner) or await self._open(owner)
        reach = ReachParams(params.dataset, params.after, params.consistency, params.timeout_ms)
        reached = await link.ask(REACH, msgspec.json.encode(reach))
        if not reached.startswith(b',"result"'):
            return None if request.id is None else ANSWER + request.id + reached
        left = max(int((deadline - time.monotonic()) * 1000), 1)
        now = msgspec.structs.replace(params, after=None, consistency="eventual", timeout_ms=left)
        method, _ = self._methods[request.method]
        try:
            result = method.call(now)
            if isinstance(result, Awaitable):
                result = await result
        except NotHere:
            return await self.ask(request, owner)
        return self.answer(request, result)

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
