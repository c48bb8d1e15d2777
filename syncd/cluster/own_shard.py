"""The shard that a syncd is: its data directory, and the address at which it answers."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from syncd.client.address import TCP_SCHEME, TLS_SCHEME
from syncd.errors import DataDirectoryError
from syncd.host_port import join_host_port
from syncd.settings import Settings
from syncd.shard import WHOLE
from syncd.store.manifest import Manifest

ALL_ADDRESSES = frozenset({"0.0.0.0", "::"})  # noqa: S104 - recognised, not listened on
"""Hosts that stand for every address of the machine."""


def check_shard(settings: Settings, manifest: Manifest | None) -> None:
    """Raise ``DataDirectoryError`` if the data directory belongs to another shard."""
    shard = settings.own_shard or WHOLE
    if manifest is None or manifest.shard == str(shard):
        return
    has = f"shard {manifest.shard}" if manifest.shard != str(WHOLE) else "a syncd without --shard"
    flag = f"--shard {manifest.shard}" if manifest.shard != str(WHOLE) else "no --shard"
    wanted = f"shard {shard}" if settings.shard is not None else "a syncd without --shard"
    raise DataDirectoryError(
        f"the data directory {settings.data_dir} belongs to {has}, this is {wanted}",
        hint=f"start it with {flag}, or give this one an empty directory: SYNCD_DATA_DIR",
    )


def advertised(settings: Settings, listening: Sequence[tuple[str, int]]) -> str:
    """The address at which a router reaches this syncd: a client's address.

    It is the one that is set, else the one on which the RPC listens over TCP, with this machine's
    name in place of all addresses, else the path of the socket.
    """
    scheme = TCP_SCHEME if settings.tls is None else TLS_SCHEME
    if settings.advertise:
        return settings.advertise if "://" in settings.advertise else scheme + settings.advertise
    if not listening:
        return str(settings.socket_path)
    host, port = listening[0]
    named = socket.gethostname() if host in ALL_ADDRESSES else host
    return scheme + join_host_port(named, port)
