"""The part of the exchange that both clients share: request lines, answers and exceptions."""

from __future__ import annotations

import ssl
from typing import TypeVar

import msgspec

from syncd.client.address import TcpAddress, UnixAddress
from syncd.client.calls import Call
from syncd.errors import InvalidParams, RequestError, ServiceUnavailable, SyncdError, TimedOut
from syncd.protocol.messages import ErrorBody

T = TypeVar("T")

START_HINT = "start it with: syncd serve"
TCP_HINT = (
    "check that syncd serve runs with SYNCD_LISTEN; if it also has SYNCD_TLS_CERT, connect to "
    "tcps://HOST:PORT"
)
TLS_HINT = (
    "connect by the name in the service's certificate; name its authority with the variable "
    "SSL_CERT_FILE, or with `tls`"
)
GROUP_HINT = "connect as the user that runs syncd serve, or as a member of its group"
READ_BYTES = 1 << 20

_encoder = msgspec.json.Encoder()


class Answer(msgspec.Struct):
    """One line from the service. ``id`` is null if the service ends the whole connection."""

    id: int | None = None
    result: msgspec.Raw = msgspec.Raw(b"")
    error: ErrorBody | None = None


class _Message(msgspec.Struct):
    method: str
    params: msgspec.Struct
    jsonrpc: str = "2.0"


read_answer = msgspec.json.Decoder(Answer).decode


def request_line(number: int, call: Call[T]) -> bytes:
    """The line that is sent for a call; raises ``InvalidParams`` for values that JSON has not."""
    try:
        if not call.encoded:
            message = _encoder.encode(_Message(call.method, call.params))
            call.encoded.append(message[1:] + b"\n")
        return b'{"id":%d,%b' % (number, call.encoded[0])
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidParams(
            f"a parameter of {call.method} cannot be sent as JSON: {error}",
            hint="pass numbers, strings, lists and dicts",
        ) from error


def take_result(call: Call[T], answer: Answer) -> T:
    """A call's result; raises the error that the service answered."""
    if answer.error is not None:
        raise as_exception(answer.error)
    try:
        return call.decode(answer.result)
    except msgspec.MsgspecError as error:
        raise RequestError(
            f"the answer to {call.method} cannot be read: {error}",
            hint="use the same version of syncd on both sides",
        ) from error


def allowed_seconds(call: Call[T], timeout: float | None) -> float | None:
    """Seconds to wait for an answer: the client's time-out plus the time that the call grants."""
    if timeout is None or call.patience_seconds is None:
        return None
    return timeout + call.patience_seconds


class NoAnswer(TimedOut):
    """The service has not answered; an answer that the time ran out is a plain ``TimedOut``."""


def timed_out(call: Call[T], address: object, seconds: float | None) -> NoAnswer:
    """The error of a service that does not answer."""
    return NoAnswer(
        f"{address} has not answered {call.method} within {seconds:g} s",
        hint="see its state with: syncd status",
    )


def unavailable(
    address: UnixAddress | TcpAddress, error: BaseException | None
) -> ServiceUnavailable:
    """The error of a service that cannot be reached."""
    reason = getattr(error, "strerror", None) or (str(error) if error else "")
    if not reason:
        late = isinstance(error, TimeoutError)
        reason = "it did not answer in time" if late else "the connection was closed"
    if isinstance(error, ssl.SSLError):
        hint = TLS_HINT
    elif isinstance(address, TcpAddress):
        hint = TCP_HINT
    else:
        hint = GROUP_HINT if isinstance(error, PermissionError) else START_HINT
    return ServiceUnavailable(f"no syncd answers on {address}: {reason}", hint=hint)


def as_exception(body: ErrorBody) -> SyncdError:
    """An exception of the class in errors.py that has this kind, with the service's own text."""
    data = body.data
    kind = data.kind if data else ""
    cls = _CLASSES.get(kind, RequestError)
    error = cls.__new__(cls)
    SyncdError.__init__(error, body.message, hint=data.hint if data else "")
    return error


_CLASSES: dict[str, type[RequestError]] = {cls.kind: cls for cls in RequestError.__subclasses__()}
