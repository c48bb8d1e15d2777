"""One request to one method, and the counters that bound how much the service takes on at once.

Whatever a method does, its request gets an answer and no other request notices.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from syncd.errors import Overloaded, RequestError
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
    """How much one server takes on. Every queue in it has its bound here."""

    connections: int = 1000
    spare_connections: int = 64
    """Connections over the local socket beyond that number. They are answered ``status`` and ``datasets`` alone, until another closes; the
    oldest gives way to the next. So clients that only hold connections keep no health check out."""
    connection_requests: int = 64
    """Requests in flight on one connection; past it, its further input waits in the client's socket buffer."""
    requests: int = 1024
    """Requests in flight in all; past it the answer is ``overloaded``."""
    line_bytes: int = 16 * MEBIBYTE
    held_bytes: int = 512 * MEBIBYTE
    """Half-received lines and requests in flight, of all connections together; past it the answer is ``overloaded``."""
    unread_bytes: int = MEBIBYTE // 4
    """Answers a client has not read; past it, its input waits."""
    turn_seconds: float = 0.002
    """How long one connection's pipelined requests run before the others get their turn."""
    authenticate_seconds: float = 10.0
    unauthorized_line_bytes: int = 65_536
    unauthorized_requests: int = 10
    linger_seconds: float = 5.0
    linger_bytes: int = 256 * MEBIBYTE
    """How long, and for how much, a refused client's input is read and dropped, so that it comes to read the answer."""
    lingering: int = 100
    stop_seconds: float = 10.0
    """How long a stop waits for requests under way."""


class TooManyConnections(Overloaded):
    """The service has as many connections as it takes."""

    def __init__(self, connections: int) -> None:
        RequestError.__init__(
            self, f"{connections} connections are open already", hint="close some, or raise SYNCD_MAX_CONNECTIONS"
        )


class TooMuchHeld(Overloaded):
    """The requests that are being received and run take as much memory as the service gives them."""

    def __init__(self, held_bytes: int) -> None:
        RequestError.__init__(
            self,
            f"{held_bytes} bytes of requests are held already",
            hint="send smaller requests, or try again in a moment",
        )


class Dispatcher:
    """Calls methods by name; ``requests`` and ``held_bytes`` are what is in flight now."""

    def __init__(self, methods: Mapping[str, Method[Any, Any]], limits: Limits) -> None:
        self.limits = limits
        self.requests = 0
        self.held_bytes = 0
        self._methods = {name: (method, msgspec.json.Decoder(method.params)) for name, method in methods.items()}

    def start(self, request: Request, size: int) -> bytes | Awaitable[Any] | None:
        """Run the request: its answer, or what to pass to ``finish``; None for a notification that is done."""
        try:
            known = self._methods.get(request.method)
            if known is None:
                raise MethodNotFoundError(request.method)  # noqa: TRY301 - the same way out as a failing method
            method, decoder = known
            if not method.immediate:
                self._admit(size)
            result = method.call(decode_params(decoder, request.params))
            if isinstance(result, Awaitable):
                return result
            return None if request.id is None else result_line(request.id, result)
        except Exception as error:  # noqa: BLE001 - the top of a request
            return _failure(request, error)

    async def finish(self, request: Request, waited: Awaitable[Any]) -> bytes | None:
        """The answer of a request that had to wait; None for a notification."""
        try:
            result = await waited
            return None if request.id is None else result_line(request.id, result)
        except Exception as error:  # noqa: BLE001 - the top of a request
            return _failure(request, error)

    def _admit(self, size: int) -> None:
        if self.requests >= self.limits.requests:
            raise Overloaded(self.requests)
        if self.held_bytes + size > self.limits.held_bytes:
            raise TooMuchHeld(self.held_bytes)


def drop(waited: Awaitable[Any]) -> None:
    """Let go of what was never awaited."""
    close = getattr(waited, "close", None)  # a coroutine has it, and whatever holds one
    if close is not None:
        close()


def _failure(request: Request, error: Exception) -> bytes | None:
    answered = as_request_error(error, request.method)
    return None if request.id is None else error_line(request.id, answered)
