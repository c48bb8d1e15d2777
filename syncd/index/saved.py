"""What a checkpoint records of one dataset: enough to load its index again and to know a damaged file.

Append-only files are shared by successive checkpoints: a ``SavedFile`` vouches for the first ``bytes`` bytes of a file.
What follows them belongs to a later checkpoint, or was left behind by a crash, and is overwritten.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from syncd.index.codes.calibration import Calibration
from syncd.types import AttachedColumn, KeyKind, Metric


class SavedFile(msgspec.Struct, frozen=True):
    """The first ``bytes`` bytes of the file ``name`` have the checksum ``crc32``."""

    name: str
    bytes: int
    crc32: int

    @classmethod
    def of(cls, name: str, content: NDArray[np.uint8]) -> SavedFile:
        """The entry of a file that holds just ``content``."""
        return cls(name=name, bytes=content.nbytes, crc32=zlib.crc32(content.data))


class SavedPart(msgspec.Struct, frozen=True):
    """One part of the codes: the file ``name`` has the codes of ``rows`` rows of the slots ``start <= slot < stop``."""

    number: int
    start: int
    stop: int
    rows: int
    name: str


class SavedCodes(msgspec.Struct, frozen=True):
    """The codes of a dataset; their files are listed with the others."""

    codebook_number: int
    codebook_name: str
    trained_rows: int
    trained_slots: int
    unevenness_trained: float
    parts: tuple[SavedPart, ...]
    calibration: Calibration


class SavedIndex(msgspec.Struct, frozen=True):
    """One dataset's part of a manifest. ``slots`` counts live and dead rows; ``live_name`` is the bitmap of the live
    ones.
    """

    metric: Metric
    key_kind: KeyKind
    half: bool
    dim: int | None
    slots: int
    generation: int
    chunk_bytes: int
    live_sequence: int
    live_name: str
    files: tuple[SavedFile, ...]
    columns: tuple[AttachedColumn, ...] = ()
    code_number: int = 0
    """The highest number that a file of codes has had: those of the checkpoint before keep their names to themselves."""
    codes: SavedCodes | None = None

    @property
    def file_names(self) -> tuple[str, ...]:
        """Every file this checkpoint needs, inside the dataset's directory; what no kept checkpoint names may be
        removed.
        """
        return tuple(file.name for file in self.files)


class Saved(NamedTuple):
    """What ``DatasetIndex.save`` made durable, and how many bytes it had to write for it."""

    saved: SavedIndex
    bytes_written: int
