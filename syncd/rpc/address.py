"""Where a client finds the service."""

from __future__ import annotations

import os
from dataclasses import dataclass

from syncd.rpc.sockets import split_host_port

TCP_SCHEME = "tcp://"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A socket file; whoever may open it may ask."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A host and a port, and the shared secret."""

    host: str
    port: int
    token: str

    def __str__(self) -> str:
        return f"{TCP_SCHEME}{self.host}:{self.port}"


def find_service(address: str | os.PathLike[str] | None, token: str | None) -> UnixAddress | TcpAddress:
    """A path or ``tcp://host:port``; None for the running service's own socket. Raises ``SettingsError``."""
    if address is None:
        from syncd.settings import service_socket  # its import takes longer than a thousand searches

        return UnixAddress(str(service_socket()))
    text = os.fspath(address)
    if not text.startswith(TCP_SCHEME):
        return UnixAddress(text)
    host, port = split_host_port(text.removeprefix(TCP_SCHEME).rstrip("/"))
    return TcpAddress(host, port, token or os.environ.get("SYNCD_TOKEN", ""))
