"""Directories of datasets. Invariant: a row's text is never a path; names are percent-encoded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.parse import quote

from syncd.types import DatasetName

MAX_NAME_BYTES = 200
RESERVED_PREFIXES = (".", "postgres", "syncd.", "manifest", "consumer.")


def dataset_directory(data_dir: Path, name: DatasetName) -> Path:
    """``<data dir>/<project>/<dataset>``, both percent-encoded."""
    project, _, dataset = name.partition("/")
    return data_dir / encode(project) / encode(dataset)


def encode(text: str) -> str:
    """One path component for any text, not too long.

    It is never empty, never ``.`` or ``..``, and never the name of one of syncd's own files.
    """
    encoded = quote(text, safe="-_.~ ,+=@")
    if not encoded:
        return "%"  # no other text becomes a single percent sign
    if encoded.startswith(RESERVED_PREFIXES):
        encoded = f"%{ord(encoded[0]):02X}{encoded[1:]}"
    if len(encoded) > MAX_NAME_BYTES:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        encoded = f"{encoded[: MAX_NAME_BYTES - 40]}%~{digest}"
    return encoded
