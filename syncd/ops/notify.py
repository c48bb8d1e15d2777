"""State of the service for systemd, as sd_notify(3) describes it.

Each state is a datagram to the socket that ``NOTIFY_SOCKET`` names.
"""

from __future__ import annotations

import os
import socket

import anyio


def notify(state: str) -> None:
    """Send ``READY=1``, ``STOPPING=1`` and so on; without ``NOTIFY_SOCKET`` it does nothing."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):  # an abstract socket
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as unix:
            unix.setblocking(False)
            unix.sendto(state.encode(), address)
    except OSError:
        return  # without a reader on the socket the service still serves


async def keep_watchdog() -> None:
    """Report that the event loop runs; return at once if the unit has no ``WatchdogSec``."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(
        os.getpid()
    ):
        return
    while True:
        notify("WATCHDOG=1")
        await anyio.sleep(int(microseconds) / 1e6 / 2)
