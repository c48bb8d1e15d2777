"""One client's bytes: startup, TLS, login, and then messages for its session.

Invariants: the memory that one client can take is bounded, no other client waits for it, and
nothing runs on for a client that left. The same limits as the RPC's hold.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import ssl
import struct
from collections.abc import Awaitable
from time import monotonic
from typing import Any, Protocol

import structlog
from anyio import CancelScope
from pygwire import messages as pg

from syncd.errors import TooLarge
from syncd.pgwire.client_settings import ascii_text
from syncd.pgwire.errors import (
    QUERY_CANCELED,
    SqlError,
    as_sql_error,
    from_request_error,
)
from syncd.pgwire.login import MOST_STARTUP_BYTES, NEWEST_PROTOCOL, Login, violation
from syncd.pgwire.scram import Verifier
from syncd.pgwire.session import Session, Steps
from syncd.protocol.messages import Params
from syncd.rpc.dispatch import TooManyConnections, TooMuchHeld
from syncd.rpc.stream import Stream, StreamHost

READ_AHEAD_BYTES = 65_536
"""Input that is read while a statement runs: reading on shows that the client has left."""
MOST_KEPT_BYTES = 16 << 20
"""Bytes of prepared statements and cursors that one connection keeps."""
KEY_BYTES = 32
"""Bytes of the key for cancel requests from protocol 3.2 on; before it has 4."""

_HEADER = struct.Struct("!cI")

logger = structlog.get_logger()


class Host(StreamHost, Protocol):
    """The part of the server that its connections use."""

    verifier: Verifier
    tls: ssl.SSLContext | None

    def admit(self, connection: Connection) -> bool:
        """Count a connection; returns whether there is room for it."""

    def has_room(self, connection: Connection) -> bool:
        """Whether the connection is within the limit."""

    def cancel(self, process: int, key: bytes) -> Awaitable[object] | None:
        """Cancel what another connection runs; see ``SqlServer``."""

    def upgrade(self, connection: Connection) -> None:
        """Start TLS in the server's task group, then call the connection's ``upgraded``."""

    def run(self, connection: Connection, waited: Awaitable[Any], scope: CancelScope) -> None:
        """Await a call in the server's task group, then call the connection's ``finished``."""


class Connection(Stream):
    """The server's end of one connection."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._host = host
        self.process = 0
        """The number by which cancel requests name this connection; the server gives it."""
        self.key = b""
        self._buffer = bytearray()
        self._held = 0
        self._kept = 0
        self._login = Login(self)
        self._session: Session | None = None
        self.is_tls = self._is_upgrading = False
        self._steps: Steps | None = None
        self._scope: CancelScope | None = None
        self._size = 0

    def _opened(self) -> None:
        if not self._host.admit(self):
            self.transport.abort()
            return
        self._start_timer(self._limits.authenticate_seconds, self._too_slow)

    def _received(self, data: bytes) -> None:
        self._buffer += data
        self._take_turn()

    def eof_received(self) -> bool:
        """Close: a client that stops sending reads no more either."""
        return False

    def _forget(self) -> None:
        if self._scope is not None:
            self._scope.cancel()
        if self._session is not None:
            self._session.close()
        self._buffer = bytearray()
        self._hold()

    def upgraded(self, transport: asyncio.BaseTransport | None) -> None:
        """Go on over TLS; None: the handshake failed."""
        self._is_upgrading = False
        if transport is None:
            self.transport.abort()
            self.connection_lost(None)
            return
        self._use(transport)
        self.is_tls = True
        self._take_turn()  # input may have come with the end of the handshake

    @property
    def verifier(self) -> Verifier:
        """See ``Door``."""
        return self._host.verifier

    @property
    def has_certificate(self) -> bool:
        """See ``Door``."""
        return self._host.tls is not None

    def refusal(self) -> SqlError | None:
        """See ``Door``."""
        if self._host.has_room(self):
            return None
        return from_request_error(TooManyConnections(self._limits.connections), fatal=True)

    def send(self, data: bytes) -> None:
        """See ``Door``."""
        self.transport.write(data)

    def start_tls(self) -> None:
        """See ``Door``."""
        self.transport.pause_reading()  # what comes now is TLS's, also before its task runs
        self.transport.write(b"S")
        self._is_upgrading = True
        self._host.upgrade(self)

    def cancel_other(self, process: int, key: bytes) -> None:
        """See ``Door``."""
        self._advance(self._cancelling(process, key), None, None)

    def call(self, method: str, params: Params, size: int) -> Any:
        """Run a method of the RPC, for the session."""
        return self._dispatcher.call(method, params, size, self)

    def keep(self, size: int) -> None:
        """Count bytes that the session keeps; raises ``SqlError`` if they are too many."""
        self._kept += size
        self._dispatcher.held_bytes += size
        full = self._dispatcher.held_bytes > self._limits.held_bytes
        if size > 0 and (self._kept > MOST_KEPT_BYTES or full):
            self._kept -= size
            self._dispatcher.held_bytes -= size
            raise SqlError(
                "53200",
                f"the connection's prepared statements and cursors take more than "
                f"{MOST_KEPT_BYTES} bytes",
                detail="overloaded",
                hint="Close those that you no longer use.",
            )

    def cancel(self) -> None:
        """Cancel the statement that runs, if one does."""
        if self._scope is not None:
            self._scope.cancel()

    def finished(self, result: Any, error: Exception | None, was_cancelled: bool) -> None:
        """Go on with the result of a call that had to wait."""
        steps, self._steps, self._scope = self._steps, None, None
        self._dispatcher.requests -= 1
        self._dispatcher.held_bytes -= self._size
        if self._lost or steps is None:
            return
        if was_cancelled:
            error = SqlError(
                QUERY_CANCELED,
                "canceling statement due to user request",
                hint="Send it again.",
            )
        self._advance(steps, result, error)
        self._take_turn()

    def _take_turn(self) -> None:
        """Run whole messages for ``turn_seconds``, then write, then decide whether to read on."""
        if self._lost or self._turn_pending:
            return
        until, place = monotonic() + self._limits.turn_seconds, 0
        try:
            while self._may_go_on() and not self._draining:
                used = self._take_message(place)
                if not used:
                    break
                place += used
                if monotonic() > until:
                    self._turn_later()
                    break
            if place:
                del self._buffer[:place]
            self._hold()
        except SqlError as error:
            self._end(error)
        if self._draining and self._may_go_on():
            self._end(
                SqlError(
                    "57P01",
                    "terminating connection because syncd stops",
                    hint="Connect again when it runs.",
                    fatal=True,
                ),
                lingers=False,  # an idle session would keep the service from stopping
            )
        self._write()
        self._read_on()

    def _may_go_on(self) -> bool:
        return (
            self._steps is None
            and self._discard_left is None
            and not (self._write_paused or self._lost or self._is_upgrading)
            and not self.transport.is_closing()
        )

    def _take_message(self, place: int) -> int:
        """Answer the message at ``place``; returns its bytes, 0 if it is not complete."""
        if self._login.parameters is None:
            return self._login.take_startup(self._buffer, place)
        if len(self._buffer) - place < _HEADER.size:
            return 0
        length: int
        kind, length = _HEADER.unpack_from(self._buffer, place)
        most = MOST_STARTUP_BYTES if self._session is None else self._limits.line_bytes
        if length < 4:
            raise violation(f"a message has the length {length}")
        if length > most:
            raise from_request_error(
                TooLarge(f"a message is at most {most} bytes", hint="send a smaller statement"),
                fatal=True,
            )
        if len(self._buffer) - place <= length:
            return 0
        payload = bytes(memoryview(self._buffer)[place + _HEADER.size : place + 1 + length])
        if kind == b"X":
            self.transport.close()
        elif self._session is None:
            self._login.take_password(kind, payload)
            if self._login.is_done:
                self._begin()
        else:
            self._size = len(payload)
            self._advance(self._session.answer(kind, payload), None, None)
        return 1 + length

    def _advance(self, steps: Steps, result: Any, error: Exception | None) -> None:
        """Go on with a message's answer until it is complete, or has to wait."""
        try:
            waited = steps.send(result) if error is None else steps.throw(error)
        except StopIteration:
            return
        except Exception as failure:  # noqa: BLE001 - an error ends this connection only
            fatal = as_sql_error(failure)
            fatal.fatal = True
            self._end(fatal)
            return
        self._steps, self._scope = steps, CancelScope()
        self._dispatcher.requests += 1
        self._dispatcher.held_bytes += self._size
        self._host.run(self, waited, self._scope)

    def _cancelling(self, process: int, key: bytes) -> Steps:
        """Have a statement cancelled, and close as the answer."""
        try:
            waited = self._host.cancel(process, key)
            if waited is not None:
                yield waited
        finally:
            self.transport.close()

    def _begin(self) -> None:
        """Begin the session, after the login."""
        self._stop_timer()
        self._session = Session(self, self, self._login.parameters or {})
        self.key = os.urandom(KEY_BYTES if self._login.protocol >= NEWEST_PROTOCOL else 4)
        self._session.greet()
        self._session.out.append(
            pg.BackendKeyData(process_id=self.process, secret_key=self.key).to_wire()
        )
        self._session.ready()

    def is_known_by(self, key: bytes) -> bool:
        """Whether a cancel request has this connection's key."""
        return bool(self.key) and hmac.compare_digest(self.key, key)

    def _too_slow(self) -> None:
        if self._discard_left is None and not self._lost:
            self._end(
                SqlError(
                    "57014",
                    "the connection has not logged in in time",
                    detail="timeout",
                    hint="Connect again.",
                    fatal=True,
                )
            )
            self._write()

    def _end(self, error: SqlError, *, lingers: bool = True) -> None:
        """Send the error, and close: if it ``lingers``, when the client has read it."""
        self._write()
        if self._lost or self.transport.is_closing() or self._discard_left is not None:
            return
        self._buffer = bytearray()
        self._hold()
        fields = {name: ascii_text(text) for name, text in error.fields().items()}
        self.transport.write(pg.ErrorResponse(fields=fields).to_wire())
        if lingers and self._linger() and self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def _write(self) -> None:
        if self._session is not None and self._session.out:
            if not self._lost:
                self.transport.write(b"".join(self._session.out))
            self._session.out.clear()

    def _read_on(self) -> None:
        if self._lost or self._is_upgrading or self.transport.is_closing():
            return
        self._read_if(
            self._discard_left is not None
            or self._may_go_on()
            or (self._steps is not None and len(self._buffer) < READ_AHEAD_BYTES)
        )

    def _hold(self) -> None:
        """Count the input that is kept; raises ``SqlError`` if all clients' is too much."""
        grown = len(self._buffer) - self._held
        self._held += grown
        self._dispatcher.held_bytes += grown
        if grown > 0 and self._dispatcher.held_bytes > self._limits.held_bytes:
            raise from_request_error(TooMuchHeld(self._dispatcher.held_bytes), fatal=True)
