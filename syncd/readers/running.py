"""One running reader, as the main process sees it: its process, and the ways to reach it."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import anyio
import msgspec

import syncd
from syncd.errors import SyncdError
from syncd.readers.process import Order, ReaderSettings
from syncd.rpc.accepting import MORE_FILES

SECRETS = ("SYNCD_DSN", "SYNCD_TOKEN", "PGPASSWORD", "SYNCD_WEBHOOK_URL")
"""Variables that a reader does not need."""
COMMAND = ("-P", "-m", "syncd.readers")
"""Python's arguments for a reader; the reader's own arguments follow."""
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

NOT_STARTED = {
    errno.EMFILE: MORE_FILES,
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.ENOMEM: "set a lower SYNCD_READERS, or give the machine more memory",
}
"""What to do about an error of the system at the start of a reader."""


class ReaderLost(SyncdError):
    """A reader process ended by itself, or cannot be started."""

    def __init__(self, seat: int, reason: str, hint: str) -> None:
        super().__init__(f"reader {seat}: {reason}", hint=hint)
        self.reason = reason

    @classmethod
    def not_started(cls, seat: int, error: OSError) -> ReaderLost:
        """The error of a reader that the system does not start."""
        hint = NOT_STARTED.get(error.errno or 0, "set SYNCD_READERS=0")
        return cls(seat, f"it cannot be started: {error.strerror}", hint)

    @classmethod
    def ended(cls, seat: int, status: int) -> ReaderLost:
        """The error of a reader that ended; ``status`` is negative for a signal."""
        hint = "read the lines of the log before this one"
        if status >= 0:
            return cls(seat, f"it ended with exit {status}", hint)
        if -status == signal.SIGKILL:
            hint = "if the system was out of memory (dmesg), set a lower SYNCD_READERS"
        return cls(seat, f"it was ended by {signal_name(-status)}", hint)


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


def signal_name(number: int) -> str:
    """A signal's name; its number if Python has no name for it."""
    named = {each.value: each.name for each in signal.Signals}
    return named.get(number, f"signal {number}")


def environment() -> dict[str, str]:
    """The environment of a reader: the same code as the main process's, and no secret."""
    kept = {name: value for name, value in os.environ.items() if name not in SECRETS}
    root = str(Path(syncd.__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return kept
