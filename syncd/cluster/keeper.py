"""One shard's process: started, watched, and started again when it ends.

Invariant: at most one process runs in a shard's data directory. A process outlives its keeper, and
the next keeper takes it over: the lock of the data directory tells whether it runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from syncd.host_port import join_host_port
from syncd.settings import default_data_dir, name_of_shard
from syncd.shard import Shard
from syncd.store.data_dir import LOCK_FILE

LOG_FILE = "serve.log"
"""A shard's log, in its data directory."""
STEADY_SECONDS = 60.0
"""A process that has run for this long is started again at once.

It is longer than a start takes to fail if the database does not answer (30 s).
"""
FIRST_DELAY_SECONDS = 0.5
LAST_DELAY_SECONDS = 30.0
LOOK_SECONDS = 1.0
"""Time between two questions whether a process may be started."""
STOP_SECONDS = 40.0
"""How long a process may take to save its last checkpoint before it is killed."""
END_LOOK_SECONDS = 0.05
SHOWN_BYTES = 2000
OF_ONE_PROCESS = frozenset(
    {"data_dir", "socket", "consumer", "shard", "replica", "advertise", "listen", "sql_listen"}
)
"""Settings that differ between the shards: the keeper gives them."""


@dataclass(frozen=True, slots=True)
class Place:
    """A replica of a shard, with the settings that all shards have in common."""

    shard: Shard
    replica: str = ""
    settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Variables of the environment. They contain secrets."""
    data_dir: Path | None = None
    """Directory of the shards' directories; None: the one of the machine."""
    over_tcp: bool = True
    """Whether it listens on its machine's address; else only on its socket."""

    @property
    def name(self) -> str:
        """The consumer's name."""
        return name_of_shard(self.shard, self.replica)

    @property
    def digest(self) -> str:
        """A word that differs if the settings differ."""
        what = [sorted(self.settings.items()), str(self.data_dir), self.over_tcp]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Kept:
    """The state of a shard's process. ``pid`` is None while none runs."""

    name: str
    host: str
    pid: int | None
    failures: int
    """Ends in a row, each soon after its start."""
    error: str
    """Why it ended last; empty if it never did."""
    log: str
    digest: str


class Running(Protocol):
    """A process that runs."""

    pid: int

    def wait(self) -> object:
        """Return when it has ended."""


class Adopted:
    """A process that another keeper started: it holds the lock of the data directory."""

    def __init__(self, lock: int, pid: int) -> None:
        self.lock = lock
        self.pid = pid

    def wait(self) -> None:
        """Return when the process has ended: then the kernel frees its lock."""
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        os.close(self.lock)


