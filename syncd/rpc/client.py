"""The blocking client."""

from __future__ import annotations

import inspect
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from functools import update_wrapper
from itertools import count
from time import monotonic
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import msgspec

from syncd.errors import ServiceUnavailable
from syncd.rpc import calls
from syncd.rpc.address import TcpAddress, UnixAddress, find_service
from syncd.rpc.calls import Call, Key
from syncd.rpc.exchange import (
    READ_BYTES,
    Answer,
    allowed_seconds,
    read_answer,
    request_line,
    take_result,
    timed_out,
    unavailable,
)
from syncd.rpc.messages import DEFAULT_PAGE_KEYS

DEFAULT_TIMEOUT_SECONDS = 30.0

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")


def as_method(method: Callable[Concatenate[C, P], T], build: Callable[P, Any]) -> Callable[Concatenate[C, P], T]:
    """Give ``method`` the name, the documentation and the parameters of the function that builds its call."""
    update_wrapper(method, build, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    # without a return annotation: build's says that it returns a Call
    vars(method)["__signature__"] = inspect.Signature([itself, *inspect.signature(build).parameters.values()])
    return method


def blocking(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """A call as a method of ``Client``."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(build(*args, **kwargs))

    return as_method(method, build)


class Client:
    """A connection to syncd, for use with ``with``. Threads may share it; their calls then run one after the other."""

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
    ) -> None:
        self.address = find_service(address, token, tls)
        self.timeout = timeout
        self._lock = threading.Lock()
        self._numbers = count(1)
        self._socket: socket.socket | None = None
        self._received = bytearray()

    search = blocking(calls.search)
    get = blocking(calls.get)
    keys_page = blocking(calls.keys_page)
    datasets = blocking(calls.datasets)
    status = blocking(calls.status)
    wait = blocking(calls.wait)
    checkpoint = blocking(calls.checkpoint)
    verify = blocking(calls.verify)
    rebuild = blocking(calls.rebuild)
    why = blocking(calls.why)
    ping = blocking(calls.ping)
    discover = blocking(calls.discover)

    def keys(self, dataset: str, *, limit: int = DEFAULT_PAGE_KEYS) -> Iterator[Key]:
        """Every indexed key, in a stable order, fetched in pages of ``limit``."""
        after: Key | None = None
        while True:
            page = self.keys_page(dataset, after_key=after, limit=limit)
            yield from page.keys
            if (after := page.next) is None:
                return

    def connect(self) -> None:
        """Connect now; without it the first call does. Raises ``ServiceUnavailable`` where nobody listens."""
        with self._lock:
            if self._socket is None:
                self._connect()

    def close(self) -> None:
        """Close the connection; the next call opens another."""
        with self._lock:
            self._disconnect()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, call: Call[T]) -> T:
        """Send one call and wait for its answer.

        A connection that turns out to be dead is replaced once: the service may have been restarted. That is safe
        because asking any of the calls twice does no more than asking once.
        """
        with self._lock:
            if self._socket is not None:
                try:
                    return self._exchange(call)
                except ServiceUnavailable:
                    pass
            self._connect()
            return self._exchange(call)

    def _exchange(self, call: Call[T]) -> T:
        number = next(self._numbers)
        line = request_line(number, call)
        seconds = allowed_seconds(call, self.timeout)
        until = None if seconds is None else monotonic() + seconds
        try:
            answer = self._ask(line, until)
        except TimeoutError:
            self._disconnect()
            raise timed_out(call, self.address, seconds) from None
        except (OSError, msgspec.MsgspecError) as error:  # whoever does not speak JSON-RPC is not syncd
            self._disconnect()
            raise unavailable(self.address, error) from error
        except BaseException:
            self._disconnect()  # an interrupted exchange leaves an answer behind that belongs to nobody
            raise
        if answer.id != number:
            self._disconnect()
        return take_result(call, answer)

    def _ask(self, line: bytes, until: float | None) -> Answer:
        connection = self._socket
        assert connection is not None
        refused: OSError | None = None
        try:
            connection.settimeout(_seconds_left(until))
            connection.sendall(line)
        except TimeoutError:
            raise
        except OSError as error:
            refused = error  # the service may have said why before it closed
        received = self._received
        end = received.find(b"\n")
        while end < 0:
            connection.settimeout(_seconds_left(until))
            data = connection.recv(READ_BYTES)
            if not data:
                raise refused or ConnectionError
            found = data.find(b"\n")
            end = len(received) + found if found >= 0 else -1
            received += data
        answer = read_answer(bytes(received[:end]))
        del received[: end + 1]
        return answer

    def _connect(self) -> None:
        address = self.address
        try:
            if isinstance(address, UnixAddress):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.settimeout(self.timeout)
                self._socket.connect(address.path)
            else:
                self._socket = socket.create_connection((address.host, address.port), self.timeout)
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if address.tls is not None:
                    self._socket = address.tls.wrap_socket(self._socket, server_hostname=address.host)
        except OSError as error:
            self._disconnect()
            raise unavailable(address, error) from error
        if isinstance(address, TcpAddress):
            try:
                self._exchange(calls.authenticate(address.token))
            except BaseException:
                self._disconnect()  # it would be taken for one that has authenticated
                raise

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        self._received.clear()


def connect(
    address: str | os.PathLike[str] | None = None,
    *,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
) -> Client:
    """Connect to a running syncd: a socket's path, ``tcp://host:port`` with its token, or this machine's own.

    ``tcps://host:port`` is the same with TLS; ``tls`` says whom to trust, by default the system's authorities, or those in
    the file that ``SSL_CERT_FILE`` names. ``token`` defaults to ``SYNCD_TOKEN``. ``timeout`` is in seconds, for each call,
    on top of what the call itself grants the service. Raises ``ServiceUnavailable`` where nobody listens.
    """
    client = Client(address, token=token, tls=tls, timeout=timeout)
    client.connect()
    return client


def _seconds_left(until: float | None) -> float | None:
    if until is None:
        return None
    left = until - monotonic()
    if left <= 0:
        raise TimeoutError
    return left
