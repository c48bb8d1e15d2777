"""A dataset's keys: how each kind is stored, hashed, compared and restored.

integer: int64, 8 bytes. uuid: two uint64, 16 bytes. Other kinds: UTF-8 in a blob column, and the
end of each key in an offsets column. The *stored form* stands between Python keys and columns. It
is an array with one row per key, so thousands of keys are hashed and compared in one call. Hashes
are not on disk; loading computes them again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from syncd.errors import InvalidParams
from syncd.index.rows.key_map import Hashes
from syncd.index.storage.bitmap import Slots
from syncd.index.storage.blobs import Blobs
from syncd.index.storage.columns import Column, ColumnView
from syncd.index.storage.files import SavedFile
from syncd.types import Key, KeyKind

Stored = NDArray[Any]
"""Keys in stored form: int64 (n,) for integer, uint64 (n, 2) for uuid, else ``bytes`` objects (n,).
"""

_CANONICAL_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


def store_keys(kind: KeyKind, keys: Sequence[Key]) -> Stored:
    """The stored form of Python keys; raises ``InvalidParams`` if a key is not of this kind."""
    try:
        match kind:
            case "integer":
                return np.array([_integer(key) for key in keys], dtype=np.int64)
            case "uuid":
                return np.frombuffer(
                    bytes.fromhex("".join(map(_uuid_digits, keys))), dtype="<u8"
                ).reshape(-1, 2)
            case _:
                stored = np.empty(len(keys), dtype=object)
                # An int has no ``encode``; its error is caught below.
                stored[:] = [key.encode() for key in keys]  # type: ignore[union-attr]
                return stored
    except (TypeError, AttributeError, OverflowError, UnicodeEncodeError) as error:
        raise InvalidParams(
            f"a key is not of the kind {kind}",
            hint="pass keys as the source's key column holds them",
        ) from error


def restore_keys(kind: KeyKind, stored: Stored) -> list[Key]:
    """The Python keys of a stored form."""
    match kind:
        case "integer":
            return stored.tolist()  # type: ignore[no-any-return]  # int64 gives ints
        case "uuid":
            return [_uuid_text(stored[row].tobytes().hex()) for row in range(len(stored))]
        case _:
            return [key.decode() for key in stored.tolist()]


def hash_keys(kind: KeyKind, stored: Stored) -> Hashes:
    """64-bit hashes, equal in every process: splitmix64 of numbers, BLAKE2b of text."""
    match kind:
        case "integer":
            return _splitmix64(stored.view(np.uint64))
        case "uuid":
            return _splitmix64(_splitmix64(stored[:, 0]) ^ stored[:, 1])
        case _:
            digests = [blake2b(key, digest_size=8).digest() for key in stored.tolist()]
            return np.frombuffer(b"".join(digests), dtype="<u8")


def same_keys(one: Stored, other: Stored) -> NDArray[np.bool_]:
    """Whether the keys of each row are equal, (n,) bool."""
    same: NDArray[np.bool_] = np.asarray(one == other, dtype=np.bool_)
    return same if same.ndim == 1 else np.logical_and.reduce(same, axis=1)


class KeysView(Protocol):
    """Stored keys at one moment."""

    @property
    def columns(self) -> tuple[ColumnView, ...]:
        """The views of the columns, in the order of ``KeyColumns.columns``."""

    def take(self, slots: Slots) -> Stored:
        """The keys of ``slots``, in the same order."""


class KeyColumns(Protocol):
    """Columns for the keys of one kind, and how keys are written into them."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns alone, for sealing, saving and loading."""

    def rows(self, count: int) -> tuple[int, ...]:
        """Number of rows in each column when ``count`` keys are stored."""

    def write(self, start: int, stored: Stored) -> None:
        """Write keys at the slots from ``start`` on."""

    def load(self, saved: dict[str, SavedFile], count: int) -> None:
        """Load ``count`` saved keys and check them."""

    def view(self) -> KeysView:
        """The present keys, which the writer publishes."""


def key_columns(kind: KeyKind, directory: Path, prefix: str, chunk_bytes: int) -> KeyColumns:
    """Empty columns for one kind of key."""
    match kind:
        case "integer":
            return FixedKeys(Column(directory, f"{prefix}keys", "i64", "<i8", None, chunk_bytes))
        case "uuid":
            return FixedKeys(Column(directory, f"{prefix}keys", "uuid", "<u8", 2, chunk_bytes))
        case _:
            return Blobs(
                Column(directory, f"{prefix}keys", "utf8", "u1", None, chunk_bytes),
                Column(directory, f"{prefix}key-ends", "u64", "<u8", None, chunk_bytes),
            )


@dataclass(frozen=True, slots=True)
class FixedKeysView:
    """Keys of a fixed size at one moment."""

    column: ColumnView

    @property
    def columns(self) -> tuple[ColumnView, ...]:
        """See ``KeysView``."""
        return (self.column,)

    def take(self, slots: Slots) -> Stored:
        """See ``KeysView``."""
        return self.column.take(slots)


class FixedKeys:
    """Keys of a fixed size, in one column."""

    def __init__(self, column: Column) -> None:
        self._column = column
        self.columns = (column,)

    def rows(self, count: int) -> tuple[int, ...]:
        """See ``KeyColumns``."""
        return (count,)

    def write(self, start: int, stored: Stored) -> None:
        """See ``KeyColumns``."""
        self._column.write(start, stored)

    def load(self, saved: dict[str, SavedFile], count: int) -> None:
        """See ``KeyColumns``."""
        self._column.load(saved, count, check=True)

    def view(self) -> KeysView:
        """See ``KeyColumns``."""
        return FixedKeysView(self._column.view)


def _splitmix64(numbers: NDArray[np.uint64]) -> Hashes:
    """The finalizer of SplitMix64.

    Source: Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014.
    """
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _integer(key: Key) -> int:
    if type(key) is not int:  # a bool is not a key, and numpy would round a float
        raise TypeError
    return key


def _uuid_digits(key: Key) -> str:
    if not _CANONICAL_UUID.fullmatch(key):  # type: ignore[arg-type]  # an int is a TypeError
        raise TypeError
    return key.replace("-", "")  # type: ignore[union-attr] # it matched: a str


def _uuid_text(digits: str) -> str:
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"
