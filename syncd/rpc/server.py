"""The RPC server: it listens, owns the connections and their requests, and removes all at a stop.

It runs in the caller's task group and does not depend on what its methods do. Invariant: no request
ends the server or disturbs another client's connection.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import structlog
from anyio import TASK_STATUS_IGNORED, CancelScope, Event, create_task_group, move_on_after
from anyio.abc import TaskGroup, TaskStatus
from anyio.to_thread import run_sync

from syncd.errors import SettingsError
from syncd.protocol.messages import AuthenticateParams, NoParams
from syncd.rpc.accepting import Acceptor
from syncd.rpc.connection import AUTHENTICATE, Connection
from syncd.rpc.discovery import openrpc_document
from syncd.rpc.dispatch import Dispatcher, Limits, drop
from syncd.rpc.inputs import Inputs
from syncd.rpc.protocol import Method, Request
from syncd.rpc.sockets import LISTEN_BACKLOG, UnixSocket, bind_tcp, bind_unix, server_tls

CLOSE_SECONDS = 1.0
BoundSocket = socket.socket

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


class Server:
    """Serves ``methods`` on a Unix socket and TCP.

    It adds its own ``ping``, ``authenticate`` and ``rpc.discover``. ``tls`` names the certificate
    chain and the key for TCP; without them TCP is not encrypted. The server keeps ``inputs`` up to
    date with its connections. ``inherited`` are sockets that another process has bound. Without
    ``accepts``, the server listens, and ``accept`` begins to take connections.
    """

    def __init__(
        self,
        methods: Mapping[str, Method[Any, Any]],
        *,
        socket: Path | None,
        listen: str | None = None,
        token: str | None = None,
        tls: tuple[Path, Path] | None = None,
        limits: Limits | None = None,
        inputs: Inputs | None = None,
        version: str = "",
        inherited: Sequence[socket.socket] = (),
        places: Places | None = None,
        accepts: bool = True,
    ) -> None:
        if listen is not None and not token:
            raise SettingsError(
                f"listening on {listen} needs a token", hint="set SYNCD_TOKEN, or SYNCD_LISTEN=off"
            )
        self._socket = socket
        self._listen = listen
        self._token = token.encode() if token else None
        self._tls = tls
        self._tasks: TaskGroup
        self._stop = Event()
        self.stopping = False
        self._quiet = Event()
        self._connections: set[Connection] = set()
        self._spare: dict[Connection, None] = {}
        self._inherited = inherited
        self._places = places or AllPlaces()
        self._accepts = accepts
        self._acceptors: list[Acceptor] = []
        self._arriving = 0
        """Number of accepted connections that are not set up yet."""
        self.bound: list[BoundSocket] = []
        """The sockets that the server listens on, after its start."""
        self.limits = limits or Limits()
        self.inputs = inputs or Inputs()
        self.dispatcher = self.make_dispatcher(_with_own_methods(methods, version))
        self.lingering: set[Connection] = set()
        self.tcp_addresses: list[tuple[str, int]] = []
        """The TCP addresses that the server listens on, after its start."""

    @property
    def connections(self) -> int:
        """Number of connected clients."""
        return len(self._connections)

    async def serve(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Listen until ``stop`` is called, or until the task is cancelled.

        ``stop`` lets requests under way finish; a cancellation does not. Raises ``SettingsError``
        at start if the socket or the address cannot be used.
        """
        async with create_task_group() as self._tasks:
            unix: UnixSocket | None = None
            self.stopping = False
            self.tcp_addresses.clear()
            self.bound[:] = self._inherited
            try:
                if self._socket is not None:
                    unix = await run_sync(bind_unix, self._socket)
                    self.bound.append(unix.socket)
                if self._listen is not None:
                    self.bound += await run_sync(bind_tcp, self._listen)
                tls = None if self._tls is None else await run_sync(server_tls, *self._tls)
                for bound in self.bound:
                    self._listen_on(bound, tls)
                if self._accepts:
                    self.accept()
                task_status.started()
                await self._stop.wait()
                self.stopping = True
                await self._close(unix)
                for connection in self._open():
                    connection.drain()
                with move_on_after(self.limits.stop_seconds):
                    await self._until_quiet()
            finally:
                self.stopping = True
                with CancelScope(shield=True):
                    await self._close(unix)
                    self._tasks.cancel_scope.cancel()
                    for connection in self._open():
                        connection.abort()
                    with move_on_after(CLOSE_SECONDS):
                        await self._until_quiet()

    def make_dispatcher(self, methods: Mapping[str, Method[Any, Any]]) -> Dispatcher:
        """The dispatcher of the server's requests."""
        return Dispatcher(methods, self.limits)

    def accept(self) -> None:
        """Take connections from now on."""
        for each in self._acceptors:
            each.start()

    def pause(self) -> None:
        """Take no more connections, until ``accept``; the present ones are served."""
        for each in self._acceptors:
            each.stop()

    def adopt(self, connected: socket.socket) -> None:
        """Serve a connection that did not come from a listening socket; it needs no token."""
        connected.setblocking(False)
        self._tasks.start_soon(self._connect, connected, None, None)

    def stop(self) -> None:
        """Take no more connections and requests, and end ``serve``.

        Requests under way have ``stop_seconds`` to finish.
        """
        self._stop.set()

    def admit(self, connection: Connection) -> bool:
        """Count a connection if there is room for it; returns whether there is."""
        if len(self._connections) + self._places.elsewhere() >= self.limits.connections:
            return False
        self._spare.pop(connection, None)
        self._connections.add(connection)
        self._note_places()
        self.inputs.add(connection.descriptor, connection)
        return True

    def spare(self, connection: Connection) -> None:
        """Keep a connection beyond the limit; it replaces the oldest if there are too many."""
        self._spare[connection] = None
        if len(self._spare) > self.limits.spare_connections:
            oldest = next(iter(self._spare))
            del self._spare[oldest]
            oldest.abort()

    def refused(self, connection: Connection) -> None:
        """Keep a refused connection until its client has read the reason."""
        self._spare.pop(connection, None)
        self.lingering.add(connection)

    def closed(self, connection: Connection) -> None:
        """Forget a connection that has closed."""
        self._connections.discard(connection)
        self._note_places()
        self._spare.pop(connection, None)
        self.dispatcher.closed(connection)
        self.inputs.remove(connection.descriptor, connection)
        self._look_for_quiet()

    def run(
        self,
        connection: Connection,
        request: Request,
        waited: Awaitable[Any],
        size: int,
        scope: CancelScope,
    ) -> None:
        """Await a request in the task group."""
        self._tasks.start_soon(
            self._finish, connection, request, waited, size, scope, name=f"rpc {request.method}"
        )

    async def _finish(
        self,
        connection: Connection,
        request: Request,
        waited: Awaitable[Any],
        size: int,
        scope: CancelScope,
    ) -> None:
        answer = None
        try:
            with scope:
                answer = await self.dispatcher.finish(request, waited)
        except Exception:
            logger.exception("request_failed", method=request.method)
        finally:
            try:
                drop(waited)
                connection.finished(scope, size, answer)
            except Exception:  # an error ends this connection only
                logger.exception("connection_failed", method=request.method)
                connection.abort()
            self._look_for_quiet()

    def _listen_on(self, bound: socket.socket, tls: ssl.SSLContext | None) -> None:
        bound.setblocking(False)
        bound.listen(LISTEN_BACKLOG)
        token = self._token
        if bound.family == socket.AF_UNIX:
            token, tls = None, None
        else:
            self.tcp_addresses.append(bound.getsockname()[:2])

        def accepted(connected: socket.socket) -> None:
            self._arriving += 1
            self._note_places()
            self._tasks.start_soon(arrive, connected)

        async def arrive(connected: socket.socket) -> None:
            try:
                await self._connect(connected, token, tls)
            finally:
                self._arriving -= 1
                self._note_places()

        self._acceptors.append(Acceptor(bound, accepted, self._places.yields))

    async def _connect(
        self, connected: socket.socket, token: bytes | None, tls: ssl.SSLContext | None
    ) -> None:
        # a client that leaves at once, or does not speak TLS, is not an error of the service
        with suppress(OSError):
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Connection(self, token),
                connected,
                ssl=tls,
                ssl_handshake_timeout=self.limits.authenticate_seconds if tls else None,
                ssl_shutdown_timeout=CLOSE_SECONDS if tls else None,
            )

    async def _close(self, unix: UnixSocket | None) -> None:
        self.pause()
        self._acceptors.clear()
        while self.bound:
            self.bound.pop().close()
        if unix is not None:
            await run_sync(unix.remove)

    def _note_places(self) -> None:
        self._places.note(len(self._connections) + self._arriving)

    def _open(self) -> list[Connection]:
        return [*self._connections | self.lingering, *self._spare]

    async def _until_quiet(self) -> None:
        while not self._is_quiet():
            self._quiet = Event()
            await self._quiet.wait()

    def _look_for_quiet(self) -> None:
        if self._is_quiet():
            self._quiet.set()

    def _is_quiet(self) -> bool:
        return not (self._open() or self.dispatcher.requests)


def _with_own_methods(
    methods: Mapping[str, Method[Any, Any]], version: str
) -> dict[str, Method[Any, Any]]:
    served = dict(methods)
    served["ping"] = Method(NoParams, str, lambda _: "pong", "Answer.", immediate=True)
    served[AUTHENTICATE] = Method(
        AuthenticateParams,
        bool,
        lambda _: True,
        "Send the token of a TCP connection; a Unix socket needs no token.",
        immediate=True,
    )
    served["rpc.discover"] = Method(
        NoParams, dict[str, Any], lambda _: document, "Describe every method.", immediate=True
    )
    listed = {name: method for name, method in served.items() if method.listed}
    document = openrpc_document(listed, version=version)
    return served
