"""The blocking client."""

from __future__ import annotations

import inspect
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import update_wrapper
from itertools import count
from time import monotonic
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import msgspec

from syncd.client import calls
from syncd.client.address import TcpAddress, UnixAddress, find_service
from syncd.client.calls import Call, Key
from syncd.client.exchange import (
    READ_BYTES,
    Answer,
    allowed_seconds,
    read_answer,
    request_line,
    take_result,
    timed_out,
    unavailable,
)
from syncd.errors import ServiceUnavailable
from syncd.per_process import PerProcess
from syncd.protocol.keepalive import keep_alive
from syncd.protocol.messages import DEFAULT_PAGE_KEYS, Partial

DEFAULT_TIMEOUT_SECONDS = 30.0

P = ParamSpec("P")
T = TypeVar("T")
C = TypeVar("C")


def as_method(
    method: Callable[Concatenate[C, P], T], build: Callable[P, Any]
) -> Callable[Concatenate[C, P], T]:
    """Give ``method`` the name, docstring and parameters of the function that builds its call."""
    update_wrapper(method, build, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    # no return annotation: build's names a Call, the method returns its result
    vars(method)["__signature__"] = inspect.Signature(
        [itself, *inspect.signature(build).parameters.values()]
    )
    return method


def blocking(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """A call as a method of ``Client``."""

    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.run(build(*args, **kwargs))

    return as_method(method, build)


class Client:
    """A connection to syncd, for use with ``with``.

    Threads may share it; their calls then run one after the other. After ``fork()`` the child's
    first call opens a connection of its own. A pickled client is not connected.
    """

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
        self._own = PerProcess(_Own, _Own.leave)

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "timeout": self.timeout}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.address, self.timeout = state["address"], state["timeout"]
        self._own = PerProcess(_Own, _Own.leave)

    search = blocking(calls.search)
    get = blocking(calls.get)
    keys_page = blocking(calls.keys_page)
    datasets = blocking(calls.datasets)
    status = blocking(calls.status)
    wait = blocking(calls.wait)
    checkpoint = blocking(calls.checkpoint)
    verify = blocking(calls.verify)
    rebuild = blocking(calls.rebuild)
    recall = blocking(calls.recall)
    why = blocking(calls.why)
    ping = blocking(calls.ping)
    discover = blocking(calls.discover)

    def keys(
        self, dataset: str, *, limit: int = DEFAULT_PAGE_KEYS, partial: Partial | None = None
    ) -> Iterator[Key]:
        """Every indexed key, in a stable order, fetched in pages of ``limit``.

        With ``partial="allow"`` the keys of missing shards are left out; ``keys_page`` names them.
        """
        after: Key | None = None
        while True:
            page = self.keys_page(dataset, after_key=after, limit=limit, partial=partial)
            yield from page.keys
            if (after := page.next) is None:
                return

    def connect(self) -> None:
        """Connect now; otherwise the first call connects.

        Raises ``ServiceUnavailable`` if no service listens.
        """
        own = self._own.get()
        with own.lock:
            if own.link is None or own.link.closed:
                own.link = self._open()

    def close(self) -> None:
        """Close this process's connection; the next call opens another."""
        own = self._own.get()
        with own.lock:
            if own.link is not None:
                own.link.close()

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, call: Call[T]) -> T:
        """Send one call and wait for its answer.

        A connection that turns out to be dead is replaced once: the service may have been
        restarted. This is safe because every call has the same effect when it is sent twice.
        """
        own = self._own.get()
        with own.lock:
            if own.link is None or own.link.closed:
                own.link = self._open()
            try:
                return self._exchange(own.link, call)
            except ServiceUnavailable:
                own.link = self._open()
            return self._exchange(own.link, call)

    def _exchange(self, link: _Link, call: Call[T]) -> T:
        return take_result(call, link.ask(call, allowed_seconds(call, self.timeout)))

    def _open(self) -> _Link:
        link = _Link(self.address, self.timeout)
        if isinstance(self.address, TcpAddress):
            try:
                self._exchange(link, calls.authenticate(self.address.token))
            except BaseException:
                link.close()  # else it would count as authenticated
                raise
        return link


