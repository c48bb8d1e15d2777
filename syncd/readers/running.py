"""One running reader, as the main process sees it: its process, and the ways to reach it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import msgspec

import syncd
from syncd.readers.process import Order, ReaderSettings

SECRETS = ("SYNCD_DSN", "SYNCD_TOKEN", "PGPASSWORD", "SYNCD_WEBHOOK_URL")
"""Variables that a reader does not need."""
COMMAND = ("-P", "-m", "syncd.readers")
"""Python's arguments for a reader; the reader's own arguments follow."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ReaderProcess:
    """One running reader."""

    def __init__(
        self, seat: int, settings: ReaderSettings, shared: Sequence[int], bound: list[socket.socket]
    ) -> None:
        self.seat = seat
        self.ended = anyio.Event()
        self.is_ready = False
        self.beats = 0
        """Its beats at the last look."""
        self.looks = 0
        """Number of looks since the beats have changed."""
        self.reported = 0
        """Number of the last order to report that it has obeyed."""
        self.control, its_control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.setblocking(False)
        descriptors = [its_control.fileno(), *shared, *(each.fileno() for each in bound)]
        with its_control:
            its_control.setblocking(False)
            # From the main thread: the kernel ends a reader with the thread that started it.
            self.process = subprocess.Popen(  # noqa: S603 - syncd's own program
                [sys.executable, *COMMAND, str(seat), *map(str, descriptors)],
                stdin=subprocess.PIPE,
                stdout=sys.stderr.fileno(),
                pass_fds=descriptors,
                env=environment(),
                bufsize=0,
                process_group=0,  # Ctrl-C is for the main process
            )
        assert self.process.stdin is not None
        os.set_blocking(self.process.stdin.fileno(), False)
        self.order(settings)

    def order(self, order: Order | ReaderSettings) -> None:
        """Send a line to the reader's input, unless it has ended."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(msgspec.json.encode(order) + b"\n")

    def kill(self) -> None:
        """End the process now."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def close(self) -> None:
        """Close the pipes of a reader that has ended."""
        self.control.close()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that only this process has: mapped files and shared memory not counted.

        Source: proc(5), statm.
        """
        try:
            _, resident, shared, *_ = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        except (OSError, ValueError):
            return 0
        return (int(resident) - int(shared)) * PAGE_BYTES


def environment() -> dict[str, str]:
    """The environment of a reader: the same code as the main process's, and no secret."""
    kept = {name: value for name, value in os.environ.items() if name not in SECRETS}
    root = str(Path(syncd.__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return kept
