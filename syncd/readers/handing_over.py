"""A reader's requests: answered here, or handed over to the main process.

Invariant: the client cannot tell which process answered. A request that is handed over counts
against the reader's own limits, and its answer is the main process's, with the client's id.
"""

from __future__ import annotations

import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any, Generic, TypeVar

import anyio
import msgspec

from syncd.client.exchange import as_exception, read_answer
from syncd.errors import TimedOut
from syncd.protocol import messages, status_messages
from syncd.protocol.messages import Params
from syncd.readers.answering import NotYet
from syncd.readers.link import ANSWER, CLIENT, Link, LinkLost, open_link
from syncd.readers.shelf import NotHere
from syncd.rpc.connection import SPARE_METHODS
from syncd.rpc.dispatch import Dispatcher, Limits, drop, failure_line
from syncd.rpc.protocol import Method, MethodNotFoundError, Request, result_line
from syncd.rpc.stream import Stream

T = TypeVar("T")

OWN_METHODS = "reader."
"""Beginning of the names of methods that only readers call."""
REACH = f"{OWN_METHODS}reach"
LATE_SECONDS = 1.0
"""How much later than asked for the main process may say that a position is not reached.

After that it does not run: a search that waits for it would never end.
"""


class MainSilent(TimedOut):
    """The main process has not said in time whether a position is reached."""

    def __init__(self, timeout_ms: float) -> None:
        super().__init__(
            f"the main process has not answered within {timeout_ms:g} ms",
            hint="ask again without consistency and after, or read the log of syncd serve",
        )


class ReachParams(Params, frozen=True):
    """Wait for the position that a search asks for."""

    dataset: str
    after: str | None
    consistency: str
    timeout_ms: float


_RESULTS: dict[str, msgspec.json.Decoder[Any]] = {
    "search": msgspec.json.Decoder(messages.SearchResult),
    "datasets": msgspec.json.Decoder(list[status_messages.DatasetStatus]),
    "status": msgspec.json.Decoder(status_messages.ServiceStatus),
}


class Asked(ABC, Generic[T]):
    """A request of a client, the connection ``owner``, and the form of its answer."""

    method: str
    owner: object

    @abstractmethod
    async def elsewhere(self, link: Link) -> T:
        """The main process's answer."""

    @abstractmethod
    def answer(self, result: Any) -> T:
        """The answer with a result of this process."""

    @abstractmethod
    def refused(self, line: bytes) -> T:
        """The answer with an error of the main process, the line after its id."""


class AskedLine(Asked[bytes | None]):
    """A client's line; the answer is a line as well, or None to a notification."""

    def __init__(self, request: Request, owner: object) -> None:
        self.request = request
        self.method = request.method
        self.owner = owner

    async def elsewhere(self, link: Link) -> bytes | None:
        """See ``Asked``."""
        method, params = self.method, bytes(self.request.params)
        if self.request.id is None:
            link.notify(method, params)
            return None
        return self.refused(await link.ask(method, params))

    def answer(self, result: Any) -> bytes | None:
        """See ``Asked``."""
        return None if self.request.id is None else result_line(self.request.id, result)

    def refused(self, line: bytes) -> bytes | None:
        """See ``Asked``."""
        return None if self.request.id is None else ANSWER + self.request.id + line


class AskedCall(Asked[Any]):
    """A call for a client with another protocol; the answer is the method's result."""

    def __init__(self, method: str, params: Params, owner: object) -> None:
        self.method = method
        self.params = params
        self.owner = owner

    async def elsewhere(self, link: Link) -> Any:
        """See ``Asked``."""
        return self.refused(await link.ask(self.method, msgspec.json.encode(self.params)))

    def answer(self, result: Any) -> Any:
        """See ``Asked``."""
        return result

    def refused(self, line: bytes) -> Any:
        """See ``Asked``: the error is raised."""
        answer = read_answer(b"{" + line[1:])
        if answer.error is not None:
            raise as_exception(answer.error)
        return _RESULTS[self.method].decode(answer.result)


