"""A reader's requests to the main process: lines of the RPC over a socket pair.

Each client's connection that hands a request over has a link of its own, made at its first such
request. So the main process sees one connection per client: it bounds the requests in flight, reads
no more while the client does not read, and cancels them when the client has left.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import cast

import anyio
import msgspec

from syncd.errors import Overloaded, RequestError
from syncd.rpc.accepting import MORE_FILES

CLIENT, OWN = b"c", b"r"
"""What a link that is sent to the main process carries: a client's requests, or the reader's."""
ANSWER = b'{"jsonrpc":"2.0","id":'
"""First bytes of each answer; the id follows."""


class LinkLost(RequestError):
    """The main process closed the link before it answered."""

    def __init__(self) -> None:
        super().__init__(
            "the service stopped before it answered", hint="try again when the service runs"
        )


class NoMemory(Overloaded):
    """The reader cannot take the main process's answer."""

    def __init__(self) -> None:
        RequestError.__init__(
            self,
            "the reader has too little memory for the answer",
            hint="raise the limit of memory (ulimit -v), or set a lower SYNCD_READERS",
        )


class NoLink(Overloaded):
    """The system refuses another link."""

    def __init__(self, error: OSError) -> None:
        RequestError.__init__(
            self,
            f"the reader cannot reach the main process for another client: {error.strerror}",
            hint=MORE_FILES,
        )


class Link(asyncio.Protocol):
    """One link. It belongs to one event loop."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._number = 0
        self._parts: list[bytes] = []
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Give each answer to its request."""
        first, *more = data.split(b"\n")
        self._parts.append(first)
        for part in more:
            self._answered(b"".join(self._parts))
            self._parts = [part]

    def connection_lost(self, error: Exception | None) -> None:
        """Fail the requests that wait."""
        self.is_lost = True
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(NoMemory() if isinstance(error, MemoryError) else LinkLost())
        self._waiting.clear()

    async def ask(self, method: str, params: bytes) -> bytes:
        """The answer's line after its id. Raises ``LinkLost``."""
        if self.is_lost:
            raise LinkLost
        self._number += 1
        number = self._number
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._transport.write(
            b'{"jsonrpc":"2.0","id":%d,"method":%b,"params":%b}\n'
            % (number, _quoted(method), params or b"{}")
        )
        try:
            return await answer
        finally:
            self._waiting.pop(number, None)

    def notify(self, method: str, params: bytes) -> None:
        """Send a request that is not answered."""
        if not self.is_lost:
            self._transport.write(
                b'{"jsonrpc":"2.0","method":%b,"params":%b}\n' % (_quoted(method), params or b"{}")
            )

    def close(self) -> None:
        """Close the link when all is sent: the main process cancels its requests."""
        if not self.is_lost:
            self._transport.close()

    def _answered(self, line: bytes) -> None:
        number, comma, rest = line.removeprefix(ANSWER).partition(b",")
        waiting = self._waiting.get(int(number)) if number.isdigit() else None
        if waiting is not None and not waiting.done():
            waiting.set_result(comma + rest + b"\n")


async def open_link(control: socket.socket, kind: bytes) -> Link:
    """A new link, whose other end goes to the main process over ``control``.

    It waits while the main process has not taken the last ones. Raises ``LinkLost``, and ``NoLink``
    without a free descriptor or with too many links on their way.
    """
    try:
        mine, other = socket.socketpair()
    except OSError as error:
        raise NoLink(error) from None
    with other:
        try:
            await send_end(control, kind, other)
        except BaseException:
            mine.close()
            raise
    mine.setblocking(False)
    _, link = await asyncio.get_running_loop().connect_accepted_socket(Link, mine)
    return link


async def send_end(control: socket.socket, kind: bytes, end: socket.socket) -> None:
    """Send an end of a link to the main process; raises like ``open_link``."""
    while True:
        try:
            socket.send_fds(control, [kind], [end.fileno()])
        except BlockingIOError:
            await anyio.wait_writable(control)
        except OSError as error:
            if error.errno == errno.ETOOMANYREFS:
                raise NoLink(error) from None
            raise LinkLost from None
        else:
            return


def take_links(control: socket.socket) -> list[tuple[bytes, socket.socket]]:
    """The main process's ends of new links, each with its kind. Raises ``EOFError`` at the end."""
    kind, descriptors, _, _ = socket.recv_fds(control, 1, 4, socket.MSG_CMSG_CLOEXEC)
    links = []
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
        links.append((kind, socket.socket(fileno=descriptor)))
    if not kind:
        raise EOFError
    return links


def _quoted(method: str) -> bytes:
    """A method's name as JSON."""
    return msgspec.json.encode(method)
