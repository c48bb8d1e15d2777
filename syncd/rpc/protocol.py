"""JSON-RPC 2.0, one message per line: decodes requests, encodes results and errors.

``decode_request`` raises no error, whatever a client sends. An answer has the request's id as the
bytes that the client wrote, so a number keeps all its digits. If an object names a member twice,
the last one counts, as in most JSON parsers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import structlog

from syncd.errors import InvalidParams, RequestError, SyncdError
from syncd.protocol.messages import ErrorBody, ErrorData, Params

SERVER_ERROR = -32000
"""The code of syncd's own errors; ``error.data.kind`` tells them apart."""

INTERNAL_ERROR_KIND = "internal_error"
SHOWN_CHARACTERS = 100
"""How many characters of a client's own text an error repeats."""

logger = structlog.get_logger()


class ParseError(RequestError):
    """The line is not JSON."""

    kind = "parse_error"


class InvalidRequestError(RequestError):
    """The line is JSON, but not a JSON-RPC 2.0 request."""

    kind = "invalid_request"


class MethodNotFoundError(RequestError):
    """No method has this name."""

    kind = "method_not_found"

    def __init__(self, method: str) -> None:
        super().__init__(
            f"there is no method {method[:SHOWN_CHARACTERS]!r}",
            hint="rpc.discover lists the methods",
        )


CODES: dict[type[RequestError], int] = {
    ParseError: -32700,
    InvalidRequestError: -32600,
    MethodNotFoundError: -32601,
    InvalidParams: -32602,
}
"""The errors for which JSON-RPC defines a code."""

P = TypeVar("P", bound=Params)
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Method(Generic[P, R]):
    """One method of the service.

    ``call`` runs on the event loop's thread. It returns the result, or an awaitable of it if this
    call has to wait. An ``immediate`` method never waits and is answered even if the service is
    overloaded. If a client leaves, its calls are cancelled; a call that must be completed shields
    itself.
    """

    params: type[P]
    result: type[R]
    call: Callable[[P], R | Awaitable[R]]
    summary: str
    immediate: bool = False
    listed: bool = True
    """Whether ``rpc.discover`` shows it."""


@dataclass(frozen=True, slots=True)
class Request:
    """One decoded line.

    ``id`` is the id as the client wrote it; None for a notification, which is never answered.
    """

    id: bytes | None
    method: str
    params: msgspec.Raw


@dataclass(frozen=True, slots=True)
class BadRequest:
    """A line that is not a request, with the id of its answer.

    The id is the line's own if it could be read, else null.
    """

    id: bytes
    error: RequestError


class _Envelope(msgspec.Struct):
    jsonrpc: str
    method: str
    id: msgspec.Raw = msgspec.Raw(b"")
    params: msgspec.Raw = msgspec.Raw(b"")


class _IdOnly(msgspec.Struct):
    id: msgspec.Raw = msgspec.Raw(b"")


_envelopes = msgspec.json.Decoder(_Envelope)
_ids = msgspec.json.Decoder(_IdOnly)
_anything = msgspec.json.Decoder(msgspec.Raw)


def decode_request(line: bytes) -> Request | BadRequest:
    """Decode one line."""
    if not line.isascii():
        try:
            line.decode()
        except UnicodeDecodeError as error:
            return BadRequest(
                b"null",
                ParseError(f"byte {error.start} of the line is not UTF-8", hint="send UTF-8"),
            )
    try:
        envelope = _envelopes.decode(line)
    except msgspec.ValidationError as error:
        return _no_request(line, str(error))
    except (msgspec.DecodeError, RecursionError) as error:
        return _no_json(error)
    request_id = bytes(envelope.id)
    if request_id[:1] not in _ID_STARTS:
        return BadRequest(
            b"null",
            InvalidRequestError(
                "the id is neither a string nor a number", hint='for example "id": 1'
            ),
        )
    if envelope.jsonrpc != "2.0":
        version = envelope.jsonrpc[:SHOWN_CHARACTERS]
        return BadRequest(
            request_id or b"null",
            InvalidRequestError(f"jsonrpc is {version!r}", hint='send "jsonrpc": "2.0"'),
        )
    return Request(request_id or None, envelope.method, envelope.params)