class Later(Generic[T]):
    """A request that has to wait; awaiting it gives its answer."""

    __slots__ = ("_answer", "_waited")

    def __init__(self, answer: Callable[[], Awaitable[T]], waited: object = None) -> None:
        self._answer = answer
        self._waited = waited

    def __await__(self) -> Generator[Any, Any, T]:
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
            asked = AskedLine(request, owner)
            return self._run(asked, size, lambda: self.outcome(request, size))
        except Exception as error:  # noqa: BLE001 - the top of a request
            return failure_line(request, error)

    def call(self, name: str, params: Params, size: int, owner: object = None) -> Any:
        """See ``Dispatcher``."""
        asked, run = AskedCall(name, params, owner), super().call
        return self._run(asked, size, lambda: run(name, params, size))

    async def finish(self, request: Request, waited: Awaitable[Any]) -> bytes | None:
        """See ``Dispatcher``."""
        try:
            line: bytes | None = await waited
        except Exception as error:  # noqa: BLE001 - the top of a request
            return failure_line(request, error)
        return line

    def forget(self, owner: object) -> None:
        """See ``Dispatcher``: the main process cancels the requests of a link that closes."""
        link = self._links.pop(owner, None)
        if link is not None:
            link.close()

    def _run(self, asked: Asked[T], size: int, run: Callable[[], Any]) -> T | Later[T]:
        """The answer, or what gives it later. Raises what the method raises, or ``Overloaded``."""
        if asked.method not in self._methods:
            if asked.method not in SPARE_METHODS:
                self.admit(size)
            return Later(lambda: self._ask(asked))
        try:
            outcome = run()
        except NotYet as error:
            params = error.params
            return Later(lambda: self._reached(params, asked))
        except NotHere:
            return Later(lambda: self._ask(asked))
        if isinstance(outcome, Awaitable):
            return Later(lambda: self._here(outcome, asked), outcome)
        return asked.answer(outcome)

    async def _ask(self, asked: Asked[T]) -> T:
        return await asked.elsewhere(await self._link(asked.owner))

    async def _here(self, waited: Awaitable[Any], asked: Asked[T]) -> T:
        try:
            result = await waited
        except NotHere:  # it was withdrawn meanwhile
            return await self._ask(asked)
        return asked.answer(result)

    async def _reached(self, params: messages.SearchParams, asked: Asked[T]) -> T:
        """Have the main process reach the position, then answer here."""
        deadline = time.monotonic() + params.timeout_ms / 1000
        link = await self._link(asked.owner)
        reach = ReachParams(params.dataset, params.after, params.consistency, params.timeout_ms)
        reached = b""
        with anyio.move_on_after(params.timeout_ms / 1000 + LATE_SECONDS):
            reached = await link.ask(REACH, msgspec.json.encode(reach))
        if not reached:
            raise MainSilent(params.timeout_ms)
        if not reached.startswith(b',"result"'):
            return asked.refused(reached)
        left = max(int((deadline - time.monotonic()) * 1000), 1)
        now = msgspec.structs.replace(params, after=None, consistency="eventual", timeout_ms=left)
        method, _ = self._methods[asked.method]
        try:
            result = method.call(now)
            if isinstance(result, Awaitable):
                result = await result
        except NotHere:
            return await self._ask(asked)
        return asked.answer(result)

    async def _link(self, owner: object) -> Link:
        """The connection's link, opened at its first use, and again after it was lost."""
        link = self._links.get(owner)
        if link is not None and not link.is_lost:
            return link
        async with self._opening:
            link = self._links.get(owner)  # another request of this client may have been first
            if link is None or link.is_lost:
                link = await open_link(self._control, CLIENT)
                if isinstance(owner, Stream) and owner.is_lost:
                    link.close()
                    raise LinkLost
                self._links[owner] = link
            return link
