"""One client's connection: it reads lines and writes answers.

Reading stops in three cases: whole lines wait, the client has the permitted number of requests in
flight, or it does not read its answers. Further input then waits in the client's socket buffer.
Invariants: the memory that one client can take is bounded, and no other client waits for it.
Nothing is kept for a client that left.
"""

from __future__ import annotations

import hmac
import select
from collections import deque
from collections.abc import Awaitable
from time import monotonic
from typing import Any, Protocol

import msgspec
from anyio import CancelScope

from syncd.errors import RequestError, TooLarge, Unauthorized
from syncd.protocol.messages import AuthenticateParams
from syncd.rpc.dispatch import TooManyConnections, TooMuchHeld
from syncd.rpc.protocol import (
    BadRequest,
    Request,
    as_request_error,
    decode_params,
    decode_request,
    error_line,
    result_line,
)
from syncd.rpc.stream import Stream, StreamHost

AUTHENTICATE = "authenticate"
SPARE_METHODS = frozenset({"status", "datasets"})
"""The methods that a connection beyond the limit may call. They never wait.

``syncd status``, ``syncd datasets`` and ``syncd healthcheck`` call these methods.
"""
NO_ID = b"null"
WRITE_TOGETHER_BYTES = 65_536

_tokens = msgspec.json.Decoder(AuthenticateParams)


class Host(StreamHost, Protocol):
    """The part of the server that its connections use."""

    def admit(self, connection: Connection) -> bool:
        """Count a connection if there is room for it; returns whether there is."""

    def spare(self, connection: Connection) -> None:
        """Keep a connection of the local socket that is beyond the limit."""

    def refused(self, connection: Connection) -> None:
        """Forget that a connection was kept beyond the limit: it ends."""

    def run(
        self,
        connection: Connection,
        request: Request,
        waited: Awaitable[Any],
        size: int,
        scope: CancelScope,
    ) -> None:
        """Await a request in the server's task group, then call the connection's ``finished``."""


