"""A checkpoint's record of one dataset: enough to load its index and to detect a damaged file.

Successive checkpoints share append-only files. Invariant: a ``SavedFile`` vouches only for the
first ``bytes`` bytes of a file. Later bytes belong to a later checkpoint, or are left from a crash;
they are overwritten.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from syncd.index.codes.saved import SavedCodes
from syncd.index.storage.files import SavedFile
from syncd.types import AttachedColumn, KeyKind, Metric


class SavedIndex(msgspec.Struct, frozen=True):
    """One dataset in a manifest.

    ``slots`` counts live and dead rows; ``live_name`` is the file of the live bitmap.
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
    """Highest number of any file of codes so far.

    New files never get the names of the previous checkpoint's files.
    """
    codes: SavedCodes | None = msgspec.field(default=None, name="form_2_codes")
    """The codes. Version 0.1.0 does not find them under this name: it would misread blocks of 64
    rows when it joins parts (measured: recall 0.29 in place of 0.95). It trains its own.
    """
    earlier_codes: SavedCodes | None = msgspec.field(default=None, name="codes")
    """The codes, if version 0.1.0 saved them; never written."""

    @property
    def file_names(self) -> tuple[str, ...]:
        """Every file of the checkpoint, inside the dataset's directory.

        A file that no kept checkpoint names may be removed.
        """
        return tuple(file.name for file in self.files)


class Saved(NamedTuple):
    """The record that ``DatasetIndex.save`` made durable, and the bytes written for it."""

    saved: SavedIndex
    bytes_written: int
