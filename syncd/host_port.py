"""``host:port``, the form of addresses in settings and clients."""

from __future__ import annotations

from syncd.errors import SettingsError

MAX_PORT = 65_535


def split_host_port(address: str) -> tuple[str, int]:
    """The host and port of ``host:port`` or ``[host]:port``; raises ``SettingsError``."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit()) or int(port) > MAX_PORT:
        raise SettingsError(f"{address!r} is not host:port", hint="for example 127.0.0.1:7432")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_host_port(host: str, port: int) -> str:
    """``host:port``; an IPv6 address is in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