class _Link:
    """One open connection. It closes itself if its next answer could belong to another call."""

    def __init__(self, address: UnixAddress | TcpAddress, timeout: float | None) -> None:
        self.address = address
        self.closed = False
        self._socket = _connected(address, timeout)
        self._numbers = count(1)
        self._received = bytearray()

    def ask(self, call: Call[Any], seconds: float | None) -> Answer:
        """Send a call; returns its answer, or the service's reason to end the connection."""
        number = next(self._numbers)
        line = request_line(number, call)
        until = None if seconds is None else monotonic() + seconds
        try:
            answer = self._ask(line, until)
            if answer.id != number and (answer.id is not None or answer.error is None):
                raise ConnectionError("it answered a call that was not sent")  # noqa: TRY301 - handled below
        except TimeoutError as error:
            self.close()
            if error.errno is not None:  # from the system: the peer has vanished
                raise unavailable(self.address, error) from error
            raise timed_out(call, self.address, seconds) from None
        except (OSError, msgspec.MsgspecError) as error:  # not JSON-RPC: the peer is not syncd
            self.close()
            raise unavailable(self.address, error) from error
        except BaseException:
            self.close()  # the answer of an interrupted call would be read as the next call's
            raise
        if answer.id is None:
            self.close()
        return answer

    def close(self) -> None:
        """End the connection, even if a child process has inherited its descriptor."""
        self.closed = True
        with suppress(OSError):  # it may have ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def leave(self) -> None:
        """Close this process's descriptor; the parent's connection stays open."""
        self._socket.close()

    def _ask(self, line: bytes, until: float | None) -> Answer:
        refused: OSError | None = None
        try:
            self._socket.settimeout(_seconds_left(until))
            self._socket.sendall(line)
        except TimeoutError:
            raise
        except OSError as error:
            refused = error  # the service may have sent the reason before it closed
        received = self._received
        end = received.find(b"\n")
        while end < 0:
            self._socket.settimeout(_seconds_left(until))
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise refused or ConnectionError
            found = data.find(b"\n")
            end = len(received) + found if found >= 0 else -1
            received += data
        answer = read_answer(bytes(received[:end]))
        del received[: end + 1]
        return answer


class _Own:
    """One process's part of a client."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.link: _Link | None = None

    def leave(self) -> None:
        """Close the inherited descriptor; the parent process keeps its connection."""
        if self.link is not None:
            self.link.leave()


def connect(
    address: str | os.PathLike[str] | None = None,
    *,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    timeout: float | None = DEFAULT_TIMEOUT_SECONDS,
) -> Client:
    """Connect to a running syncd.

    ``address`` is a socket's path, ``tcp://host:port``, or ``tcps://host:port`` for TLS; by default
    the socket of the service on this machine. ``tls`` names the trusted authorities; by default the
    system's, or those in the file ``SSL_CERT_FILE``. ``token`` defaults to ``SYNCD_TOKEN``.
    ``timeout`` is in seconds per call, on top of the time that the call itself grants the service.
    Raises ``ServiceUnavailable`` if no service listens.
    """
    client = Client(address, token=token, tls=tls, timeout=timeout)
    client.connect()
    return client


def _connected(address: UnixAddress | TcpAddress, timeout: float | None) -> socket.socket:
    """An open socket, with TLS if the address asks for it; raises ``ServiceUnavailable``."""
    connection: socket.socket | None = None
    try:
        if isinstance(address, UnixAddress):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(timeout)
            connection.connect(address.path)
            return connection
        connection = socket.create_connection((address.host, address.port), timeout)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(connection)
        if address.tls is not None:
            connection = address.tls.wrap_socket(connection, server_hostname=address.host)
    except OSError as error:
        if connection is not None:
            connection.close()
        raise unavailable(address, error) from error
    return connection


def _seconds_left(until: float | None) -> float | None:
    if until is None:
        return None
    left = until - monotonic()
    if left <= 0:
        raise TimeoutError
    return left
