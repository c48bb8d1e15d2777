"""PostgreSQL servers for tests, in temporary folders.

They are gone when the tests end or are interrupted.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import shutil
import signal
import socket
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from syncd.errors import EmbeddedUnavailable
from syncd.postgres.embedded.account import server_account
from syncd.postgres.embedded.cluster import PORT, Cluster
from syncd.postgres.embedded.programs import binaries

Version = Literal[14, 15, 16, 17, 18]
StopMode = Literal["smart", "fast", "immediate"]

EMBEDDED: tuple[Version, ...] = (16, 18)
"""Versions in the wheel, with pgvector."""
EXPECTED: tuple[Version, ...] = (15, *EMBEDDED)
"""Versions that every run tests or skips. Other versions are tested only if installed."""
PLACES = [
    *filter(None, os.environ.get("TEST_POSTGRES", "").split(os.pathsep)),
    "/usr/lib/postgresql",
]
"""Folders with a folder per version, as in Debian: ``15/bin/postgres``."""
MEMORY = Path("/dev/shm")  # noqa: S108  a folder of a server's own is made in it
MEMORY_BYTES = 4 << 30
PORTS = range(15_000, 30_000)
"""Ports below those that the system chooses: a server that is down finds its own again."""
SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


def bindir(version: Version) -> Path:
    """The programs of a version. ``FileNotFoundError`` if it is missing."""
    if version in EMBEDDED:
        return binaries(version)
    for place in PLACES:
        folder = Path(place) / str(version) / "bin"
        if (folder / "postgres").exists():
            return folder
    raise FileNotFoundError(
        f"PostgreSQL {version} is not installed: apt-get install postgresql-{version}"
    )


def available(version: Version) -> bool:
    try:
        bindir(version)
    except (FileNotFoundError, EmbeddedUnavailable):
        return False
    return True


def quick_folder() -> Path | None:
    """A folder in memory if there is plenty of it, else None.

    Tests make and drop thousands of databases. ext4 does not reuse inodes that were just freed, so
    a database takes 200 ms there instead of 20.
    """
    with contextlib.suppress(OSError):
        if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > MEMORY_BYTES:
            return MEMORY
    return None


VERSIONS: tuple[Version, ...] = tuple(
    version for version in get_args(Version) if version in EXPECTED or available(version)
)


def fetch(conninfo: str, query: str) -> Any:
    """The first value that a statement returns, or None."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        cursor = connection.execute(query)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


class PostgresServer:
    """One server of one version. ``directory`` gets its log, which stays.

    The cluster's folder is directly in ``quick_folder`` or the system's temporary folder. The
    socket's path must be short. PostgreSQL 15 also enters the folder by its path, which fails in
    pytest's folders (mode 0700) if root runs the tests.

    ``settings`` are read at each start. ``programs`` is a folder of other programs of this version.
    ``fsync=True`` protects from power cuts, which no test can cause.
    """

    def __init__(
        self,
        version: Version,
        directory: Path | None = None,
        *,
        tcp: bool = False,
        port: int | None = None,
        fsync: bool = False,
        settings: Mapping[str, str] | None = None,
        programs: Path | None = None,
    ) -> None:
        self.version = version
        self.bindir = programs or bindir(version)
        self.folder = Path(tempfile.mkdtemp(prefix=f"syncd-pg{version}-", dir=quick_folder()))
        atexit.register(self.remove)
        account = server_account(self.folder)
        if account is not None:
            os.chown(self.folder, account.uid, account.gid)
        self.tcp = tcp
        self.port = (port or free_port()) if tcp else PORT
        log = (directory or self.folder) / f"postgres{version}-{self.folder.name[-8:]}.log"
        self._cluster = Cluster(self.folder / "cluster", self.bindir, log, {}, port=self.port)
        self._fsync = fsync
        self.settings = self._cluster.settings
        self.settings.update(
            {
                "listen_addresses": "127.0.0.1" if tcp else "",
                "fsync": "on" if fsync else "off",
                "shared_buffers": "32MB",
                "max_connections": "100",
                "autovacuum": "off",  # it takes locks and transaction ids that tests count
                "log_line_prefix": "%m [%p] %q%a ",
                **(settings or {}),
            }
        )

    @property
    def log(self) -> Path:
        return self._cluster.log

    @property
    def running(self) -> bool:
        return self._cluster.pid is not None

    @property
    def pid(self) -> int | None:
        """The postmaster's process id."""
        return self._cluster.pid

    def start(self) -> Self:
        """Start, and make the cluster the first time. Returns when connections are accepted.

        This also holds after a crash.
        """
        if not self._cluster.directory.exists():
            self.create()
        self._cluster.start()
        return self

    def create(self, *options: str) -> None:
        """Make the cluster with these options of initdb; ``start`` makes it without options."""
        self._cluster.create(*(() if self._fsync else ("--no-sync",)), *options)

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop, and wait until the last process is gone. ``smart`` waits for clients to leave."""
        self._cluster.stop(SIGNALS[mode])

    def crash(self) -> None:
        """Stop as ``pg_ctl stop -m immediate`` does.

        There is no checkpoint, clients are cut off, and the next start recovers.
        """
        self._cluster.stop(signal.SIGQUIT)

    def kill(self) -> None:
        """Send SIGKILL to every process. Stale locks stay, and ``start`` accepts them."""
        self._cluster.kill()

    def restart(self, mode: StopMode = "fast") -> None:
        self.stop(mode)
        self.start()

    def wait_ready(self) -> None:
        """Return when the server accepts connections. An error if it is gone, or after a minute."""
        if not self._cluster.wait_ready():
            raise EmbeddedUnavailable(
                f"PostgreSQL {self.version} is not running", hint=f"read {self.log}"
            )

    def conninfo(
        self, dbname: str = "postgres", user: str = "postgres", *, tcp: bool = False, **options: Any
    ) -> str:
        """Connection string of a database: the Unix socket, or 127.0.0.1 with ``tcp=True``."""
        if tcp:
            assert self.tcp, "make the server with tcp=True"
            options = {"host": "127.0.0.1"} | options
        return make_conninfo(self._cluster.conninfo(dbname, user), **options)

    def execute(
        self, query: str | sql.Composed, dbname: str = "postgres", **options: Any
    ) -> list[tuple[Any, ...]]:
        """Run SQL on a connection of its own, and return the last statement's rows.

        Without parameters it can have many statements.
        """
        statement = query if isinstance(query, sql.Composed) else sql.SQL(query)
        with psycopg.connect(self.conninfo(dbname, **options), autocommit=True) as connection:
            cursor = connection.execute(statement)
            while cursor.nextset():
                pass
            return cursor.fetchall() if cursor.description else []

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database, as a clone of ``template`` if given, and return its conninfo."""
        source = (
            sql.SQL(" TEMPLATE {}").format(sql.Identifier(template)) if template else sql.SQL("")
        )
        self.execute(sql.SQL("CREATE DATABASE {}{}").format(sql.Identifier(name), source))
        return self.conninfo(name)

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, and cut off its clients."""
        self.execute(
            sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
        )

    def processes(self) -> Sequence[int]:
        return self._cluster.processes()

    def remove(self) -> None:
        """Stop the server and delete its cluster; also called at exit."""
        atexit.unregister(self.remove)
        with contextlib.suppress(EmbeddedUnavailable):
            self._cluster.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def free_port() -> int:
    """A TCP port that nothing uses now, and that the system gives to no connection meanwhile."""
    while True:
        port = secrets.choice(PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
