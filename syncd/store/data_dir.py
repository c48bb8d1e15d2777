"""The data directory: created, locked by one process, and checked for writing."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from syncd.errors import DataDirectoryError

LOCK_FILE = "consumer.lock"


@contextmanager
def locked_data_dir(path: Path) -> Iterator[Path]:
    """Hold the directory for this process.

    Raises ``DataDirectoryError`` if another process holds it or it cannot be written. The kernel
    holds the lock (``flock``), so it ends with the process, however that ends.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o750)
        lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise DataDirectoryError(
            f"the data directory {path} cannot be used: {error.strerror}",
            hint="set SYNCD_DATA_DIR to a directory that this user may write",
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(lock, 20, 0).decode(errors="replace").strip() or "unknown"
            raise DataDirectoryError(
                f"the data directory {path} is in use by another syncd (process {holder})",
                hint="stop that syncd, or set SYNCD_DATA_DIR and SYNCD_CONSUMER for a second one",
            ) from error
        try:
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise DataDirectoryError(
                f"the data directory {path} cannot be written: {error.strerror}",
                hint="free some space on its disk",
            ) from error
        yield path
    finally:
        os.close(lock)
