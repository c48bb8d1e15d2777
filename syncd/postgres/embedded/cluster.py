"""One PostgreSQL data directory and its server: any process may create, start, find and stop it.

The server holds none of its starter's files open. How it runs, and how a process finds it:

* Its working directory is the cluster, entered before root's rights are dropped. Its options are
  ``-D /proc/self/cwd`` and a socket directory of ``.``. So it never looks up its cluster by path.
  The cluster may be below a directory that only root may enter (root's home, a volume of mode
  0700). No permission of a foreign directory is changed. The data stays in the data directory,
  which is backed up and mounted. Start, parallel workers, recovery after a crash and shutdown need
  no other path.
* Each process of a server has the cluster's device and inode in its command line, as
  ``cluster_name``. The command line is readable even if ``/proc/<pid>/cwd`` is not (root in a
  container has no right to trace). It is empty for a zombie, and no process id reused after a
  reboot has it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psycopg
import structlog
from psycopg.conninfo import make_conninfo

from syncd.errors import EmbeddedUnavailable
from syncd.postgres.embedded.account import as_account, server_account
from syncd.postgres.embedded.programs import reachable

PORT = 5432
"""Part of the socket's name; the server does not listen on TCP."""
READY_SECONDS = 60.0
STOP_SECONDS = 60.0
INITDB_SECONDS = 120.0
POLL_SECONDS = 0.02
LAST_LINES = 10
LOG_BYTES = 8 << 20
"""A larger log is renamed at the next start."""
SOCKET_PATH_BYTES = 103
"""Length of a socket's path, at most: ``sockaddr_un`` holds 107 bytes on Linux, 103 on macOS."""
WORKING_DIRECTORY = Path("/proc/self/cwd")

logger = structlog.get_logger(__name__)