class Connection(Stream):
    """The server's end of one connection.

    With a ``token``, only ``authenticate`` is answered until the client has sent that token.
    """

    def __init__(self, host: Host, token: bytes | None) -> None:
        super().__init__(host)
        self._host = host
        self._token = token
        self._authorized = token is None
        self._unauthorized_left = self._limits.unauthorized_requests
        self._partial = bytearray()
        self._lines: deque[bytes] = deque()
        self._answers: list[bytes] = []
        self._answers_bytes = 0
        self._in_flight: dict[CancelScope, bool] = {}
        self._is_spare = False
        self._ended = False

    def _opened(self) -> None:
        if self._host.admit(self):
            if not self._authorized:
                self._start_timer(self._limits.authenticate_seconds, self._authenticate_now)
        elif self._token is None:
            self._is_spare = True
            self._host.spare(self)
        else:
            self._refuse(TooManyConnections(self._limits.connections))

    def _received(self, data: bytes) -> None:
        """Split input of any size into lines and run them."""
        first, *more = data.split(b"\n")
        if self._hold_partial(first) and more:
            self._lines.append(self._take_partial())
            rest = more.pop()
            self._lines.extend(more)
            self._hold_partial(rest)
        self._take_turn()

    def eof_received(self) -> bool:
        """Answer the requests under way, then close: the client sends no more, but may read."""
        self._ended = True
        is_tls = self.transport.get_extra_info("sslcontext") is not None
        if self._discard_left is not None or is_tls:
            # TLS has no half-closed connection: no answer can reach this client any more
            return False
        self._lines.append(self._take_partial())
        if self._peer_is_gone():
            self._lines.clear()
            self.transport.abort()
        self._take_turn()
        return True

    def _forget(self) -> None:
        self._lines.clear()
        self._answers.clear()
        self._take_partial()
        for scope, answered in self._in_flight.items():
            if answered:
                scope.cancel()

    def finished(self, scope: CancelScope, size: int, answer: bytes | None) -> None:
        """Send the answer of a request that had to wait."""
        del self._in_flight[scope]
        self._dispatcher.requests -= 1
        self._dispatcher.held_bytes -= size
        if answer is not None:
            self._answer(answer)
        self._take_turn()

    def drain(self) -> None:
        """Take no further request, and close when those under way are answered."""
        self._lines.clear()
        super().drain()

    def _take_turn(self) -> None:
        """Run waiting lines for ``turn_seconds``, then write, then decide whether to read on."""
        if self._lost:
            return
        until = monotonic() + self._limits.turn_seconds
        while self._lines and self._may_start():
            line = self._lines.popleft()
            if line and not line.isspace():
                self._run(line)
                if self._lines and monotonic() > until:
                    self._turn_later()
                    break
        self._write()
        if self._lost or self.transport.is_closing():
            return
        self._read_on_or_close()

    def _may_start(self) -> bool:
        return (
            not self._write_paused
            and not self._lost
            and self._discard_left is None
            and len(self._in_flight) < self._limits.connection_requests
        )

    def _read_on_or_close(self) -> None:
        if not self._lines and not self._in_flight:
            refused = self._discard_left is not None
            closes = self._ended or self._draining
            if refused and not closes and self.transport.can_write_eof():
                self.transport.write_eof()
            elif refused or closes:
                self.transport.close()
                return
        read = self._discard_left is not None or (
            not self._lines and not self._draining and self._may_start()
        )
        if not self._ended:
            self._read_if(read)

    def _run(self, line: bytes) -> None:
        request = decode_request(line)
        if not self._authorized and not (
            isinstance(request, Request) and request.method == AUTHENTICATE
        ):
            self._unauthorized(request.id, "the connection has not authenticated")
        elif isinstance(request, BadRequest):
            self._answer(error_line(request.id, request.error))
        elif request.method == AUTHENTICATE and self._token is not None:
            self._authenticate(request, self._token)
        elif self._is_spare and not self._may_ask(request.method):
            self._refuse(TooManyConnections(self._limits.connections))
        else:
            outcome = self._dispatcher.start(request, len(line), self)
            if isinstance(outcome, Awaitable):
                self._await(request, outcome, len(line))
            elif outcome is not None:
                self._answer(outcome)

    def _may_ask(self, method: str) -> bool:
        """Whether a spare connection gets its answer: another may have closed since."""
        if method in SPARE_METHODS:
            return True
        self._is_spare = not self._host.admit(self)
        return not self._is_spare

    def _await(self, request: Request, waited: Awaitable[Any], size: int) -> None:
        scope = CancelScope()
        self._in_flight[scope] = request.id is not None
        self._dispatcher.requests += 1
        self._dispatcher.held_bytes += size
        self._host.run(self, request, waited, size, scope)

    def _authenticate(self, request: Request, token: bytes) -> None:
        try:
            given = decode_params(_tokens, request.params).token
        except RequestError as error:
            self._answer(error_line(request.id or NO_ID, as_request_error(error, AUTHENTICATE)))
            return
        if not hmac.compare_digest(given.encode(), token):
            self._unauthorized(request.id, "the token is wrong")
            return
        self._authorized = True
        self._stop_timer()
        if request.id is not None:
            self._answer(result_line(request.id, True))

    def _unauthorized(self, request_id: bytes | None, message: str) -> None:
        self._unauthorized_left -= 1
        error = Unauthorized(
            message, hint="send authenticate with the token that the service has as SYNCD_TOKEN"
        )
        if self._unauthorized_left <= 0:
            self._refuse(error)
        elif request_id is not None:
            self._answer(error_line(request_id, error))

    def _authenticate_now(self) -> None:
        if not self._authorized and self._discard_left is None:
            self._unauthorized_left = 0
            self._unauthorized(None, "the connection has not authenticated in time")

    def _refuse(self, error: RequestError) -> None:
        """Send the error with id null, and close after the answers under way."""
        self._answer(error_line(NO_ID, error))
        self._lines.clear()
        self._take_partial()
        self._host.refused(self)
        self._linger()
        self._take_turn()

    def _answer(self, line: bytes) -> None:
        if self._lost:
            return
        self._answers.append(line)
        self._answers_bytes += len(line)
        if self._answers_bytes >= WRITE_TOGETHER_BYTES:
            self._write()

    def _write(self) -> None:
        if self._answers and not self._lost:
            self.transport.write(b"".join(self._answers))
        self._answers.clear()
        self._answers_bytes = 0

    def _hold_partial(self, data: bytes) -> bool:
        """Keep the beginning of a line; returns False if its size was refused."""
        if not data:
            return True
        limits = self._limits
        limit = limits.line_bytes if self._authorized else limits.unauthorized_line_bytes
        if len(self._partial) + len(data) > limit:
            if self._authorized:
                self._refuse(TooLarge(f"a line is at most {limit} bytes", hint="split the request"))
            else:
                self._unauthorized_left = 0
                self._unauthorized(None, "the connection has not authenticated")
            return False
        if self._dispatcher.held_bytes + len(data) > self._limits.held_bytes:
            self._refuse(TooMuchHeld(self._dispatcher.held_bytes))
            return False
        self._partial += data
        self._dispatcher.held_bytes += len(data)
        return True

    def _take_partial(self) -> bytes:
        line = bytes(self._partial)
        self._dispatcher.held_bytes -= len(line)
        self._partial = bytearray()
        return line

    def _peer_is_gone(self) -> bool:
        """Whether the client has closed its end, and did not only stop sending.

        Only a Unix socket tells these apart.
        """
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        return any(event & select.POLLHUP for _, event in poll.poll(0))
