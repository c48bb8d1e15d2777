"""The address at which a client finds the service."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass, field

from syncd.errors import SettingsError
from syncd.host_port import join_host_port, split_host_port

TCP_SCHEME = "tcp://"
TLS_SCHEME = "tcps://"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket file. Every user that may open the file may send requests."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host, a port and the shared secret.

    With ``tls`` the connection is encrypted, and the service proves its name.
    """

    host: str
    port: int
    token: str = field(repr=False)
    tls: ssl.SSLContext | None = None

    def __str__(self) -> str:
        return (TLS_SCHEME if self.tls else TCP_SCHEME) + join_host_port(self.host, self.port)


def find_service(
    address: str | os.PathLike[str] | None, token: str | None, tls: ssl.SSLContext | None = None
) -> UnixAddress | TcpAddress:
    """Parse a path, ``tcp://host:port``, or ``tcps://host:port`` for TLS.

    None stands for the socket of the service on this machine. ``tls`` names the trusted
    authorities. Without it they are OpenSSL's: the system's, or those in ``SSL_CERT_FILE``.
    Raises ``SettingsError``.
    """
    if address is None:
        # imported here: this import takes longer than 1000 searches
        from syncd.settings import service_socket

        return UnixAddress(str(service_socket()))
    text = os.fspath(address)
    if not text.startswith((TCP_SCHEME, TLS_SCHEME)):
        return UnixAddress(text)
    scheme, _, rest = text.partition("://")
    host, port = split_host_port(rest.rstrip("/"))
    if f"{scheme}://" == TLS_SCHEME:
        tls = tls or ssl.create_default_context()
    elif tls is not None:
        raise SettingsError(
            f"{text} is not encrypted, but `tls` was given", hint=f"connect to {TLS_SCHEME}{rest}"
        )
    return TcpAddress(host, port, token or os.environ.get("SYNCD_TOKEN", ""), tls)
