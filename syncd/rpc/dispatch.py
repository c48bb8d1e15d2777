"""Calls of methods, and the limits of how much the service takes on at once.

Invariant: an error in a method becomes the answer to its request, and disturbs no other request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from syncd.errors import Overloaded, RequestError
from syncd.protocol.messages import Params
from syncd.rpc.protocol import (
    Method,
    MethodNotFoundError,
    Request,
    as_request_error,
    decode_params,
    error_line,
    result_line,
)

MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """How much one server takes on. Every queue of the server has its bound here."""

    connections: int = 1000
    spare_connections: int = 64
    """Connections of the local socket beyond ``connections``.

    They may only call ``status`` and ``datasets`` until another connection closes. A new one
    replaces the oldest. So clients that hold idle connections cannot keep out a health check.
    """
    connection_requests: int = 64
    """Requests in flight on one connection. Further input waits in the client's socket buffer."""
    requests: int = 1024
    """Requests in flight on all connections. Further ones are answered ``overloaded``."""
    line_bytes: int = 16 * MEBIBYTE
    held_bytes: int = 512 * MEBIBYTE
    """Bytes of incomplete lines and of requests in flight, over all connections.

    Further requests are answered ``overloaded``.
    """
    unread_bytes: int = MEBIBYTE // 4
    """Bytes of answers that a client has not read. Beyond this its input waits."""
    turn_seconds: float = 0.002
    """How long one connection's pipelined requests run before the other connections' requests."""
    authenticate_seconds: float = 10.0
    unauthorized_line_bytes: int = 65_536
    unauthorized_requests: int = 10
    linger_seconds: float = 5.0
    """How long a refused client's input is read and dropped, so that the client gets the answer."""
    linger_bytes: int = 256 * MEBIBYTE
    """How much of a refused client's input is read and dropped."""
    lingering: int = 100
    """Refused connections that are kept at once. Further ones are closed at once."""
    stop_seconds: float = 10.0
    """How long a stop of the service waits for requests under way."""


class TooManyConnections(Overloaded):
    """The service has its maximum number of connections."""

    def __init__(self, connections: int) -> None:
        RequestError.__init__(
            self,
            f"{connections} connections are already open",
            hint="close some, or raise SYNCD_MAX_CONNECTIONS and ulimit -n",
        )


class TooMuchHeld(Overloaded):
    """The requests that are being received and run take all the memory that they may take."""

    def __init__(self, held_bytes: int) -> None:
        RequestError.__init__(
            self,
            f"the requests in flight already take {held_bytes} bytes",
            hint="send smaller requests, or try again in a moment",
        )


class Dispatcher:
    """Calls methods by name; ``requests`` and ``held_bytes`` count what is in flight now."""

    def __init__(self, methods: Mapping[str, Method[Any, Any]], limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self.held_bytes = 0
        self._methods = {
            name: (method, msgspec.json.Decoder(method.params)) for name, method in methods.items()
        }

    def start(
        self, request: Request, size: int, owner: object = None
    ) -> bytes | Awaitable[Any] | None:
        """Run a request of ``owner``, a connection; returns its answer, or an awaitable for
        ``finish``.

        Returns None for a notification that is done.
        """
        del owner
        try:
            result = self.outcome(request, size)
            return result if isinstance(result, Awaitable) else self.answer(request, result)
        except Exception as error:  # noqa: BLE001 - the top of a request
            return failure_line(request, error)

    def call(self, name: str, params: Params, size: int, owner: object = None) -> Any:
        """A method's result, or an awaitable of it, for a caller that has its own encoding.

        ``name`` must be known, and ``owner`` is a connection. Raises what the method raises, or
        ``Overloaded``.
        """
        del owner
        method, _ = self._methods[name]
        if not method.immediate:
            self.admit(size)
        return method.call(params)

    def outcome(self, request: Request, size: int) -> Any:
        """Call a request's method; returns its result, or an awaitable of it. Raises its errors."""
        known = self._methods.get(request.method)
        if known is None:
            raise MethodNotFoundError(request.method)
        method, decoder = known
        if not method.immediate:
            self.admit(size)
        return method.call(decode_params(decoder, request.params))

    def answer(self, request: Request, result: object) -> bytes | None:
        """The line of an answer; None for a notification."""
        return None if request.id is None else result_line(request.id, result)

    async def finish(self, request: Request, waited: Awaitable[Any]) -> bytes | None:
        """The answer of a request that had to wait; None for a notification."""
        try:
            result = await waited
            return None if request.id is None else result_line(request.id, result)
        except Exception as error:  # noqa: BLE001 - the top of a request
            return failure_line(request, error)

    def forget(self, owner: object) -> None:
        """Forget what runs for a connection, which has closed or wants it no more."""

    def admit(self, size: int) -> None:
        """Raise ``Overloaded`` if there is no room for a request of this size."""
        if self.requests >= self.limits.requests:
            raise Overloaded(self.requests)
        if self.held_bytes + size > self.limits.held_bytes:
            raise TooMuchHeld(self.held_bytes)


def drop(waited: Awaitable[Any]) -> None:
    """Close an awaitable that was never awaited."""
    close = getattr(waited, "close", None)  # of a coroutine, or of an object that holds one
    if close is not None:
        close()


def failure_line(request: Request, error: Exception) -> bytes | None:
    """The answer to a request that failed; None for a notification."""
    answered = as_request_error(error, request.method)
    return None if request.id is None else error_line(request.id, answered)
