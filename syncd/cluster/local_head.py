"""A Ray of syncd's own on this machine, for ``--address local``.

Invariant: its processes are those of one session, which a file names, so that stopping it ends no
other Ray. ``ray stop`` would end every Ray of this user.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from syncd.cores import available_cores
from syncd.errors import RayUnavailable
from syncd.host_port import join_host_port

HOST = "127.0.0.1"
"""Its address: only this machine reaches it."""
SHORT_FOLDER = "/tmp"  # noqa: S108 - ``_lock`` checks its owner
"""Paths of Ray's sockets are 70 characters longer, and may have 107."""
START_SECONDS = 120.0
STOP_SECONDS = 2.0
"""How long its processes may take to end before they are killed: they keep nothing."""
OBJECT_STORE_BYTES = 80_000_000
"""Nearly the least that Ray accepts: syncd puts no object into it."""


class State(msgspec.Struct, frozen=True):
    """What its file says: its address, and the session of its processes in this boot."""

    address: str
    session: int
    boot: str


class LocalHead:
    """The Ray of one data directory."""

    def __init__(self, data_dir: Path) -> None:
        word = hashlib.sha256(str(data_dir).encode()).hexdigest()[:8]
        base = Path(os.environ.get("RAY_TMPDIR") or SHORT_FOLDER)
        self.folder = base / f"syncd-ray-{os.getuid()}-{word}"
        self.token = self.folder / "token"
        self._state = self.folder / "head.json"

    @property
    def variables(self) -> dict[str, str]:
        """Variables of the environment with which this Ray is used."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            # It starts as many workers at once as it has CPUs, of which syncd takes none.
            "RAY_worker_maximum_startup_concurrency": str(available_cores()),
            # else Ray puts the machine's own address in place of 127.0.0.1
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }

    def address(self) -> str | None:
        """Its address; None if it does not run."""
        state = self._read()
        if state is None or not self._processes(state):
            return None
        return state.address if answers(state.address) else None

    def start(self, say: Callable[[str], None]) -> str:
        """Start it unless it runs; its address. Raises ``RayUnavailable``."""
        if importlib.util.find_spec("ray") is None:
            raise not_installed()
        with self._lock():
            found = self.address()
            if found is not None:
                return found
            say("starting Ray on this machine")
            self._end()  # what is left of one whose head was killed
            if not self.token.exists():
                with open(self.token, "x", opener=private) as file:
                    file.write(secrets.token_hex(32))
            address = join_host_port(HOST, free_port())
            log = self.folder / "start.log"
            command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head"]
            command += [f"--node-ip-address={HOST}", f"--port={address.rpartition(':')[2]}"]
            command += [f"--temp-dir={self.folder / 'r'}"]
            command += ["--num-cpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"]
            command += ["--include-dashboard=false", "--disable-usage-stats"]
            command += ["--min-worker-port=0", "--max-worker-port=0"]
            inherited = {
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("SYNCD_", "PG", "RAY_"))
            }
            with log.open("wb") as output:
                process = subprocess.Popen(  # noqa: S603 - Ray's program
                    command,
                    env=inherited | self.variables,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            self._write(State(address, process.pid, boot()))
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(START_SECONDS)
            if process.returncode != 0 or not answers(address):
                self._end()
                words = log.read_text("utf-8", "replace").strip()[-1000:]
                raise RayUnavailable(f"Ray did not start: {words}", hint=f"see {log}")
            return address

    def stop(self) -> None:
        """End its processes and remove its files; does nothing if there are none."""
        if self.folder.exists():
            with self._lock():
                self._end()
                shutil.rmtree(self.folder, ignore_errors=True)

    def _end(self) -> None:
        """End all its processes."""
        state = self._read()
        if state is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + STOP_SECONDS
            for pid in self._processes(state):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self._processes(state) and time.monotonic() < until:
                time.sleep(0.05)
        self._state.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "r", ignore_errors=True)

    def _processes(self, state: State) -> list[int]:
        """Its processes: those of its session that are Ray's."""
        found: list[int] = []
        if state.boot != boot():
            return found
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                words = (entry / "cmdline").read_bytes()
                mine = str(self.folder).encode() in words or words.startswith(b"ray::")
                if mine and os.getsid(pid) == state.session:
                    found.append(pid)
        return found

    def _read(self) -> State | None:
        try:
            return msgspec.json.decode(self._state.read_bytes(), type=State)
        except (OSError, msgspec.DecodeError):
            return None

    def _write(self, state: State) -> None:
        with open(self._state, "wb", opener=private) as file:
            file.write(msgspec.json.encode(state))

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One command at a time; the folder is this user's alone."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        found = self.folder.lstat()
        if found.st_uid != os.getuid() or found.st_mode & 0o77:
            raise RayUnavailable(
                f"{self.folder} can be used by other users", hint="remove it, or set RAY_TMPDIR"
            )
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def not_installed() -> RayUnavailable:
    """The error if the package ray is missing."""
    return RayUnavailable("Ray is not installed", hint="pip install 'syncd[ray]'")


def private(path: str, flags: int) -> int:
    """Open a file that only this user may read."""
    return os.open(path, flags, 0o600)


def boot() -> str:
    """A word for the time since this machine was started: ids of sessions return after it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def answers(address: str) -> bool:
    """Whether a process listens on ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 2.0).close()
    except OSError:
        return False
    return True