def adopt(data_dir: Path) -> Adopted | None:
    """The process that runs in the data directory; None if none does."""
    try:
        lock = os.open(data_dir / LOCK_FILE, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(lock, 20, 0).decode(errors="replace").strip()
        if pid.isdigit() and is_syncd(int(pid)):
            return Adopted(lock, int(pid))
    os.close(lock)
    return None


def is_syncd(pid: int) -> bool:
    """Whether the process is a syncd of this machine: other machines may have the directory too."""
    try:
        return b"syncd" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def end(data_dir: Path, seconds: float) -> bool:
    """End the process that runs in the data directory, if one does. False if it does not end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        found = adopt(data_dir)
        if found is None:
            return True
        os.close(found.lock)
        with contextlib.suppress(ProcessLookupError):
            os.kill(found.pid, number)
        until = time.monotonic() + seconds
        while is_locked(data_dir) and time.monotonic() < until:
            time.sleep(END_LOOK_SECONDS)
    return not is_locked(data_dir)


def is_locked(data_dir: Path) -> bool:
    """Whether a process runs in the data directory."""
    found = adopt(data_dir)
    if found is not None:
        os.close(found.lock)
    return found is not None


class Keeper:
    """Keeps one shard's process running, in a thread.

    ``inherited`` is the machine's environment. No process is started while ``may_start`` is false.
    """

    def __init__(
        self,
        place: Place,
        host: str,
        inherited: Mapping[str, str],
        may_start: Callable[[], bool] = lambda: True,
    ) -> None:
        self.place = place
        self.host = host
        self.may_start = may_start
        base = place.data_dir or inherited.get("SYNCD_DATA_DIR") or default_data_dir()
        self.data_dir = Path(base).absolute() / place.name
        left_out = {f"SYNCD_{name.upper()}" for name in OF_ONE_PROCESS}
        kept = {name: value for name, value in inherited.items() if name not in left_out}
        self.environment = kept | {
            **place.settings,
            "SYNCD_DATA_DIR": str(self.data_dir),
            "SYNCD_CONSUMER": place.name,
        }
        self.failures = 0
        self.error = ""
        self._running: Running | None = None
        self._stopping = threading.Event()
        self._change = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name=place.name, daemon=True)

    def start(self) -> None:
        """Start to keep it."""
        self._thread.start()

    @property
    def log(self) -> Path:
        """The log of the process."""
        return self.data_dir / LOG_FILE

    def kept(self) -> Kept:
        """The present state."""
        running = self._running
        return Kept(
            self.place.name,
            self.host,
            None if running is None else running.pid,
            self.failures,
            self.error,
            str(self.log),
            self.place.digest,
        )

    def stop(self) -> None:
        """End the process and do not start it again; it saves a checkpoint first."""
        with self._change:
            self._stopping.set()
        self._signal(signal.SIGTERM)
        self._thread.join(STOP_SECONDS)
        if self._thread.is_alive():
            self._signal(signal.SIGKILL)
            self._thread.join(STOP_SECONDS)

    def _signal(self, number: signal.Signals) -> None:
        running = self._running
        if running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.pid, number)

    @property
    def command(self) -> list[str]:
        """The command line; with ``-P`` the current directory's packages are not used."""
        command = [sys.executable, "-P", "-m", "syncd.cli.main", "serve"]
        command += ["--shard", self.place.shard.name]
        if self.place.replica:
            command += ["--replica", self.place.replica]
        if self.place.over_tcp:
            command += ["--listen", join_host_port(self.host, 0)]
        return command

    def _keep(self) -> None:
        while not self._stopping.is_set():
            begun = time.monotonic()
            try:
                ended = self._run()
            except OSError as error:
                ended = f"{error.filename or self.data_dir}: {error.strerror}"
            except Exception as error:  # noqa: BLE001 - whatever it is, the shard is tried again
                ended = f"{type(error).__name__}: {error}"
            if ended is None:
                self._stopping.wait(LOOK_SECONDS)
                continue
            self.error = ended
            steady = time.monotonic() - begun >= STEADY_SECONDS
            self.failures = 0 if steady else self.failures + 1
            if self.failures > 1:
                delay = FIRST_DELAY_SECONDS * 2 ** min(self.failures - 2, 16)
                self._stopping.wait(min(delay, LAST_DELAY_SECONDS))

    def _run(self) -> str | None:
        """Run the process until it ends; why it did. None if it may not be started."""
        with self._change:
            if self._stopping.is_set():
                return None
            found = adopt(self.data_dir)
            self._running = found
        if found is None:
            if not self.may_start():
                return None
            with self._change:
                if self._stopping.is_set():
                    return None
                self._running = self._spawn()
        running, size = self._running, self._log_size()
        assert running is not None
        try:
            status = running.wait()
        finally:
            self._running = None
        ended = "it ended" if status is None else f"it ended with status {status}"
        return self._last_words(size) or ended

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
        with self.log.open("ab") as log:
            return subprocess.Popen(  # noqa: S603 - this program
                self.command,
                env=self.environment,
                cwd=self.data_dir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # signals to the keeper's group do not reach it
            )

    def _log_size(self) -> int:
        with contextlib.suppress(OSError):
            return self.log.stat().st_size
        return 0

    def _last_words(self, since: int) -> str:
        """The error that the process has written to its log, with the next step."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(since, self._log_size() - SHOWN_BYTES))
                words = log.read().decode("utf-8", "replace")
        except OSError:
            return ""
        _, found, error = words.rpartition("error: ")
        return error.strip() if found else ""