def decode_params(decoder: msgspec.json.Decoder[P], raw: msgspec.Raw) -> P:
    """Decode a request's parameters; raises ``InvalidParams``, which names the wrong one."""
    text = bytes(raw)
    if text in _ABSENT:
        text = b"{}"
    elif text[:1] == b"[":
        raise InvalidParams("parameters are passed by name", hint='send "params" as an object')
    try:
        params = decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidParams(
            _explained(str(error)), hint="rpc.discover lists each method's parameters"
        ) from None
    params.check()
    return params


def result_line(request_id: bytes, result: object) -> bytes:
    """The answer to a request that succeeded."""
    return b'{"jsonrpc":"2.0","id":%b,"result":%b}\n' % (request_id, _encoder.encode(result))


def error_line(request_id: bytes, error: RequestError) -> bytes:
    """The answer to a request that failed."""
    code = next((CODES[cls] for cls in type(error).__mro__ if cls in CODES), SERVER_ERROR)
    body = ErrorBody(code, _encodable(error.message), ErrorData(error.kind, _encodable(error.hint)))
    return b'{"jsonrpc":"2.0","id":%b,"error":%b}\n' % (request_id, _encoder.encode(body))


def as_request_error(error: Exception, method: str) -> RequestError:
    """The error that the client gets for an exception of a method.

    Only a ``RequestError`` has its cause in the request. Every other exception is logged, and the
    client gets ``internal_error``.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, SyncdError):  # its message says it all: no traceback
        with suppress(Exception):  # a log that cannot be written must not end the server
            logger.error("request_failed", method=method, error=error.message, hint=error.hint)
        return RequestError(error.message, hint=error.hint)
    with suppress(Exception):
        logger.error("request_failed", method=method, exc_info=error)
    message = f"{method} failed inside syncd: {type(error).__name__}"
    return RequestError(message, hint="the log of syncd serve has the traceback")


_ID_STARTS = {b"", b"n", b'"', b"-", *(b"%d" % digit for digit in range(10))}
_ABSENT = (b"", b"null")


def _no_request(line: bytes, reason: str) -> BadRequest:
    """The error of a line that is not a request, with its id if there is one.

    The line is decoded again, because the first decoder stopped at the first wrong member. It may
    not have read the id, and the rest of the line may not be JSON.
    """
    try:
        _anything.decode(line)
        request_id = bytes(_ids.decode(line).id)
    except msgspec.ValidationError:
        request_id = b""
    except (msgspec.DecodeError, RecursionError) as error:
        return _no_json(error)
    if request_id[:1] not in _ID_STARTS:
        request_id = b""
    if line.lstrip()[:1] == b"[":
        return BadRequest(
            b"null",
            InvalidRequestError("batches are not supported", hint="send one request per line"),
        )
    reason = _explained(reason).replace("parameter", "member")
    return BadRequest(
        request_id or b"null",
        InvalidRequestError(reason, hint="send one JSON-RPC 2.0 request per line"),
    )


def _no_json(error: Exception) -> BadRequest:
    reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    return BadRequest(b"null", ParseError(reason, hint="send one JSON object per line"))


def _explained(reason: str) -> str:
    """msgspec's message with the path first: ``k: expected `int`, got `str```."""
    if reason.startswith("maximum recursion"):
        return "nested too deeply"
    reason = reason.replace("Object contains unknown field", "unknown parameter").replace(
        "Object missing", "missing"
    )
    reason, _, path = reason.partition(" - at `$")
    reason = reason.replace("required field", "required parameter")
    where = path.rstrip("`").lstrip(".")
    return f"{where}: {reason[0].lower()}{reason[1:]}" if where else reason


def _encodable(text: str) -> str:
    """The text with lone surrogates escaped: JSON in UTF-8 cannot contain them."""
    return text.encode("utf-8", "backslashreplace").decode()


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise NotImplementedError


_encoder = msgspec.json.Encoder(enc_hook=_encode_array)