class Cluster:
    """One PostgreSQL data directory and its server. Its caller prevents two starts at once."""

    def __init__(
        self,
        directory: Path,
        bindir: Path,
        log: Path,
        settings: Mapping[str, str],
        *,
        port: int = PORT,
    ) -> None:
        self.directory = directory
        self.bindir = bindir
        self.log = log
        self.settings = dict(settings)
        self.port = port
        self._child: int | None = None  # the postmaster, if this object started it

    def conninfo(self, dbname: str = "postgres", user: str = "postgres") -> str:
        """Connection string of the server, through its Unix socket."""
        host = _short_path(self.directory, f".s.PGSQL.{self.port}")
        return make_conninfo(host=host, port=self.port, dbname=dbname, user=user)

    def create(self, *options: str) -> None:
        """Run initdb: UTF8, C locale, superuser ``postgres``, each client of the socket trusted."""
        account = server_account(self.directory)
        self.directory.mkdir(mode=0o700, parents=True)
        if account is not None:
            os.chown(self.directory, account.uid, account.gid)
        common = (
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-instructions",
        )
        bindir = reachable(self.bindir, account)
        try:
            done = subprocess.run(  # noqa: S603
                [bindir / "initdb", "-D", self._named, *common, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=INITDB_SECONDS,
                check=False,
                **as_account(account, self.directory),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EmbeddedUnavailable(f"initdb failed in {self.directory}: {error}") from error
        if done.returncode != 0:
            raise EmbeddedUnavailable(
                f"initdb failed in {self.directory}:\n{_last_lines(done.stdout)}",
                hint="fix the problem in the last lines, and run the command again",
            )

    def start(self) -> bool:
        """Return when the server accepts connections: True if this call started it."""
        if self.pid is not None and self.wait_ready(self._log_size()):
            return False
        self._end_orphans()
        account = server_account(self.directory)
        settings = {
            "unix_socket_directories": ".",
            "port": str(self.port),
            "cluster_name": self._mark,
        } | self.settings
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        if self._log_size() > LOG_BYTES:
            self.log.replace(self.log.with_name(self.log.name + ".1"))
        begin = self._log_size()
        argv = [str(reachable(self.bindir, account) / "postgres"), "-D", str(self._named), *options]
        with os.fdopen(
            os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab"
        ) as log:
            try:
                child = subprocess.Popen(  # noqa: S603
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C stops the command, not its server
                    **as_account(account, self.directory, self._disown_stale_locks()),
                )
            except OSError as error:
                raise EmbeddedUnavailable(f"cannot run {argv[0]}: {error.strerror}") from error
        self._child = child.pid
        # The server may outlive us. ``pid`` reaps it, and Popen does not warn that it still runs.
        child.returncode = 0
        if not self.wait_ready(begin):
            raise EmbeddedUnavailable(
                "PostgreSQL did not start in "
                f"{self.directory}:\n{_last_lines(self._log_from(begin))}",
                hint=f"the whole log is in {self.log}",
            )
        return True

    def wait_ready(self, log_begin: int = 0) -> bool:
        """Wait until the server accepts a connection; False if no server runs any more."""
        deadline, pause = time.monotonic() + READY_SECONDS, POLL_SECONDS
        while True:
            try:
                psycopg.connect(self.conninfo(), connect_timeout=2).close()
                return True
            except psycopg.OperationalError as error:
                if self.pid is None:
                    return False
                if time.monotonic() > deadline:
                    # It may be replaying a long log after a crash: a kill would make it begin
                    # again.
                    raise EmbeddedUnavailable(
                        f"PostgreSQL in {self.directory} does not accept connections "
                        f"after {READY_SECONDS:.0f} s: {error}\n"
                        f"{_last_lines(self._log_from(log_begin))}",
                        hint=f"it is still running: follow {self.log}, and run the command again",
                    ) from error
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)  # while it recovers, it logs each refused connection

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server; return when its last process is gone.

        SIGINT is a clean stop. After SIGQUIT the next start recovers.
        """
        pid = self.pid
        if pid is None:
            return
        _signal([pid], how)
        if not self._wait_until(lambda: self.pid is None and not self.processes()):
            logger.warning(
                "postgres_stop_slow", directory=str(self.directory), seconds=STOP_SECONDS
            )
            # Commits are in the log, and the next start recovers them.
            _signal([pid], signal.SIGQUIT)
            if not self._wait_until(lambda: self.pid is None and not self.processes()):
                raise EmbeddedUnavailable(
                    f"PostgreSQL in {self.directory} does not stop",
                    hint=f"look at process {pid} and at {self.log}",
                )

    def kill(self) -> None:
        """Kill all processes of the server, as the kernel does if memory is exhausted.

        The next start recovers.
        """
        pid = self.pid
        if pid is not None:
            _signal([pid], signal.SIGKILL)  # first, or it would start others
        self._end_orphans(signal.SIGKILL)

    @property
    def pid(self) -> int | None:
        """Id of the server's first process; None if no server runs."""
        if self._child is not None:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self._child, os.WNOHANG)[0] == 0:
                    return self._child
            self._child = None
        pid = _read_pid(self.directory / "postmaster.pid")
        return pid if pid in self.processes() else None

    def processes(self) -> list[int]:
        """Ids of the server's processes, found by their mark and their user, without zombies."""
        if not WORKING_DIRECTORY.exists():  # without /proc only the first process can be found
            pid = _read_pid(self.directory / "postmaster.pid")
            return [pid] if pid is not None and _exists(pid) else []
        if not self.directory.exists():
            return []
        option, title = f"cluster_name={self._mark}".encode(), f"postgres: {self._mark}: ".encode()
        owner, found = self.directory.stat().st_uid, []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # the process has ended
                    command = (entry / "cmdline").read_bytes()
                    if entry.stat().st_uid == owner and (
                        option in command.split(b"\0") or command.startswith(title)
                    ):
                        found.append(int(entry.name))
        return found

    @property
    def _mark(self) -> str:
        status = self.directory.stat()
        return f"syncd-{status.st_dev:x}-{status.st_ino:x}"

    @property
    def _named(self) -> Path:
        return WORKING_DIRECTORY if WORKING_DIRECTORY.exists() else self.directory

    def _end_orphans(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """End the processes that a killed server left.

        A backend continues its query, and PostgreSQL does not start while it runs.
        """

        def gone() -> bool:
            _signal(self.processes(), how)
            return self.pid is None and not self.processes()

        if not self._wait_until(gone):
            raise EmbeddedUnavailable(
                f"processes of an earlier PostgreSQL in {self.directory} do not end: "
                f"{self.processes()}",
                hint="kill them, and run the command again",
            )

    def _disown_stale_locks(self) -> dict[str, str]:
        """Mark a killed server's locks as stale for PostgreSQL, even if a process has their id.

        That process may be a zombie, or the id may have been reused. The process id in
        PG_GRANDPARENT_PID never counts as a lock's owner (``CreateLockFile``, for pg_ctl). Removing
        postmaster.pid would also remove PostgreSQL's other guard, the shared memory block that it
        names.
        """
        (self.directory / f".s.PGSQL.{self.port}.lock").unlink(missing_ok=True)
        lock = self.directory / "postmaster.pid"
        pid = _read_pid(lock)
        if pid is None:
            # After a power failure the file may be empty, and PostgreSQL refuses that.
            lock.unlink(missing_ok=True)
            return {}
        return {"PG_GRANDPARENT_PID": str(pid)}

    def _wait_until(self, done: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + STOP_SECONDS
        while not done():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _log_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _log_from(self, begin: int) -> bytes:
        if not self.log.exists():  # a user has removed it
            return b""
        with self.log.open("rb") as log:
            log.seek(max(begin, self._log_size() - 10_000))
            return log.read()


def _short_path(directory: Path, socket: str) -> str:
    """Path of the directory for libpq's ``host``: short enough for the socket, without a comma.

    libpq takes a host with a comma as a list of hosts.
    """
    if len(os.fsencode(directory / socket)) <= SOCKET_PATH_BYTES and "," not in str(directory):
        return str(directory)
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    parents = (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")  # noqa: S108
    for parent in filter(None, parents):
        link = Path(parent) / f"syncd-{os.geteuid()}" / name
        if len(os.fsencode(link / socket)) > SOCKET_PATH_BYTES or not Path(parent).is_dir():
            continue
        link.parent.mkdir(mode=0o700, exist_ok=True)
        status = link.parent.lstat()
        if (
            not stat.S_ISDIR(status.st_mode)
            or status.st_uid != os.geteuid()
            or status.st_mode & 0o077
        ):
            continue  # another user's directory: that user could lead us to another server
        if not link.is_symlink() or link.readlink() != directory:
            part = link.with_name(f"{name}.{os.getpid()}")
            part.unlink(missing_ok=True)
            part.symlink_to(directory)
            part.replace(link)
        return str(link)
    raise EmbeddedUnavailable(
        f"the path {directory} is too long for a Unix socket",
        hint="choose a shorter one with: --data-dir DIR",
    )


def _read_pid(path: Path) -> int | None:
    try:
        return int(path.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _signal(pids: Sequence[int], how: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)


def _last_lines(output: bytes) -> str:
    return "\n".join(output.decode(errors="replace").splitlines()[-LAST_LINES:])
