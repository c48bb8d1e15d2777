"""One connection of the asynchronous client, and an event loop's part of such a client.

A connection belongs to the event loop that opened it. The loop's end closes it: a transport that
outlives its loop can no longer be closed.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncGenerator
from time import monotonic
from typing import Any, cast

import anyio
import msgspec

from syncd.client.address import TcpAddress, UnixAddress
from syncd.client.calls import Call
from syncd.client.exchange import Answer, read_answer, request_line, unavailable
from syncd.errors import SyncdError
from syncd.protocol.keepalive import keep_alive

CLOSE_SECONDS = 1.0


class OnLoop:
    """One event loop's part of a client: the connection in use, and others that are still open."""

    def __init__(self) -> None:
        self.connecting = anyio.Lock()
        self.link: Link | None = None
        self.links: set[Link] = set()
        self.failure: SyncdError | None = None
        """Error of the last attempt to connect that failed; ``failures`` counts such attempts."""
        self.failures = 0
        self._end: AsyncGenerator[None] | None = None

    async def watch(self) -> None:
        """Close the connections when the loop ends.

        ``asyncio.run`` calls ``loop.shutdown_asyncgens`` before ``loop.close``: this ends the
        asynchronous generators that were started on the loop. Such a generator is the only way to
        learn of a loop's end.
        """
        if self._end is None:
            self._end = _closing_at_the_end(self)
            await anext(self._end)

    async def close(self) -> None:
        """Close the connections and wait until they are closed."""
        end, self._end = self._end, None
        await self.close_links()
        if end is not None:
            await end.aclose()

    async def close_links(self) -> None:
        """Close the connections, but keep the generator that waits for the loop's end."""
        self.link = None
        links = tuple(self.links)
        for link in links:
            link.close()
        with anyio.move_on_after(CLOSE_SECONDS):
            for link in links:
                await link.closed.wait()

    def leave(self) -> None:
        """Close the descriptors: the loop is closed, or it belongs to the parent process."""
        for link in tuple(self.links):
            link.leave()


async def _closing_at_the_end(here: OnLoop) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await here.close_links()


async def open_link(address: UnixAddress | TcpAddress, here: OnLoop, timeout: float | None) -> Link:
    """A new connection; raises ``ServiceUnavailable``."""
    loop = asyncio.get_running_loop()
    await here.watch()
    try:
        with anyio.fail_after(timeout):
            connection = await _connected_socket(address)

            def new_link() -> Link:
                return Link(address, connection, here)

            if isinstance(address, UnixAddress):
                return (await loop.create_unix_connection(new_link, sock=connection))[1]
            name = address.host if address.tls else None
            return (
                await loop.create_connection(
                    new_link, sock=connection, ssl=address.tls, server_hostname=name
                )
            )[1]
    except OSError as error:
        raise unavailable(address, error) from error


async def _connected_socket(address: UnixAddress | TcpAddress) -> socket.socket:
    """A connected socket that we open: only a copy of a transport's socket could be closed."""
    loop = asyncio.get_running_loop()
    if isinstance(address, UnixAddress):
        return await _connected_to(socket.AF_UNIX, address.path)
    refused: OSError | None = None
    for family, _, _, _, place in await loop.getaddrinfo(
        address.host, address.port, type=socket.SOCK_STREAM
    ):
        try:
            connection = await _connected_to(family, place)
        except OSError as error:
            refused = error
        else:
            keep_alive(connection)
            return connection
    raise refused or OSError("its name has no address")


async def _connected_to(family: int, place: Any) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, place)
    except BaseException:
        connection.close()
        raise
    return connection


class Sent:
    """A call that was sent over a link, and the future of its answer."""

    __slots__ = ("began", "future", "link", "number")

    def __init__(self, link: Link, number: int, future: asyncio.Future[Answer]) -> None:
        self.link = link
        self.number = number
        self.future = future
        self.began = monotonic()

    @property
    def is_answered(self) -> bool:
        """Whether the answer is there, and is not an error."""
        future = self.future
        return (
            future.done()
            and not future.cancelled()
            and future.exception() is None
            and future.result().error is None
        )

    def forget(self) -> None:
        """Wait no longer for the answer."""
        self.link.forget(self.number)


