"""The asynchronous client: any number of calls at once over one connection.

Calls and answers are matched by id.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from time import monotonic
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import anyio
from anyio.to_thread import run_sync

from syncd.client import calls
from syncd.client.address import TcpAddress, find_service
from syncd.client.async_link import Link, OnLoop, Sent, open_link
from syncd.client.calls import Call, Key
from syncd.client.client import DEFAULT_TIMEOUT_SECONDS, as_method
from syncd.client.exchange import allowed_seconds, take_result, timed_out
from syncd.errors import ServiceUnavailable, SyncdError
from syncd.per_process import PerProcess
from syncd.protocol.messages import DEFAULT_PAGE_KEYS, Partial

P = ParamSpec("P")
T = TypeVar("T")


def asynchronous(
    build: Callable[P, Call[T]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    """A call as a method of ``AsyncClient``."""

    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self.run(build(*args, **kwargs))

    return as_method(method, build)


class AsyncClient:
    """A connection to syncd, for use with ``async with``.

    Tasks may share it; their calls run at the same time. Each event loop has a connection of its
    own, opened by the first call there. A child process also has its own after ``fork()``. A loop
    that ends as ``asyncio.run`` ends it closes its connection. A pickled client is not connected.
    """

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
        self._own = PerProcess(_Loops, _Loops.leave)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_own"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _own=PerProcess(_Loops, _Loops.leave))

    search = asynchronous(calls.search)
    get = asynchronous(calls.get)
    keys_page = asynchronous(calls.keys_page)
    datasets = asynchronous(calls.datasets)
    status = asynchronous(calls.status)
    wait = asynchronous(calls.wait)
    checkpoint = asynchronous(calls.checkpoint)
    verify = asynchronous(calls.verify)
    rebuild = asynchronous(calls.rebuild)
    recall = asynchronous(calls.recall)
    why = asynchronous(calls.why)
    ping = asynchronous(calls.ping)
    discover = asynchronous(calls.discover)

    async def keys(
        self, dataset: str, *, limit: int = DEFAULT_PAGE_KEYS, partial: Partial | None = None
    ) -> AsyncIterator[Key]:
        """Every indexed key, in a stable order, fetched in pages of ``limit``.

        With ``partial="allow"`` the keys of missing shards are left out; ``keys_page`` names them.
        """
        after: Key | None = None
        while True:
            page = await self.keys_page(dataset, after_key=after, limit=limit, partial=partial)
            for key in page.keys:
                yield key
            if (after := page.next) is None:
                return

    async def connect(self) -> None:
        """Connect now; otherwise the first call connects.

        Raises ``ServiceUnavailable`` if no service listens.
        """
        await self._connected()

    async def close(self) -> None:
        """Close this event loop's connection and wait for the end; the next call opens another."""
        await self._own.get().here().close()

    async def __aenter__(self) -> Self:
        await self.connect()
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await self.close()

    async def run(self, call: Call[T]) -> T:
        """Send one call and wait for its answer.

        A connection that turns out to be dead is replaced once, as in ``Client``.
        """
        link = await self._connected()
        try:
            return await self._exchange(link, call)
        except ServiceUnavailable:
            link = await self._connected()
        return await self._exchange(link, call)

    async def _exchange(self, link: Link, call: Call[T]) -> T:
        seconds = allowed_seconds(call, self.timeout)
        began = monotonic()
        with anyio.move_on_after(seconds):
            return take_result(call, await link.ask(call))
        link.give_up(began)
        raise timed_out(call, link.address, seconds)

    async def _connected(self) -> Link:
        here = self._own.get().here()
        if here.link is not None and here.link.is_usable:
            return here.link
        failures = here.failures
        async with here.connecting:
            if here.link is None or not here.link.is_usable:
                if here.failure is not None and here.failures != failures:
                    # this call waited for an attempt that failed: one time-out for all
                    raise here.failure.with_traceback(None)
                try:
                    here.link = await self._open(here)
                except SyncdError as error:
                    here.failure = error
                    here.failures += 1
                    raise
            return here.link

    async def _open(self, here: OnLoop) -> Link:
        address = await run_sync(find_service, self._address, self._token, self._tls)
        link = await open_link(address, here, self.timeout)
        try:
            if isinstance(address, TcpAddress):
                await self._exchange(link, calls.authenticate(address.token))
        except BaseException:
            link.close()
            raise
        return link


class SplitClient(AsyncClient):
    """A client whose calls can be sent first and waited for later, all of them at once."""

    def begin(self, call: Call[Any]) -> Sent | None:
        """Send a call now, if there is an open connection: its answer is for ``end``."""
        link = self._own.get().here().link
        return None if link is None else link.begin(call)

    async def end(self, call: Call[T], sent: Sent, seconds: float | None) -> T:
        """Wait up to ``seconds`` for the answer of a call that was sent.

        As in ``run``, a connection that turns out to be dead is replaced once.
        """
        until = None if seconds is None else monotonic() + seconds
        granted = None if until is None else round(until - sent.began, 2)
        with anyio.move_on_after(seconds):
            try:
                return take_result(call, await sent.future)
            except ServiceUnavailable:
                link = await self._connected()
            left = None if until is None else until - monotonic() - (self.timeout or 0.0)
            return await self._exchange(link, replace(call, patience_seconds=left))
        sent.link.give_up(sent.began)
        raise timed_out(call, sent.link.address, granted)


class _Loops:
    """One process's part of a client: a connection for each event loop."""

    def __init__(self) -> None:
        self._loops: dict[asyncio.AbstractEventLoop, OnLoop] = {}

    def here(self) -> OnLoop:
        """The part of the running loop.

        The loops themselves are the keys: a new loop may get the ``id()`` of one that is gone.
        """
        loop = asyncio.get_running_loop()
        here = self._loops.get(loop)
        if here is None:
            for other in tuple(self._loops):
                if other.is_closed():
                    gone = self._loops.pop(other, None)  # None: another thread was faster
                    if gone is not None:
                        gone.leave()
            here = self._loops[loop] = OnLoop()
        return here

    def leave(self) -> None:
        """Close the inherited descriptors; the parent process keeps its connections."""
        for each in self._loops.values():
            each.leave()
