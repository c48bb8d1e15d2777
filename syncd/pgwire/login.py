"""The first messages of a connection: TLS, the startup packet, the password, a cancel request.

Each error here is fatal: the connection ends with it.
"""

from __future__ import annotations

import struct
from typing import Protocol

from pygwire import messages as pg
from pygwire.constants import StartupRequestCode
from pygwire.exceptions import PygwireError

from syncd.pgwire.errors import PROTOCOL_VIOLATION, SqlError
from syncd.pgwire.scram import MECHANISM, Exchange, ScramError, Verifier

MOST_STARTUP_BYTES = 10_000
"""Bytes of a startup packet, and of each message of a login: PostgreSQL's limit."""
NEWEST_PROTOCOL = 0x30002
"""Protocol 3.2, PostgreSQL 18's."""

_STARTUP = struct.Struct("!II")


class Door(Protocol):
    """What a login needs of its connection."""

    is_tls: bool

    @property
    def verifier(self) -> Verifier:
        """What the server keeps of the password."""

    @property
    def has_certificate(self) -> bool:
        """Whether TLS is offered, and then required."""

    def refusal(self) -> SqlError | None:
        """Why the server takes no more connections; None: it does."""

    def send(self, data: bytes) -> None:
        """Send bytes to the client."""

    def start_tls(self) -> None:
        """Accept TLS: what the client sends next is TLS's."""

    def cancel_other(self, process: int, key: bytes) -> None:
        """Cancel what another connection runs, and close this one."""


class Login:
    """One connection's login. ``is_done`` once the password was the right one."""

    def __init__(self, door: Door) -> None:
        self._door = door
        self._exchange: Exchange | None = None
        self.parameters: dict[str, str] | None = None
        """The startup packet's parameters; None: it has not come yet."""
        self.protocol = 0
        self.is_done = False

    def take_startup(self, buffer: bytearray, place: int) -> int:
        """Answer the packet at ``place``; returns its bytes, 0 if it is not complete."""
        if len(buffer) - place < _STARTUP.size:
            return 0
        length: int
        length, code = _STARTUP.unpack_from(buffer, place)
        if not _STARTUP.size <= length <= MOST_STARTUP_BYTES:
            raise violation("invalid length of the startup packet")
        if len(buffer) - place < length:
            return 0
        payload = memoryview(bytes(memoryview(buffer)[place + 4 : place + length]))
        if code == StartupRequestCode.SSL_REQUEST:
            if not self._door.has_certificate or self._door.is_tls:
                self._door.send(b"N")
            elif len(buffer) > place + length:  # it would count as encrypted
                raise violation("input follows the request for TLS")
            else:
                self._door.start_tls()
        elif code == StartupRequestCode.GSSENC_REQUEST:
            self._door.send(b"N")
        elif code == StartupRequestCode.CANCEL_REQUEST:
            request = pg.CancelRequest.decode(payload)
            self._door.cancel_other(request.process_id, request.secret_key)
        elif code >> 16 == 3:
            self._start(code, payload)
        else:
            raise SqlError(
                "0A000",
                f"protocol {code >> 16}.{code & 0xFFFF} is not supported",
                hint="Use protocol 3.",
                fatal=True,
            )
        return length

    def take_password(self, kind: bytes, payload: bytes) -> None:
        """Answer one of the two messages with the password."""
        if kind != b"p":
            raise violation(f"expected the password, got the message {kind!r}")
        try:
            if self._exchange is None:
                first = pg.SASLInitialResponse.decode(memoryview(payload))
                if first.mechanism != MECHANISM:
                    raise violation(f"the mechanism is not {MECHANISM}")
                self._exchange = Exchange(self._door.verifier)
                answer = self._exchange.first(first.data)
                self._door.send(pg.AuthenticationSASLContinue(data=answer).to_wire())
                return
            answer = self._exchange.final(payload)
        except (ScramError, PygwireError, struct.error, ValueError):
            raise SqlError(
                "28P01",
                "password authentication failed",
                detail="unauthorized",
                hint="The password is the service's SYNCD_TOKEN; any user name does.",
                fatal=True,
            ) from None
        self._door.send(pg.AuthenticationSASLFinal(data=answer).to_wire())
        self._door.send(pg.AuthenticationOk().to_wire())
        self.is_done = True

    def _start(self, code: int, payload: memoryview) -> None:
        try:
            parameters = pg.StartupMessage.decode(payload).params
        except (PygwireError, struct.error, ValueError):
            raise violation("malformed startup packet") from None
        self.protocol = min(code, NEWEST_PROTOCOL)
        options = [name for name in parameters if name.startswith("_pq_.")]
        if code > NEWEST_PROTOCOL or options:
            # PostgreSQL sends the whole version, although its documentation says: the minor one.
            negotiation = pg.NegotiateProtocolVersion(
                newest_minor=self.protocol, unrecognized=options
            )
            self._door.send(negotiation.to_wire())
        refusal = self._door.refusal()
        if refusal is not None:
            raise refusal
        if self._door.has_certificate and not self._door.is_tls:
            raise SqlError(
                "28000",
                "the service accepts encrypted connections only",
                detail="unauthorized",
                hint="Add sslmode=require to the connection string.",
                fatal=True,
            )
        if parameters.get("replication", "off").lower() not in ("off", "false", "no", "0"):
            raise SqlError(
                "0A000", "replication is not supported", hint="Leave it out.", fatal=True
            )
        self.parameters = parameters
        self._door.send(pg.AuthenticationSASL(mechanisms=[MECHANISM]).to_wire())


def violation(what: str) -> SqlError:
    """The error for bytes that are not PostgreSQL's protocol."""
    return SqlError(
        PROTOCOL_VIOLATION,
        what,
        hint="This port speaks PostgreSQL's protocol 3: connect with a PostgreSQL client.",
        fatal=True,
    )
