"""What a checkpoint records of one dataset: enough to load its index again and to know a damaged
file.

Append-only files are shared by successive checkpoints: a ``SavedFile`` vouches for the first
``bytes`` bytes of a file. What follows them belongs to a later checkpoint, or was left behind by a
crash, and is overwritten.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from syncd.index.codes.saved import SavedCodes
from syncd.index.storage.files import SavedFile
from syncd.types import AttachedColumn, KeyKind, Metric


class SavedIndex(msgspec.Struct, frozen=True):
    """One dataset's part of a manifest. ``slots`` counts live and dead rows; ``live_name`` is the
    bitmap of the live ones.
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
    """The highest number that a file of codes has had: those of the checkpoint before keep their
    names to themselves.
    """
    codes: SavedCodes | None = None

    @property
    def file_names(self) -> tuple[str, ...]:
        """Every file this checkpoint needs, inside the dataset's directory; what no kept checkpoint
        names may be removed.
        """
        return tuple(file.name for file in self.files)


class Saved(NamedTuple):
    """What ``DatasetIndex.save`` made durable, and how many bytes it had to write for it."""

    saved: SavedIndex
    bytes_written: int
