"""The sockets that the server listens on: Unix and TCP.

Invariants: a Unix socket file is never accessible beyond its mode, and it never replaces the socket
of a running server.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import stat
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from syncd.errors import AddressInUse, SettingsError
from syncd.host_port import split_host_port

SOCKET_MODE = 0o660
LISTEN_BACKLOG = 1024
MAX_PATH_BYTES = 107 if sys.platform == "linux" else 103
"""Bytes of a socket's path: ``sun_path`` holds this many and a NUL (unix(7))."""


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """A bound socket and the identity of its file."""

    socket: socket.socket
    path: Path
    identity: tuple[int, int]

    def remove(self) -> None:
        """Remove the file, unless another server has created its own there since."""
        with suppress(FileNotFoundError):
            if _identity(self.path) == self.identity:
                self.path.unlink()


def bind_unix(path: Path) -> UnixSocket:
    """Bind a Unix socket of mode 0660, and replace one that a killed server left.

    Raises ``SettingsError``.
    """
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        raise SettingsError(
            f"the socket's path has {length} bytes, at most {MAX_PATH_BYTES} are possible: {path}",
            hint="set SYNCD_SOCKET to a shorter path",
        )
    _remove_stale(path)
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        unix.setblocking(False)
        # Linux creates the file with the descriptor's mode, less the umask: never wider than 0660
        with suppress(OSError):
            os.fchmod(unix.fileno(), SOCKET_MODE)
        unix.bind(str(path))
        path.chmod(SOCKET_MODE)
        return UnixSocket(unix, path, _identity(path))
    except OSError as error:
        unix.close()
        raise SettingsError(
            f"cannot make the socket {path}: {error.strerror}",
            hint="set SYNCD_SOCKET to a path that syncd may write",
        ) from error


def bind_tcp(listen: str, setting: str = "SYNCD_LISTEN") -> list[socket.socket]:
    """Bind ``host:port`` on each of the host's addresses; port 0 takes any free port.

    Raises ``AddressInUse``, or ``SettingsError`` for an address that this machine does not have.
    """
    host, port = split_host_port(listen)
    bound: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        ):
            tcp = socket.socket(family, kind, protocol)
            bound.append(tcp)
            tcp.setblocking(False)
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                tcp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            tcp.bind(address)
            tcp.listen(LISTEN_BACKLOG)
    except OSError as error:
        for tcp in bound:
            tcp.close()
        kind_of_error = AddressInUse if error.errno == errno.EADDRINUSE else SettingsError
        raise kind_of_error(
            f"cannot listen on {listen}: {error.strerror}",
            hint=f"set {setting} to a free host:port, or to off",
        ) from error
    return bound


def server_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS 1.2 or later with this certificate chain and key, both PEM; raises ``SettingsError``."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # With an empty password an encrypted key is an error. Without one OpenSSL would ask for it
        # on the terminal.
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise SettingsError(
            f"the certificate {certificate} cannot be used with the key {key}: "
            f"{error.strerror if isinstance(error, OSError) else error}",
            hint="SYNCD_TLS_CERT and SYNCD_TLS_KEY name a PEM chain and its unencrypted PEM key, "
            "readable by syncd",
        ) from error
    return context


def _remove_stale(path: Path) -> None:
    """Remove a socket file that no process listens on.

    Raises ``SettingsError`` for a socket in use, and for any other file.
    """
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise SettingsError(
                f"{path} exists and is not a socket",
                hint="remove it, or set SYNCD_SOCKET to another path",
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(str(path))
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno == errno.ECONNREFUSED:
            path.unlink(missing_ok=True)
            return
        if error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK):  # these mean: its queue is full
            raise SettingsError(
                f"cannot use the socket {path}: {error.strerror}",
                hint="set SYNCD_SOCKET to a path that syncd may write",
            ) from error
    raise SettingsError(
        f"another syncd answers on {path}", hint="stop it, or set SYNCD_SOCKET to another path"
    )


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
