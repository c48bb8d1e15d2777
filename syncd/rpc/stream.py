"""One client's connection without its protocol: input, limits, back-pressure and its end.

The RPC's connections and those of PostgreSQL clients derive from ``Stream``. Invariants: the memory
that one client can take is bounded, and no other client waits for it. Nothing is kept for a client
that left.
"""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol, cast

from syncd.protocol.keepalive import keep_alive
from syncd.rpc.dispatch import Dispatcher


class StreamHost(Protocol):
    """The part of a server that every connection uses."""

    dispatcher: Dispatcher
    stopping: bool
    lingering: set[Any]
    """Connections that have ended and whose clients still have to read the reason."""

    def closed(self, connection: Any) -> None:
        """Forget a connection that has closed."""


class Stream(asyncio.Protocol, ABC):
    """The server's end of one connection; a subclass has the protocol."""

    def __init__(self, host: StreamHost) -> None:
        self._dispatcher = host.dispatcher
        self._limits = host.dispatcher.limits
        self._stream_host = host
        self.transport: asyncio.Transport
        self.descriptor = -1
        """File descriptor of the socket, kept because a closed transport no longer has it."""
        self._timer: asyncio.TimerHandle | None = None
        self._reading = True
        self._write_paused = self._turn_pending = self._draining = self._lost = False
        self._discard_left: int | None = None
        """Bytes of input that are still read and dropped; None: the connection goes on."""

    # What a subclass has

    @abstractmethod
    def _opened(self) -> None:
        """Register the connection. The client sends first."""

    @abstractmethod
    def _received(self, data: bytes) -> None:
        """Take input of any size."""

    @abstractmethod
    def _take_turn(self) -> None:
        """Run what waits for ``turn_seconds``, then write, then decide whether to read on."""

    @abstractmethod
    def _forget(self) -> None:
        """Drop everything that is kept, and cancel what only this client waits for."""

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Set the socket up, unless the server stops."""
        connection = transport.get_extra_info("socket")
        self.descriptor = connection.fileno()
        if connection.family != socket.AF_UNIX:
            keep_alive(connection)
        self._use(transport)
        if self._stream_host.stopping:
            self.transport.abort()  # it was accepted just before the listener closed
        else:
            self._opened()

    def data_received(self, data: bytes) -> None:
        """Take input, or drop it after the end."""
        if self._discard_left is None:
            self._received(data)
            return
        self._discard_left -= len(data)
        if self._discard_left < 0:
            self.transport.abort()

    def pause_writing(self) -> None:
        """Start nothing: the client does not read its answers."""
        self._write_paused = True

    def resume_writing(self) -> None:
        """Go on: the client reads again."""
        self._write_paused = False
        self._take_turn()

    def connection_lost(self, error: Exception | None) -> None:
        """Forget everything."""
        del error
        if self._lost:
            return
        self._lost = True
        self._stop_timer()
        self._forget()
        self._stream_host.lingering.discard(self)
        self._stream_host.closed(self)

    # What a server calls

    @property
    def is_lost(self) -> bool:
        """Whether the client has left."""
        return self._lost

    def drain(self) -> None:
        """Take no further request, and close when those under way are answered."""
        self._draining = True
        self._take_turn()

    def abort(self) -> None:
        """Close now, without waiting for requests under way."""
        if not self._lost:
            self.transport.abort()

    # What a subclass calls

    def _use(self, transport: asyncio.BaseTransport) -> None:
        # cast: uvloop's transport has these methods, but does not derive from asyncio.Transport
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=self._limits.unread_bytes)

    def _start_timer(self, seconds: float, then: Callable[[], object]) -> None:
        self._stop_timer()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _turn_later(self) -> None:
        """Take another turn after the other connections' turns."""
        if not self._turn_pending:
            self._turn_pending = True
            asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._turn_pending = False
        self._take_turn()

    def _read_if(self, read: bool) -> None:
        """Read on, or leave further input in the client's socket."""
        if read == self._reading:
            return
        self._reading = read
        if read:
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def _linger(self) -> bool:
        """Read and drop further input, so that the client gets the last answer.

        TCP sends a reset if a socket is closed with unread input, and the client loses that answer.
        Returns False if too many connections linger already: this one is closed at once.
        """
        host = self._stream_host
        self._discard_left = self._limits.linger_bytes
        host.lingering.add(self)
        has_room = len(host.lingering) <= self._limits.lingering
        self._start_timer(self._limits.linger_seconds if has_room else 0, self.transport.abort)
        return has_room
