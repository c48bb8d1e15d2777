"""A server of stream connections without their protocol: it accepts them, and ends them at a stop.

It runs in the caller's task group. The RPC's server and the one for PostgreSQL clients derive from
``StreamServer``. Invariant: no connection ends the server or disturbs another connection.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import structlog
from anyio import TASK_STATUS_IGNORED, CancelScope, Event, create_task_group, move_on_after
from anyio.abc import TaskGroup, TaskStatus
from anyio.to_thread import run_sync

from syncd.host_port import join_host_port
from syncd.rpc.accepting import Acceptor
from syncd.rpc.dispatch import Dispatcher, drop
from syncd.rpc.inputs import Inputs
from syncd.rpc.sockets import LISTEN_BACKLOG, server_tls
from syncd.rpc.stream import Stream

CLOSE_SECONDS = 1.0
"""How long connections may take to close at the end, and a TLS connection to shut down."""

logger = structlog.get_logger()


class Places(Protocol):
    """The connections of the processes that accept on the same sockets."""

    def elsewhere(self) -> int:
        """Number of connections that the other processes have."""

    def note(self, connections: int) -> None:
        """Note the number of connections that this process has."""

    def yields(self) -> bool:
        """Whether another process should have the next connection."""


class AllPlaces:
    """The places of a server that no other process shares."""

    def elsewhere(self) -> int:
        """See ``Places``."""
        return 0

    def note(self, connections: int) -> None:
        """See ``Places``."""

    def yields(self) -> bool:
        """See ``Places``."""
        return False


Client = TypeVar("Client", bound=Stream)


class StreamServer(ABC, Generic[Client]):
    """Serves connections of one class.

    The server keeps ``inputs`` up to date with its connections. ``inherited`` are sockets that
    another process has bound. ``tls`` names the certificate chain and the key. Without ``accepts``,
    the server listens, and ``accept`` begins to take connections.
    """

    listening_event: ClassVar[str]
    """Event that is logged for each TCP address."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        tls: tuple[Path, Path] | None = None,
        inputs: Inputs | None = None,
        inherited: Sequence[socket.socket] = (),
        places: Places | None = None,
        accepts: bool = True,
    ) -> None:
        self.dispatcher = dispatcher
        self.limits = dispatcher.limits
        self.inputs = inputs or Inputs()
        self.tls: ssl.SSLContext | None = None
        self.stopping = False
        self.bound: list[socket.socket] = []
        """The sockets that the server listens on, after its start."""
        self.tcp_addresses: list[tuple[str, int]] = []
        """The TCP addresses that the server listens on, after its start."""
        self.lingering: set[Client] = set()
        self._certificate = tls
        self._inherited = inherited
        self._places = places or AllPlaces()
        self._accepts = accepts
        self._tasks: TaskGroup
        self._stop = Event()
        self._quiet = Event()
        self._connections: set[Client] = set()
        self._acceptors: list[Acceptor] = []
        self._arriving = 0
        """Number of accepted connections that are not set up yet."""

    # What a subclass has

    async def _bind(self) -> None:
        """Add further sockets to ``bound``."""

    async def _unbind(self) -> None:
        """Remove what ``_bind`` made besides open sockets."""

    @abstractmethod
    def _serving(self, bound: socket.socket) -> tuple[Callable[[], Client], ssl.SSLContext | None]:
        """What makes a socket's connections, and the TLS that they begin with."""

    def _open(self) -> list[Client]:
        """All connections that have not closed."""
        return list(self._connections)

    def _is_quiet(self) -> bool:
        return not self._open()

    # What the service calls

    @property
    def connections(self) -> int:
        """Number of connected clients."""
        return len(self._connections)

    async def serve(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Listen until ``stop`` is called, or until the task is cancelled.

        ``stop`` lets requests under way finish; a cancellation does not. Raises ``SettingsError``
        at start if a socket, the address or the certificate cannot be used.
        """
        async with create_task_group() as self._tasks:
            self.stopping = False
            self.tcp_addresses.clear()
            self.bound[:] = self._inherited
            try:
                await self._bind()
                if self._certificate is not None:
                    self.tls = await run_sync(server_tls, *self._certificate)
                for bound in self.bound:
                    self._listen_on(bound)
                for host, port in () if self._inherited else self.tcp_addresses:
                    address = join_host_port(host, port)
                    logger.info(self.listening_event, address=address, tls=self.tls is not None)
                if self._accepts:
                    self.accept()
                task_status.started()
                await self._stop.wait()
                self.stopping = True
                await self._close()
                for connection in self._open():
                    connection.drain()
                with move_on_after(self.limits.stop_seconds):
                    await self._until_quiet()
            finally:
                self.stopping = True
                with CancelScope(shield=True):
                    await self._close()
                    self._tasks.cancel_scope.cancel()
                    for connection in self._open():
                        connection.abort()
                    with move_on_after(CLOSE_SECONDS):
                        await self._until_quiet()

    def accept(self) -> None:
        """Take connections from now on."""
        for each in self._acceptors:
            each.start()

    def pause(self) -> None:
        """Take no more connections, until ``accept``; the present ones are served."""
        for each in self._acceptors:
            each.stop()

    def stop(self) -> None:
        """Take no more connections and requests, and end ``serve``.

        Requests under way have ``stop_seconds`` to finish.
        """
        self._stop.set()

    # What connections call

    def closed(self, connection: Client) -> None:
        """Forget a connection that has closed."""
        self._connections.discard(connection)
        self._note_places()
        self.dispatcher.forget(connection)
        self.inputs.remove(connection.descriptor, connection)
        self._look_for_quiet()

    # What a subclass calls

    def _has_place(self) -> bool:
        """Whether there is room for another connection."""
        return len(self._connections) + self._places.elsewhere() < self.limits.connections

    def _admit(self, connection: Client) -> None:
        """Count a connection."""
        self._connections.add(connection)
        self._note_places()
        self.inputs.add(connection.descriptor, connection)

    def _conclude(
        self,
        connection: Client,
        waited: Awaitable[Any],
        finished: Callable[[], None],
        method: str,
    ) -> None:
        """Let a connection go on after a call that had to wait, awaited or not."""
        try:
            drop(waited)
            finished()
        except Exception:  # an error ends this connection only
            logger.exception("connection_failed", method=method)
            connection.abort()
        self._look_for_quiet()

    async def _connect(
        self,
        connected: socket.socket,
        make: Callable[[], Client],
        tls: ssl.SSLContext | None,
    ) -> None:
        # a client that leaves at once, or does not speak TLS, is not an error of the service
        with suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(
                make,
                connected,
                ssl=tls,
                ssl_handshake_timeout=self.limits.authenticate_seconds if tls else None,
                ssl_shutdown_timeout=CLOSE_SECONDS if tls else None,
            )

    def _listen_on(self, bound: socket.socket) -> None:
        bound.setblocking(False)
        bound.listen(LISTEN_BACKLOG)
        if bound.family != socket.AF_UNIX:
            self.tcp_addresses.append(bound.getsockname()[:2])
        make, tls = self._serving(bound)

        def accepted(connected: socket.socket) -> None:
            self._arriving += 1
            self._note_places()
            self._tasks.start_soon(arrive, connected)

        async def arrive(connected: socket.socket) -> None:
            try:
                await self._connect(connected, make, tls)
            finally:
                self._arriving -= 1
                self._note_places()

        self._acceptors.append(Acceptor(bound, accepted, self._places.yields))

    async def _close(self) -> None:
        self.pause()
        self._acceptors.clear()
        while self.bound:
            self.bound.pop().close()
        await self._unbind()

    def _note_places(self) -> None:
        self._places.note(len(self._connections) + self._arriving)

    async def _until_quiet(self) -> None:
        while not self._is_quiet():
            self._quiet = Event()
            await self._quiet.wait()

    def _look_for_quiet(self) -> None:
        if self._is_quiet():
            self._quiet.set()
