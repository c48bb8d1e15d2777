"""The description of a published view: which blocks of the arena and which files hold it.

Readers decode it once per change, so it is small: a thousandth of a millisecond for each field.
"""

from __future__ import annotations

import msgspec

from syncd.index.codes.saved import SavedCodes
from syncd.index.storage.files import SavedFile
from syncd.types import AttachedColumn, KeyKind, Metric

Block = tuple[int, int]
"""Offset in the arena, and number of elements."""


class PublishedColumn(msgspec.Struct, frozen=True, array_like=True):
    """A column: its first ``mapped`` chunks are files, the others are blocks of this many rows."""

    mapped: int
    chunks: tuple[Block, ...]


class PublishedCodes(msgspec.Struct, frozen=True, array_like=True):
    """Codes whose files are written."""

    saved: SavedCodes
    files: tuple[SavedFile, ...]


class Publication(msgspec.Struct, frozen=True, array_like=True):
    """One view of one index. ``uid`` is the index's own number, never used again."""

    uid: int
    directory: str
    generation: int
    metric: Metric
    half: bool
    key_kind: KeyKind
    dim: int | None
    chunk_bytes: int
    attached: tuple[AttachedColumn, ...]
    count: int
    live: int
    bits: Block
    dead: Block
    columns: tuple[PublishedColumn, ...]
    """In the order of ``Generation.shared_columns``."""
    runs: tuple[tuple[int, int, int], ...]
    """Runs of the key map: offsets of hashes and values, and the number of entries."""
    buffer: tuple[int, int, int]
    has_codes: bool
    codes: tuple[int, int] | None
    """Number of the codes, and the value of a word that points to ``PublishedCodes``.

    None, although there are codes, if their files could not be written.
    """
