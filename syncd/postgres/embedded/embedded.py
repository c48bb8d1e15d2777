"""The embedded PostgreSQL of one data directory, for ``--embedded`` and ``syncd quickstart``.

The invariants: ``<data dir>/postgres`` is a complete cluster or does not exist. At most one server
runs on it. A server outlives its starter, and stops with the last command that needs it. A cluster
is created under another name and then renamed; a file lock protects each start and stop.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from syncd.errors import DataDirectoryError, EmbeddedUnavailable
from syncd.postgres.embedded.cluster import Cluster
from syncd.postgres.embedded.programs import VERSION, binaries

__all__ = ["EmbeddedPostgres", "EmbeddedUnavailable", "binaries"]

logger = structlog.get_logger(__name__)


class EmbeddedPostgres:
    """The PostgreSQL of one data directory; as a context manager it leaves it as it found it.

    A server that this object started stops at the end of the block. If other commands use it by
    then, the last of them stops it. A server that ran without any user was left so on purpose: it
    stays. ``settings`` are for a server that this object starts.
    """

    def __init__(self, data_dir: Path, settings: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir.absolute()
        self.settings = {"listen_addresses": ""} | dict(settings or {})
        self.started = (
            False  # whether the last start() started the server, and did not find it running
        )
        # Each user of a server that stops with its last user holds this lock, shared.
        self._user: _Lock | None = None

    @property
    def running(self) -> bool:
        """Whether a server runs on this data directory, from any starter."""
        return (self.data_dir / "postgres").exists() and self._cluster().pid is not None

    @property
    def log(self) -> Path:
        """Path of the server's log."""
        return self.data_dir / "postgres.log"

    def start(self) -> str:
        """Return the conninfo of a server that accepts connections.

        It starts a server if none runs, and creates the cluster if there is none.
        """
        programs = binaries()
        with self._lock():
            cluster = self._cluster(programs)
            self._create(cluster)
            user = _Lock(self.data_dir / "postgres.users")
            # Another command uses the server that it started.
            shared = not user.take(fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.started = cluster.start()
            if (self.started or shared) and self._user is None:
                user.take(fcntl.LOCK_SH)
                self._user = user
        if self.started:
            logger.info(
                "embedded_postgres_started", directory=str(cluster.directory), log=str(self.log)
            )
        return cluster.conninfo()

    def stop(self) -> None:
        """Stop the server, from any starter and with any users; does nothing if none runs."""
        if not self.data_dir.exists():
            return
        with self._lock():
            self._release()
            self._cluster().stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
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
        """Connection string of the server."""
        return self._cluster().conninfo()

    def _cluster(self, programs: Path | None = None) -> Cluster:
        return Cluster(self.data_dir / "postgres", programs or Path(), self.log, self.settings)

    def _release(self) -> None:
        if self._user is not None:
            self._user.close()
            self._user = None

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One process at a time creates, starts or stops the server.

        The kernel releases a dead process's lock.
        """
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            lock = _Lock(self.data_dir / "postgres.lock")
        except OSError as error:
            raise DataDirectoryError(
                f"cannot write to {self.data_dir}: {error.strerror}",
                hint="choose another one with: --data-dir DIR",
            ) from error
        with contextlib.closing(lock):
            lock.take(fcntl.LOCK_EX)
            yield

    def _create(self, cluster: Cluster) -> None:
        """Create the cluster if there is none; otherwise check that it has our version."""
        try:
            version = (cluster.directory / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            if cluster.directory.is_dir() and any(cluster.directory.iterdir()):
                raise EmbeddedUnavailable(
                    f"{cluster.directory} is not empty and is not a PostgreSQL cluster",
                    hint="move it away, or choose another data directory with: --data-dir DIR",
                ) from None
        except PermissionError as error:
            owner = cluster.directory.lstat().st_uid
            raise EmbeddedUnavailable(
                f"{cluster.directory} belongs to the user with id {owner}",
                hint="run the command as that user or as root, "
                "or choose another data directory with: --data-dir DIR",
            ) from error
        else:
            if version != str(VERSION):
                raise EmbeddedUnavailable(
                    f"{cluster.directory} was made by PostgreSQL {version}, "
                    f"the embedded one is {VERSION}",
                    hint=f"move it away, or dump it with PostgreSQL {version} and restore it",
                )
            return
        new = self.data_dir / "postgres.new"
        shutil.rmtree(new, ignore_errors=True)  # from a process that died at this point
        Cluster(new, cluster.bindir, self.log, {}).create(
            "--locale-provider=builtin", "--builtin-locale=C.UTF-8"
        )
        new.rename(cluster.directory)
        folder = os.open(self.data_dir, os.O_RDONLY)
        try:
            # Otherwise a power failure could undo the rename, and lose later commits with it.
            os.fsync(folder)
        finally:
            os.close(folder)


class _Lock:
    """A file lock. Closing it, its garbage collection and the process's death release it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.close = weakref.finalize(self, os.close, self._file)

    def take(self, how: int) -> bool:
        """Call ``fcntl.flock``; False if ``how`` has LOCK_NB and another process holds the lock."""
        try:
            fcntl.flock(self._file, how)
        except BlockingIOError:
            return False
        return True
