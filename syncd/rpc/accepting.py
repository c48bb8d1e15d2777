"""Accepts connections on one listening socket, which other processes may accept on as well.

The kernel wakes every process that waits, and the first one takes the connection. So a process that
has more connections than another one waits for a moment, and takes the connection only if none of
the others did.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

import structlog

MOST_AT_ONCE = 64
"""Connections that are accepted before other events are served."""
YIELD_SECONDS = 0.01
"""How long a process leaves a new connection to one that has fewer."""
PAUSE_SECONDS = 1.0
"""Pause after the system had no descriptor or memory left for a connection."""
MORE_FILES = "close some connections, or raise the limit of open files (ulimit -n)"
MORE_MEMORY = "close some connections, or give the machine more memory"
EXHAUSTED = {
    errno.EMFILE: MORE_FILES,
    errno.ENFILE: "close some connections, or raise the system's limit (sysctl fs.file-max)",
    errno.ENOBUFS: MORE_MEMORY,
    errno.ENOMEM: MORE_MEMORY,
}
"""What to do about each error of a system that has no descriptor or memory left."""

logger = structlog.get_logger()


class Acceptor:
    """Calls ``accepted`` with each new connection, between ``start`` and ``stop``.

    ``yields`` says whether another process should have the next connection.
    """

    def __init__(
        self,
        listening: socket.socket,
        accepted: Callable[[socket.socket], None],
        yields: Callable[[], bool],
    ) -> None:
        self._socket = listening
        self._accepted = accepted
        self._yields = yields
        self._timer: asyncio.TimerHandle | None = None
        self._waits = False

    def start(self) -> None:
        """Accept connections from now on."""
        self.stop()
        self._watch()

    def stop(self) -> None:
        """Accept no more connections. The socket stays open."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._waits:
            self._waits = False
            asyncio.get_running_loop().remove_reader(self._socket)

    def _watch(self) -> None:
        self._timer, self._waits = None, True
        asyncio.get_running_loop().add_reader(self._socket, self._readable)

    def _readable(self) -> None:
        if self._yields():
            self._pause(YIELD_SECONDS, self._accept_one)
            return
        for _ in range(MOST_AT_ONCE):
            if not self._accept() or self._yields():
                return

    def _accept_one(self) -> None:
        self._watch()
        self._accept()

    def _accept(self) -> bool:
        """Accept one connection; returns False if there was none."""
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False
        except OSError as error:
            if error.errno not in EXHAUSTED:
                raise
            logger.warning(
                "accept_paused",
                error=str(error),
                seconds=PAUSE_SECONDS,
                hint=EXHAUSTED[error.errno],
            )
            self._pause(PAUSE_SECONDS, self._watch)
            return False
        connection.setblocking(False)
        self._accepted(connection)
        return True

    def _pause(self, seconds: float, then: Callable[[], None]) -> None:
        self.stop()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)