class Link(asyncio.Protocol):
    """One open connection and the calls that wait for an answer on it."""

    def __init__(
        self, address: UnixAddress | TcpAddress, connection: socket.socket, here: OnLoop
    ) -> None:
        self.address = address
        self.closed = anyio.Event()
        self._is_closed = False
        self._is_given_up = False
        self._connection = connection
        self._here = here
        self._loop = asyncio.get_running_loop()
        self._heard_at = monotonic()
        self._transport: asyncio.Transport
        self._last_number = 0
        self._waiting: dict[int, asyncio.Future[Answer]] = {}
        self._received = bytearray()
        self._refusal: Answer | None = None
        self._writable = anyio.Event()
        self._writable.set()

    @property
    def is_usable(self) -> bool:
        """Whether further calls may be sent over it."""
        return not self._is_closed and not self._is_given_up

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the link: the loop's end closes it from now on."""
        # cast: uvloop's transport has these methods, but does not derive from asyncio.Transport
        self._transport = cast("asyncio.Transport", transport)
        self._here.links.add(self)

    def data_received(self, data: bytes) -> None:
        """Give each answer to the call that waits for it; drop it if the caller has left."""
        self._heard_at = monotonic()
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
                self.close()  # this peer is not syncd
                return
            if answer.id is None and answer.error is not None:
                self._refusal = answer
                for future in self._waiting.values():
                    if not future.done():
                        future.set_result(answer)
                self.close()
                return
            if answer.id is None or not 0 < answer.id <= self._last_number:
                self.close()  # the answer to a call that was not sent here
                return
            waiting = self._waiting.get(answer.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(answer)

    def pause_writing(self) -> None:
        """Let calls wait: the service does not read."""
        self._writable = anyio.Event()

    def resume_writing(self) -> None:
        """Let calls go on: the service reads again."""
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        """Fail every call that waits here."""
        self._is_closed = True
        self._here.links.discard(self)
        self._writable.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(unavailable(self.address, error))
        self.closed.set()

    async def ask(self, call: Call[Any]) -> Answer:
        """Send a call and wait for its answer.

        If a caller stops waiting, its answer is dropped and the other calls go on.
        """
        await self._writable.wait()
        if self._refusal is not None:
            return self._refusal
        if self._is_closed or self._transport.is_closing():
            raise unavailable(self.address, None)
        sent = self._send(call)
        try:
            return await sent.future
        finally:
            sent.forget()

    def begin(self, call: Call[Any]) -> Sent | None:
        """Send a call now, without waiting; None if that is not possible now.

        The caller calls ``forget`` when it no longer waits.
        """
        ready = self.is_usable and self._refusal is None and self._writable.is_set()
        return self._send(call) if ready and not self._transport.is_closing() else None

    def _send(self, call: Call[Any]) -> Sent:
        number = self._last_number + 1
        line = request_line(number, call)
        self._last_number = number
        future: asyncio.Future[Answer] = self._loop.create_future()
        self._waiting[number] = future
        sent = Sent(self, number, future)
        try:
            self._transport.write(line)
        except BaseException:
            sent.forget()
            raise
        return sent

    def forget(self, number: int) -> None:
        """Wait no longer for an answer."""
        self._waiting.pop(number, None)
        if self._is_given_up and not self._waiting:
            self.close()

    def give_up(self, began: float) -> None:
        """Take no further call: a call that began at ``began`` has timed out.

        If the service has sent nothing since, no call will get its answer: all fail now, and are
        sent over another connection. If it has, only this call is slow: the others continue to
        wait.
        """
        self._is_given_up = True
        if self._heard_at <= began or not self._waiting:
            self.close()

    def close(self) -> None:
        """Close without waiting for answers."""
        if not self._is_closed:
            self._is_closed = True
            self._transport.abort()

    def leave(self) -> None:
        """Close this process's descriptor and leave the transport as it is.

        The transport's loop is closed, or belongs to another process.
        """
        self._is_closed = True
        descriptor = self._connection.detach()
        if descriptor >= 0:
            os.close(descriptor)
