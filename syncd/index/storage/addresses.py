"""One range of addresses for a column, in which each chunk has its place.

The range is reserved first: addresses without memory. Then parts of it get memory or become
mappings of files. So a row's number gives its address, and a column of many chunks is one array.

Invariant: the bytes that an array shows never change because of this module. A file takes the place
of memory only if it holds the same bytes, and the kernel replaces a mapping while every page fault
of the process waits (mmap(2), MAP_FIXED). The range lives as long as any array in it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncd.errors import DataDirectoryError
from syncd.index.storage.files import open_saved

_MAP_FIXED = 0x10
"""Not in Python's ``mmap``; the value on Linux."""

_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class AddressRange:
    """A reserved range of ``size`` bytes. Raises ``OSError`` if the system refuses it.

    A reservation takes no memory, and no part of what the system may commit. Starts and sizes of
    parts are multiples of ``mmap.PAGESIZE``.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        # Its destructor unmaps the whole range, whatever parts of it have become.
        self._reservation = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
        whole = np.frombuffer(self._reservation, dtype=np.uint8)
        self._address: int = whole.__array_interface__["data"][0]

    def show(self, start: int, size: int, *, writable: bool = False) -> NDArray[np.uint8]:
        """The bytes of a part, (size,) uint8. They may be read once they have memory or a file."""
        return np.asarray(_Part(self._reservation, self._address + start, size, writable))

    def allocate(self, start: int, size: int) -> NDArray[np.uint8]:
        """Give a part memory, of zeros; returns its bytes. Raises ``MemoryError``."""
        wanted = mmap.PROT_READ | mmap.PROT_WRITE
        if _libc.mprotect(self._address + start, size, wanted):
            raise MemoryError(f"cannot allocate {size} bytes: {os.strerror(ctypes.get_errno())}")
        return self.show(start, size, writable=True)

    def map_file(self, path: Path, start: int, size: int) -> NDArray[np.uint8]:
        """Make a part the read-only mapping of a file's first ``size`` bytes; returns them.

        Raises ``DamagedFile`` if the file is missing or shorter, and ``DataDirectoryError`` if it
        cannot be mapped.
        """
        with open_saved(path, size) as descriptor:
            # The kernel removes what was there before it asks the file system. So a file that
            # cannot be mapped must fail here, while the range is whole.
            mmap.mmap(descriptor, mmap.PAGESIZE, access=mmap.ACCESS_READ).close()
            return self.map_shared(descriptor, 0, start, size, str(path))

    def map_shared(
        self, descriptor: int, offset: int, start: int, size: int, name: str
    ) -> NDArray[np.uint8]:
        """Make a part the read-only mapping of ``size`` bytes at ``offset``; returns them.

        ``name`` is for messages. Raises ``DataDirectoryError`` if they cannot be mapped.
        """
        address, flags = self._address + start, mmap.MAP_SHARED | _MAP_FIXED
        mapped = _libc.mmap(address, size, mmap.PROT_READ, flags, descriptor, offset)
        if mapped == _FAILED:
            raise DataDirectoryError(
                f"cannot map {name}: {os.strerror(ctypes.get_errno())}",
                hint="raise vm.max_map_count: sysctl vm.max_map_count",
            )
        return self.show(start, size)


class _Part:
    """Part of a range in numpy's array interface; the array made from it keeps the range."""

    def __init__(self, owner: object, address: int, size: int, writable: bool) -> None:
        self.owner = owner
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "data": (address, not writable),
            "shape": (size,),
            "typestr": "|u1",
        }
