"""TCP keep-alive: client and service both notice a vanished peer after one minute.

A host that lost its power or its network sends nothing. A NAT that forgot a connection sends
nothing either. Without probes an idle connection to such a peer stays open forever. A connection in
the middle of an answer stays open for 15 minutes (Linux's ``tcp_retries2``).
"""

from __future__ import annotations

import socket

IDLE_SECONDS = 30
"""Silence before the first probe.

Common NATs forget a connection after 60 s or more of silence, so the probes also keep it known
there.
"""
INTERVAL_SECONDS = 10
PROBES = 3
USER_TIMEOUT_SECONDS = 60
"""How long sent bytes may stay without acknowledgement.

On Linux this value also replaces the number of probes (tcp(7)). It counts as well while the peer's
program does not read. So a client that takes no byte of its answers for this long is disconnected.
"""


def keep_alive(connection: socket.socket) -> None:
    """Let the operating system end this TCP connection (``ETIMEDOUT``) if its peer vanishes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", IDLE_SECONDS),
        ("TCP_KEEPALIVE", IDLE_SECONDS),  # macOS's name of TCP_KEEPIDLE
        ("TCP_KEEPINTVL", INTERVAL_SECONDS),
        ("TCP_KEEPCNT", PROBES),
        ("TCP_USER_TIMEOUT", USER_TIMEOUT_SECONDS * 1000),
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
