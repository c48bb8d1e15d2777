"""Tells systemd how far the service is, as sd_notify(3) describes it: a datagram to the socket that ``NOTIFY_SOCKET`` names."""

from __future__ import annotations

import os
import socket

import anyio


def notify(state: str) -> None:
    """Say ``READY=1``, ``STOPPING=1`` and the like; nothing happens where nobody wants to know."""
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
        return  # that nobody listens any more is no reason to stop serving


async def keep_watchdog() -> None:
    """Where the unit has ``WatchdogSec``, say that the event loop runs; returns at once where it has none."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(
        os.getpid()
    ):
        return
    while True:
        notify("WATCHDOG=1")
        await anyio.sleep(int(microseconds) / 1e6 / 2)
