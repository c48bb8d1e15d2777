"""A TCP peer that has vanished: it acknowledges no packet and sends none."""

from __future__ import annotations

import ctypes
import socket
import struct
import sys

import pytest

SO_ATTACH_FILTER = 26
RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)
"""The classic BPF program ``ret 0``, which keeps no byte of any packet (``linux/filter.h``)."""

needs_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="packets are dropped by Linux's SO_ATTACH_FILTER"
)


def go_deaf(connection: socket.socket) -> None:
    """Let the system drop each segment that arrives, acknowledgements and probes too."""
    program = ctypes.create_string_buffer(RETURN_NOTHING)
    connection.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program))
    )
