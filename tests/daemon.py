"""A ``syncd serve`` of a test's own, in a process of its own."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from syncd.client.client import Client

READY_SECONDS = 60.0
CHECKOUT = Path(__file__).parents[1]


class Daemon:
    """A service to start, stop and kill any number of times; the data directory stays."""

    def __init__(self, conninfo: str, data_dir: Path, **settings: object) -> None:
        self.conninfo = conninfo
        self.data_dir = data_dir
        self.socket = (
            Path(tempfile.mkdtemp(prefix="syncd-")) / "s"
        )  # a path that fits a socket address
        weakref.finalize(self, shutil.rmtree, self.socket.parent, ignore_errors=True)
        self.settings = settings
        self.command = "serve"
        self.python = sys.executable
        self.log = data_dir.parent / f"{data_dir.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.constants: dict[str, object] = {}
        self.points: Path | None = None
        self.broken: list[tuple[str, int, str]] = []
        self.variables: dict[str, str] = {}
        """More variables of the environment. PG* variables of the tester are left out."""

    def with_constant(self, name: str, value: object) -> Daemon:
        """Give a constant another value in the next processes.

        ``name`` has the module, such as ``syncd.sync.consumer.session.POLL_SECONDS``.
        """
        self.constants[name] = value
        return self

    def with_small_slots(self) -> Daemon:
        """Change the outbox's slot after a few rows or an instant, and free slots all the time."""
        self.with_constant("syncd.postgres.freeing.SLOT_ROWS", 100)
        self.with_constant("syncd.postgres.freeing.SLOT_SECONDS", 0.2)
        return self.with_constant("syncd.sync.background.rotation.ROTATION_SECONDS", 0.05)

    def with_points(self, folder: Path) -> Daemon:
        """Let the next processes be killed at the point that ``points.arm`` names in ``folder``."""
        self.points = folder
        return self

    def with_error(self, function: str, times: int, when: str = "True") -> Daemon:
        """Let ``function`` (``module:path``) raise at its first ``times`` calls.

        This holds for each of the next processes; see ``tests.faults.errors``.
        """
        self.broken.append((function, times, when))
        return self

    @property
    def program(self) -> list[str]:
        """Arguments of Python."""
        if not self.constants and self.points is None and not self.broken:
            return ["-m", "syncd.cli.main"]
        assign = (
            f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); "
            if self.broken or self.points
            else ""
        )
        assign += "import sys; from unittest.mock import patch; " + "".join(
            f"patch({name!r}, {value!r}).start(); " for name, value in self.constants.items()
        )
        reader = ("-c", assign + "from syncd.readers.process import main; main(sys.argv[1:])")
        assign += f"patch('syncd.readers.running.COMMAND', {reader!r}).start(); "
        assign += "from syncd.cli.main import main; "
        if self.points is not None:
            assign += f"from tests.faults import points; points.watch({str(self.points)!r}); "
        if self.broken:
            assign += "from tests.faults import errors; "
            assign += "".join(f"errors.break_function(*{one!r}); " for one in self.broken)
        return ["-c", assign + "main()"]

    @property
    def environment(self) -> dict[str, str]:
        """The environment, without settings of the tester's own."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SYNCD_", "PG"))
        }
        mine = {
            "dsn": self.conninfo,
            "data_dir": self.data_dir,
            "socket": self.socket,
            "checkpoint_seconds": 3600,
            "http": "off",
            "readers": os.environ.get("TEST_READERS", 0),
        }
        kept["PYTHONFAULTHANDLER"] = "1"
        settings = {
            f"SYNCD_{name.upper()}": str(value) for name, value in (mine | self.settings).items()
        }
        return kept | settings | self.variables

    def spawn(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the process without waiting."""
        self.data_dir.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, *self.program, self.command, *arguments],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        return self.process

    def start(self, *arguments: str) -> Daemon:
        """Start, and wait for the line ``ready``."""
        process = self.spawn(*arguments)
        line = self.wait_for_line(process)
        assert line == f"ready {self.socket}\n".encode(), f"{line!r}\n{self.log.read_text()}"
        return self

    def wait_for_line(self, process: subprocess.Popen[bytes]) -> bytes:
        """The next line of stdout, empty if the process ended; fails after a minute."""
        assert process.stdout is not None
        deadline = time.monotonic() + READY_SECONDS
        look = select.poll()  # select() refuses descriptors above 1,023
        look.register(process.stdout, select.POLLIN | select.POLLHUP)
        readable = look.poll(max(deadline - time.monotonic(), 0) * 1000)
        assert readable, f"no line within {READY_SECONDS} s\n{self.log.read_text()}"
        return process.stdout.readline()

    def stop(self) -> None:
        """SIGTERM; the exit status must be 0."""
        process = self.end(signal.SIGTERM)
        assert process.returncode == 0, self.log.read_text()

    def kill(self) -> None:
        """SIGKILL, as a crash would."""
        self.end(signal.SIGKILL)

    def end(self, how: signal.Signals) -> subprocess.Popen[bytes]:
        """Send a signal and wait for the end."""
        process, self.process = self.process, None
        assert process is not None
        process.send_signal(how)
        process.wait(READY_SECONDS)
        if process.stdout is not None:
            process.stdout.close()
        return process

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A blocking client of this service."""
        with Client(self.socket) as client:
            yield client
