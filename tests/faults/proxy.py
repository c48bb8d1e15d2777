"""A TCP proxy between syncd and its server, for the faults of a network."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from types import TracebackType
from typing import Self

CHUNK = 65_536
RESET_AT_CLOSE = struct.pack("ii", 1, 0)
NOTIFICATION = ord("A")


class Link:
    """One connection through the proxy."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.open = threading.Event()
        """Whether bytes get through."""
        self.running = 2
        self.lock = threading.Lock()

    def end(self, *, reset: bool) -> None:
        """End both directions; ``reset``: with RST, as a firewall or a failing host does."""
        for each in (self.client, self.server):
            with contextlib.suppress(OSError):
                if reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                each.shutdown(socket.SHUT_RD if reset else socket.SHUT_RDWR)
        self.open.set()

    def direction_ended(self) -> None:
        """Close the sockets once both directions have ended.

        Earlier, another connection could get the number of a socket that is still read from.
        """
        with self.lock:
            self.running -= 1
            if self.running == 0:
                self.client.close()
                self.server.close()


class Proxy:
    """Listens on 127.0.0.1 and forwards to the port ``target``.

    A test may change each attribute while connections are open.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.latency_seconds = 0.0
        """Delay of each direction, in seconds."""
        self.drops_notifications = False
        """Whether new connections lose notifications; they must not be encrypted."""
        self.budget: int | None = None
        """Bytes that the server may send before one connection is cut; None: no limit."""
        self.refusing = False
        self.dark = False
        self.accepted = 0
        self.links: set[Link] = set()
        self.lock = threading.Lock()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Take connections until the proxy is closed."""
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            try:
                if self.refusing:
                    raise ConnectionRefusedError
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
                client.close()
                continue
            link = Link(client, server)
            if not self.dark:
                link.open.set()
            for source, sink in ((client, server), (server, client)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(
                    target=self.forward, args=(link, source, sink), daemon=True
                ).start()
            with self.lock:
                self.links.add(link)
                self.accepted += 1

    def forward(self, link: Link, source: socket.socket, sink: socket.socket) -> None:
        """Copy one direction until either side ends."""
        cut_out = (
            WithoutNotifications() if source is link.server and self.drops_notifications else None
        )
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                time.sleep(self.latency_seconds)
                link.open.wait()
                if source is link.server and self.budget is not None:
                    self.budget -= len(data)
                    if self.budget < 0:
                        self.budget = None
                        link.end(reset=True)
                        break
                sink.sendall(data if cut_out is None else cut_out.rest_of(data))
        link.end(reset=False)
        link.direction_ended()
        with self.lock:
            self.links.discard(link)

    def freeze(self) -> None:
        """Stop all bytes on open connections, which stay open; new ones work."""
        with self.lock:
            for link in self.links:
                link.open.clear()

    def blackhole(self) -> None:
        """Stop all bytes on open and on new connections."""
        self.dark = True
        self.freeze()

    def refuse(self) -> None:
        """Cut every connection, and refuse new ones."""
        self.refusing = True
        self.reset()

    def reset(self) -> int:
        """Cut every connection with RST; new ones work. Returns the number of cut connections."""
        with self.lock:
            links, self.links = self.links, set()
        for link in links:
            link.end(reset=True)
        return len(links)

    def restore(self) -> None:
        """Let new connections work; cut the frozen ones."""
        self.refusing = self.dark = False
        with self.lock:
            held = [link for link in self.links if not link.open.is_set()]
        for link in held:
            link.end(reset=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.reset()


class WithoutNotifications:
    """A server's messages without NotificationResponse.

    A message begins with a type of one byte and a length.
    """

    def __init__(self) -> None:
        self.pending = b""

    def rest_of(self, data: bytes) -> bytes:
        """The bytes to send on; an incomplete message waits."""
        self.pending += data
        kept = []
        while len(self.pending) >= 5:
            end = 1 + int.from_bytes(self.pending[1:5], "big")
            if len(self.pending) < end:
                break
            if self.pending[0] != NOTIFICATION:
                kept.append(self.pending[:end])
            self.pending = self.pending[end:]
        return b"".join(kept)
