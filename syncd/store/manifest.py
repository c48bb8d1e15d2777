"""The manifest of a checkpoint: which files make it up, and the position that they stand for.

Invariant: a checkpoint is complete or ignored. Every file that a manifest names is durable before
the manifest is; the manifest appears by a rename; the one before it is kept until then, and the
files of both are there. A manifest that is torn fails its checksum and is passed over.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import msgspec

from syncd.errors import DamagedFile
from syncd.index.saved import SavedIndex

FORMAT = 1
MANIFEST = "manifest.json"
PREVIOUS = "manifest.previous.json"
NEW = "manifest.json.new"


class SavedDataset(msgspec.Struct, frozen=True):
    """One dataset: its name, the directory of its files below the data directory, and the files."""

    name: str
    directory: str
    index: SavedIndex

    @property
    def files(self) -> set[str]:
        """Paths below the data directory."""
        return {f"{self.directory}/{name}" for name in self.index.file_names}


class SavedQuarantined(msgspec.Struct, frozen=True, array_like=True):
    """A quarantined row."""

    key: int | str
    dataset: str
    reason: str
    since: str
    fingerprint: int


class SavedWindow(msgspec.Struct, frozen=True):
    """The part of the outbox behind a source's snapshot that was being read: up to ``end``, and
    applied up to (xid, id).
    """

    end: str
    after: tuple[int, int]


class SavedSource(msgspec.Struct, frozen=True):
    """One source: what it was attached as, how far it was applied, its datasets, and what the
    catalogue said of it; ``doubted``: its table is to be compared.
    """

    id: int
    oid: int
    arguments_md5: str
    snapshot: str
    outbox_id: int
    scanning: bool
    scanned_to: int | str | None
    scanned_rows: int
    quarantine: list[SavedQuarantined]
    datasets: list[SavedDataset]
    catalogue: str = ""
    doubted: bool = False
    window: SavedWindow | None = None
    retired: list[str] = []
    """Datasets that have no rows any more: nothing of them is kept but their names."""
    compared_at: str = ""
    """When all of its table was last read, for its indexes or to compare them; empty in a manifest
    of an older version.
    """


class Manifest(msgspec.Struct, frozen=True):
    """Everything that a start needs to know."""

    consumer: str
    incarnation: str
    nonce: str
    nonce_xid: int
    fingerprint_probe: int
    """What this number was when the fingerprints in the files were computed; with another they
    cannot be compared.
    """
    saved_at: str
    sources: list[SavedSource]
    doubts: int = 0
    """The value of ``syncd.doubts`` that the sources were compared for; -1 where they were not yet.
    """
    format: int = FORMAT

    @property
    def files(self) -> set[str]:
        """Every file that the manifest names, as paths below the data directory."""
        return {
            name for source in self.sources for dataset in source.datasets for name in dataset.files
        }


class Envelope(msgspec.Struct, frozen=True):
    """The file: a manifest and its checksum."""

    crc32: int
    manifest: msgspec.Raw


def write_manifest(data_dir: Path, manifest: Manifest) -> int:
    """Make a manifest the newest one, durably; the files that it names must be durable already.
    Returns bytes written.
    """
    body = msgspec.json.encode(manifest)
    content = msgspec.json.encode(Envelope(zlib.crc32(body), msgspec.Raw(body)))
    new = data_dir / NEW
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        written = 0
        while written < len(content):
            written += os.write(descriptor, content[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    current = data_dir / MANIFEST
    if current.exists():
        # a crash between the two renames leaves the previous one to be read
        current.replace(data_dir / PREVIOUS)
    new.replace(current)
    sync_directory(data_dir)
    return len(content)


def read_manifest(path: Path) -> Manifest:
    """Read one manifest; raises ``DamagedFile`` unless it is whole, ``FileNotFoundError`` where
    there is none.
    """
    return decode_manifest(path.read_bytes(), path.name)


def decode_manifest(content: bytes, name: str) -> Manifest:
    """Raises ``DamagedFile`` unless the checksum and the format are right."""
    try:
        envelope = msgspec.json.decode(content, type=Envelope)
        body = bytes(envelope.manifest)
        if zlib.crc32(body) != envelope.crc32:
            raise DamagedFile(f"{name}: the checksum is wrong")
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedFile(f"{name}: {error}") from error
    if manifest.format != FORMAT:
        raise DamagedFile(f"{name}: format {manifest.format}, this syncd reads {FORMAT}")
    return manifest


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
