"""The listener for PostgreSQL clients: it owns the connections and what they wait for.

It runs in the caller's task group and calls the RPC's methods, under the RPC's limits. Invariant:
no client ends the server or disturbs another client.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import structlog
from anyio import CancelScope
from anyio.to_thread import run_sync

from syncd.pgwire.connection import Connection
from syncd.pgwire.scram import Verifier
from syncd.rpc.dispatch import Dispatcher
from syncd.rpc.sockets import bind_tcp
from syncd.rpc.stream_server import CLOSE_SECONDS, StreamServer

SEATS = 128
"""Most processes that accept on the same sockets. A connection's number is its process's seat and a
multiple of this, so every process knows which one a cancel request is for.
"""
MOST_NUMBERS = 2**31 // SEATS
SETTING = "SYNCD_SQL_LISTEN"

logger = structlog.get_logger()


class SqlServer(StreamServer[Connection]):
    """Serves PostgreSQL's protocol on ``listen`` with the methods of an RPC server.

    ``dispatcher`` is that server's: both share the limits of requests and of held bytes. The
    number of connections is counted apart. ``tls`` names the certificate chain and the key;
    without them TLS is not offered, with them it is required.
    """

    listening_event = "listening_sql"

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        listen: str | None,
        token: str,
        seat: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(dispatcher, **options)
        self.seat = seat
        self.cancel_elsewhere: Callable[[int, bytes], Awaitable[object]] | None = None
        """Has the process of another seat cancel what a connection runs."""
        self.verifier = Verifier.of(token)
        self._listen = listen
        self._by_process: dict[int, Connection] = {}
        """All connections, those beyond the limit as well."""

    def admit(self, connection: Connection) -> bool:
        """Register a connection; returns False if it is so far beyond the limit that it must go.

        Those just beyond the limit are told so when they have sent their startup packet.
        """
        if len(self._by_process) >= self.limits.connections + self.limits.lingering:
            return False
        while not connection.process or connection.process in self._by_process:
            connection.process = secrets.randbelow(MOST_NUMBERS) * SEATS + self.seat
        self._by_process[connection.process] = connection
        if self._has_place():
            self._admit(connection)
        return True

    def has_room(self, connection: Connection) -> bool:
        """Whether the connection is within the limit."""
        return connection in self._connections

    def closed(self, connection: Connection) -> None:
        """Forget a connection that has closed."""
        if self._by_process.get(connection.process) is connection:
            del self._by_process[connection.process]
        super().closed(connection)

    def cancel(self, process: int, key: bytes) -> Awaitable[object] | None:
        """Cancel what a connection runs, if the key is its own.

        If it is another process's connection, it is cancelled when the result has been awaited.
        """
        if process % SEATS != self.seat:
            return self.cancel_elsewhere and self.cancel_elsewhere(process, key)
        connection = self._by_process.get(process)
        if connection is not None and connection.is_known_by(key):
            connection.cancel()
            self.dispatcher.forget(connection)
        return None

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
            finished = partial(connection.finished, result, failure, scope.cancelled_caught)
            self._conclude(connection, waited, finished, "sql")

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

    async def _bind(self) -> None:
        if self._listen is not None:
            self.bound += await run_sync(bind_tcp, self._listen, SETTING)

    def _serving(
        self, bound: socket.socket
    ) -> tuple[Callable[[], Connection], ssl.SSLContext | None]:
        del bound
        return partial(Connection, self), None  # TLS begins when the client asks for it

    def _open(self) -> list[Connection]:
        return list(self._by_process.values())
