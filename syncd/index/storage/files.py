"""Bytes on disk: written at an offset, made durable, and read back whole or not at all.

An ``OSError`` becomes ``DataDirectoryError`` when writing. It becomes ``DamagedFile`` if a file
that a checkpoint names is missing. No file stays open: a dataset costs no descriptor except those
that its mappings keep.
"""

from __future__ import annotations

import mmap
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from syncd.errors import DamagedFile, DataDirectoryError


class SavedFile(msgspec.Struct, frozen=True):
    """A file as a checkpoint records it: its first ``bytes`` bytes have the checksum ``crc32``."""

    name: str
    bytes: int
    crc32: int

    @classmethod
    def of(cls, name: str, content: NDArray[np.uint8]) -> SavedFile:
        """The entry of a file that holds exactly ``content``."""
        return cls(name=name, bytes=content.nbytes, crc32=zlib.crc32(content.data))


def make_directory(path: Path) -> None:
    """Create ``path`` and its missing parents, each durable in its own parent."""
    missing = [path, *path.parents]
    missing = missing[: next(i for i, directory in enumerate(missing) if directory.exists())]
    with _as_data_directory_error(path):
        for directory in reversed(missing):
            directory.mkdir(exist_ok=True)
            _fsync_path(directory.parent, os.O_DIRECTORY)


def write_at(path: Path, offset: int, content: memoryview, *, truncate: bool = False) -> None:
    """Write all of ``content`` at ``offset``; it is not durable yet.

    Uses plain writes, so a full disk is an error and never a SIGBUS.
    """
    with _as_data_directory_error(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if truncate else 0)
        try:
            descriptor = os.open(path, flags, 0o640)
        except FileNotFoundError:  # a dataset's directory is created with its first file
            make_directory(path.parent)
            descriptor = os.open(path, flags, 0o640)
        try:
            while content:
                written = os.pwrite(descriptor, content, offset)
                content, offset = content[written:], offset + written
        finally:
            os.close(descriptor)


def make_durable(path: Path) -> None:
    """Return when a file's bytes, or a directory's entries, are on the disk."""
    with _as_data_directory_error(path):
        _fsync_path(path, 0)


def map_file(path: Path, size: int) -> NDArray[np.uint8]:
    """The first ``size`` bytes of a file, mapped read-only, (size,) uint8.

    Raises ``DamagedFile`` if it is missing or shorter.
    """
    with open_saved(path, size) as descriptor:
        # With ``trackfd=False`` a mapping keeps no descriptor: 100M rows are 10,000 chunks.
        if sys.version_info >= (
            3,
            13,
        ):
            mapping = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ, trackfd=False)
        else:
            mapping = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
    return np.frombuffer(mapping, dtype=np.uint8)


def read_file(path: Path, saved: SavedFile) -> bytearray:
    """The saved bytes, checked.

    Raises ``DamagedFile`` if the file is missing, shorter, or has another checksum.
    """
    content = bytearray(saved.bytes)
    with open_saved(path, saved.bytes) as descriptor:
        rest, offset = memoryview(content), 0
        while rest:
            got = os.preadv(descriptor, [rest], offset)
            if got == 0:
                raise DamagedFile(f"{path} became shorter while it was read")
            rest, offset = rest[got:], offset + got
    check_content(path, content, saved.crc32)
    return content


def check_content(path: Path, content: bytearray | memoryview, crc32: int) -> None:
    """Raise ``DamagedFile`` unless ``content`` has this checksum."""
    found = zlib.crc32(content)
    if found != crc32:
        raise DamagedFile(
            f"{path} is damaged: its checksum is {found:08x}, the checkpoint records {crc32:08x}"
        )


@contextmanager
def open_saved(path: Path, size: int) -> Iterator[int]:
    """A descriptor of a file that has at least ``size`` bytes.

    Raises ``DamagedFile`` if it is missing, shorter or unreadable.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise DamagedFile(f"{path} is missing") from error
    except OSError as error:
        raise DataDirectoryError(f"cannot read {path}: {error.strerror}") from error
    try:
        found = os.fstat(descriptor).st_size
        if found < size:
            raise DamagedFile(
                f"{path} is damaged: it has {found} bytes, the checkpoint records {size}"
            )
        yield descriptor
    except OSError as error:  # an unreadable file counts as damaged
        raise DamagedFile(f"{path} cannot be read: {error.strerror}") from error
    finally:
        os.close(descriptor)


@contextmanager
def _as_data_directory_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataDirectoryError(
            f"cannot write {path}: {error.strerror}",
            hint="check free space and permissions: df -h, ls -ld",
        ) from error


def _fsync_path(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
