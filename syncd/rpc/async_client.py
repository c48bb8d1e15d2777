"""The asynchronous client: any number of calls at once over one connection, matched to their answers by id."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from itertools import count
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import anyio
import msgspec
from anyio.to_thread import run_sync

from syncd.errors import ServiceUnavailable
from syncd.rpc import calls
from syncd.rpc.address import TcpAddress, UnixAddress, find_service
from syncd.rpc.calls import Call, Key
from syncd.rpc.client import DEFAULT_TIMEOUT_SECONDS, as_method
from syncd.rpc.exchange import Answer, allowed_seconds, read_answer, request_line, take_result, timed_out, unavailable
from syncd.rpc.messages import DEFAULT_PAGE_KEYS

P = ParamSpec("P")
T = TypeVar("T")


def asynchronous(build: Callable[P, Call[T]]) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """A call as a method of ``AsyncClient``."""

    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run(build(*args, **kwargs))

    return as_method(method, build)


class AsyncClient:
    """A connection to syncd, for use with ``async with``. Tasks may share it; their calls run at the same time."""

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
    ) -> None:
        self.timeout = timeout
        self._address = address
        self._token = token
        self._tls = tls
        self._link: _Link | None = None
        self._connecting = anyio.Lock()

    search = asynchronous(calls.search)
    get = asynchronous(calls.get)
    keys_page = asynchronous(calls.keys_page)
    datasets = asynchronous(calls.datasets)
    status = asynchronous(calls.status)
    wait = asynchronous(calls.wait)
    checkpoint = asynchronous(calls.checkpoint)
    verify = asynchronous(calls.verify)
    rebuild = asynchronous(calls.rebuild)
    why = asynchronous(calls.why)
    ping = asynchronous(calls.ping)
    discover = asynchronous(calls.discover)

    async def keys(self, dataset: str, *, limit: int = DEFAULT_PAGE_KEYS) -> AsyncIterator[Key]:
        """Every indexed key, in a stable order, fetched in pages of ``limit``."""
        after: Key | None = None
        while True:
            page = await self.keys_page(dataset, after_key=after, limit=limit)
            for key in page.keys:
                yield key
            if (after := page.next) is None:
                return

    async def connect(self) -> None:
        """Connect now; without it the first call does. Raises ``ServiceUnavailable`` where nobody listens."""
        await self._connected()

    async def close(self) -> None:
        """Close the connection and wait until it is; the next call opens another."""
        link, self._link = self._link, None
        if link is not None:
            link.close()
            await link.closed.wait()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.close()

    async def run(self, call: Call[T]) -> T:
        """Send one call and wait for its answer. A connection that is dead is replaced once, as in ``Client``."""
        link = self._link
        if link is not None and not link.is_closed:
            try:
                return await self._exchange(link, call)
            except ServiceUnavailable:
                pass
        return await self._exchange(await self._connected(), call)

    async def _exchange(self, link: _Link, call: Call[T]) -> T:
        seconds = allowed_seconds(call, self.timeout)
        with anyio.move_on_after(seconds):
            return take_result(call, await link.ask(call))
        raise timed_out(call, link.address, seconds)

    async def _connected(self) -> _Link:
        async with self._connecting:
            if self._link is None or self._link.is_closed:
                address = await run_sync(find_service, self._address, self._token, self._tls)
                link = await self._open(address)
                try:
                    if isinstance(address, TcpAddress):
                        await self._exchange(link, calls.authenticate(address.token))
                except BaseException:
                    link.close()
                    raise
                self._link = link
            return self._link

    async def _open(self, address: UnixAddress | TcpAddress) -> _Link:
        loop = asyncio.get_running_loop()

        def new_link() -> _Link:
            return _Link(address)

        try:
            with anyio.fail_after(self.timeout):
                if isinstance(address, UnixAddress):
                    return (await loop.create_unix_connection(new_link, address.path))[1]
                return (await loop.create_connection(new_link, address.host, address.port, ssl=address.tls))[1]
        except OSError as error:
            raise unavailable(address, error) from error


class _Link(asyncio.Protocol):
    """One open connection and the calls that wait for an answer on it."""

    def __init__(self, address: UnixAddress | TcpAddress) -> None:
        self.address = address
        self.closed = anyio.Event()
        self.is_closed = False
        self._transport: asyncio.Transport
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._received = bytearray()
        self._refusal: Answer | None = None
        self._writable = anyio.Event()
        self._writable.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one by its methods only

    def data_received(self, data: bytes) -> None:
        first, *more = data.split(b"\n")
        self._received += first
        if not more:
            return
        lines = [bytes(self._received), *more]
        self._received = bytearray(lines.pop())
        for line in lines:
            try:
                answer = read_answer(line)
            except msgspec.MsgspecError:
                self._transport.abort()  # whoever this is, it is not syncd
                return
            if answer.id is None:
                self._refusal = answer
                for future in self._waiting.values():
                    if not future.done():
                        future.set_result(answer)
                self.close()
                return
            waiting = self._waiting.get(answer.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)

    def pause_writing(self) -> None:
        self._writable = anyio.Event()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        self._writable.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(unavailable(self.address, error))
        self.closed.set()

    async def ask(self, call: Call[Any]) -> Answer:
        """Send a call; its answer. Whoever stops waiting loses the answer, and nobody else does."""
        await self._writable.wait()
        if self._refusal is not None:
            return self._refusal
        if self.is_closed or self._transport.is_closing():
            raise unavailable(self.address, None)
        number = next(self._numbers)
        line = request_line(number, call)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._transport.write(line)
            return await future
        finally:
            del self._waiting[number]

    def close(self) -> None:
        """Close without waiting for answers."""
        self.is_closed = True
        self._transport.abort()
