"""The listener for PostgreSQL clients: it owns the connections and what they wait for.

It runs in the caller's task group and calls the RPC's methods, under the RPC's limits. Invariant:
no client ends the server or disturbs another client.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import structlog
from anyio import TASK_STATUS_IGNORED, CancelScope, Event, create_task_group, move_on_after
from anyio.abc import TaskGroup, TaskStatus
from anyio.to_thread import run_sync

from syncd.pgwire.connection import Connection
from syncd.pgwire.scram import Verifier
from syncd.rpc.dispatch import Dispatcher, drop
from syncd.rpc.inputs import Inputs
from syncd.rpc.sockets import LISTEN_BACKLOG, bind_tcp, server_tls

CLOSE_SECONDS = 1.0
SETTING = "SYNCD_SQL_LISTEN"

logger = structlog.get_logger()


class SqlServer:
    """Serves PostgreSQL's protocol on ``listen`` with the methods of an RPC server.

    ``dispatcher`` is that server's: both share the limits of requests and of held bytes. The
    number of connections is counted apart. ``tls`` names the certificate chain and the key;
    without them TLS is not offered, with them it is required.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        listen: str,
        token: str,
        tls: tuple[Path, Path] | None = None,
        inputs: Inputs | None = None,
    ) -> None:
        self.dispatcher = dispatcher
        self.limits = dispatcher.limits
        self.verifier = Verifier.of(token)
        self.tls: ssl.SSLContext | None = None
        self.inputs = inputs or Inputs()
        self.stopping = False
        self.addresses: list[tuple[str, int]] = []
        """The addresses that the server listens on, after its start."""
        self._listen = listen
        self._certificate = tls
        self._tasks: TaskGroup
        self._stop = Event()
        self._quiet = Event()
        self._connections: dict[int, Connection] = {}
        self._admitted: set[Connection] = set()
        self.lingering: set[Connection] = set()

    @property
    def connections(self) -> int:
        """Number of connected clients."""
        return len(self._connections)

    async def serve(self, *, task_status: TaskStatus[None] = TASK_STATUS_IGNORED) -> None:
        """Listen until ``stop`` is called, or until the task is cancelled.

        ``stop`` lets statements under way finish; a cancellation does not. Raises ``SettingsError``
        at start if the address or the certificate cannot be used.
        """
        async with create_task_group() as self._tasks:
            listeners: list[asyncio.AbstractServer] = []
            self.stopping = False
            self.addresses.clear()
            try:
                if self._certificate is not None:
                    self.tls = await run_sync(server_tls, *self._certificate)
                for bound in await run_sync(bind_tcp, self._listen, SETTING):
                    listeners.append(await self._listen_on(bound))
                    self.addresses.append(bound.getsockname()[:2])
                task_status.started()
                await self._stop.wait()
                self.stopping = True
                _close(listeners)
                for connection in self._open():
                    connection.drain()
                with move_on_after(self.limits.stop_seconds):
                    await self._until_quiet()
            finally:
                self.stopping = True
                with CancelScope(shield=True):
                    _close(listeners)
                    self._tasks.cancel_scope.cancel()
                    for connection in self._open():
                        connection.abort()
                    with move_on_after(CLOSE_SECONDS):
                        await self._until_quiet()

    def stop(self) -> None:
        """Take no more connections and statements, and end ``serve``."""
        self._stop.set()

    def admit(self, connection: Connection) -> bool:
        """Register a connection; returns False if it is so far beyond the limit that it must go.

        Those just beyond the limit are told so when they have sent their startup packet.
        """
        if len(self._connections) >= self.limits.connections + self.limits.lingering:
            return False
        while not connection.process or connection.process in self._connections:
            connection.process = secrets.randbelow(2**31 - 1) + 1
        self._connections[connection.process] = connection
        if len(self._admitted) < self.limits.connections:
            self._admitted.add(connection)
            self.inputs.add(connection.descriptor, connection)
        return True

    def has_room(self, connection: Connection) -> bool:
        """Whether the connection is within the limit."""
        return connection in self._admitted

    def closed(self, connection: Connection) -> None:
        """Forget a connection that has closed."""
        if self._connections.get(connection.process) is connection:
            del self._connections[connection.process]
        self.lingering.discard(connection)
        if connection in self._admitted:
            self._admitted.discard(connection)
            self.inputs.remove(connection.descriptor, connection)
        if not self._connections:
            self._quiet.set()

    def cancel(self, process: int, key: bytes) -> None:
        """Cancel what a connection runs, if the key is its own."""
        connection = self._connections.get(process)
        if connection is not None and connection.is_known_by(key):
            connection.cancel()

    def upgrade(self, connection: Connection) -> None:
        """Start TLS on a connection."""
        self._tasks.start_soon(self._upgrade, connection, name="sql tls")

    def run(self, connection: Connection, waited: Awaitable[Any], scope: CancelScope) -> None:
        """Await a call for a connection."""
        self._tasks.start_soon(self._finish, connection, waited, scope, name="sql")

    async def _finish(
        self, connection: Connection, waited: Awaitable[Any], scope: CancelScope
    ) -> None:
        result, failure = None, None
        try:
            with scope:
                try:
                    result = await waited
                except Exception as error:  # noqa: BLE001 - the connection answers with it
                    failure = error
        finally:
            try:
                drop(waited)
                connection.finished(result, failure, scope.cancelled_caught)
            except Exception:  # an error ends this connection only
                logger.exception("connection_failed", method="sql")
                connection.abort()

    async def _upgrade(self, connection: Connection) -> None:
        assert self.tls is not None
        transport = None
        try:
            transport = await asyncio.get_running_loop().start_tls(
                connection.transport,
                connection,
                self.tls,
                server_side=True,
                ssl_handshake_timeout=self.limits.authenticate_seconds,
                ssl_shutdown_timeout=CLOSE_SECONDS,
            )
        except (OSError, EOFError) as error:  # ssl.SSLError and TimeoutError are OSErrors
            logger.info("tls_failed", error=repr(error))
        connection.upgraded(transport)

    async def _listen_on(self, bound: socket.socket) -> asyncio.AbstractServer:
        return await asyncio.get_running_loop().create_server(
            lambda: Connection(self), sock=bound, backlog=LISTEN_BACKLOG
        )

    def _open(self) -> list[Connection]:
        return list(self._connections.values())

    async def _until_quiet(self) -> None:
        while self._connections:
            self._quiet = Event()
            await self._quiet.wait()


def _close(listeners: list[asyncio.AbstractServer]) -> None:
    while listeners:
        listeners.pop().close()
