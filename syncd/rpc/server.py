"""The RPC server: it listens, owns the connections and their requests, and removes all at a stop.

It runs in the caller's task group and does not depend on what its methods do. Invariant: no request
ends the server or disturbs another client's connection.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from anyio import CancelScope
from anyio.to_thread import run_sync

from syncd.errors import SettingsError
from syncd.protocol.messages import AuthenticateParams, NoParams
from syncd.rpc.connection import AUTHENTICATE, Connection
from syncd.rpc.discovery import openrpc_document
from syncd.rpc.dispatch import Dispatcher, Limits
from syncd.rpc.inputs import Inputs
from syncd.rpc.protocol import Method, Request
from syncd.rpc.sockets import UnixSocket, bind_tcp, bind_unix
from syncd.rpc.stream_server import Places, StreamServer

logger = structlog.get_logger()


class Server(StreamServer[Connection]):
    """Serves ``methods`` on a Unix socket and TCP.

    It adds its own ``ping``, ``authenticate`` and ``rpc.discover``. ``tls`` names the certificate
    chain and the key for TCP; without them TCP is not encrypted. See ``StreamServer`` for the other
    parameters.
    """

    listening_event = "listening"

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
        super().__init__(
            self.make_dispatcher(_with_own_methods(methods, version), limits or Limits()),
            tls=tls,
            inputs=inputs,
            inherited=inherited,
            places=places,
            accepts=accepts,
        )
        self._socket = socket
        self._listen = listen
        self._token = token.encode() if token else None
        self._unix: UnixSocket | None = None
        self._spare: dict[Connection, None] = {}

    def make_dispatcher(
        self, methods: Mapping[str, Method[Any, Any]], limits: Limits
    ) -> Dispatcher:
        """The dispatcher of the server's requests."""
        return Dispatcher(methods, limits)

    def adopt(self, connected: socket.socket) -> None:
        """Serve a connection that did not come from a listening socket; it needs no token."""
        connected.setblocking(False)
        self._tasks.start_soon(self._connect, connected, partial(Connection, self, None), None)

    def admit(self, connection: Connection) -> bool:
        """Count a connection if there is room for it; returns whether there is."""
        if not self._has_place():
            return False
        self._spare.pop(connection, None)
        self._admit(connection)
        return True

    def spare(self, connection: Connection) -> None:
        """Keep a connection beyond the limit; it replaces the oldest if there are too many."""
        self._spare[connection] = None
        if len(self._spare) > self.limits.spare_connections:
            oldest = next(iter(self._spare))
            del self._spare[oldest]
            oldest.abort()

    def refused(self, connection: Connection) -> None:
        """Forget that a connection was kept beyond the limit: it ends."""
        self._spare.pop(connection, None)

    def closed(self, connection: Connection) -> None:
        """Forget a connection that has closed."""
        self._spare.pop(connection, None)
        super().closed(connection)

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
            finished = partial(connection.finished, scope, size, answer)
            self._conclude(connection, waited, finished, request.method)

    async def _bind(self) -> None:
        if self._socket is not None:
            self._unix = await run_sync(bind_unix, self._socket)
            self.bound.append(self._unix.socket)
        if self._listen is not None:
            self.bound += await run_sync(bind_tcp, self._listen)

    async def _unbind(self) -> None:
        if self._unix is not None:
            await run_sync(self._unix.remove)

    def _serving(
        self, bound: socket.socket
    ) -> tuple[Callable[[], Connection], ssl.SSLContext | None]:
        if bound.family == socket.AF_UNIX:
            return partial(Connection, self, None), None
        return partial(Connection, self, self._token), self.tls

    def _open(self) -> list[Connection]:
        return [*self._connections | self.lingering, *self._spare]

    def _is_quiet(self) -> bool:
        return super()._is_quiet() and not self.dispatcher.requests


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
