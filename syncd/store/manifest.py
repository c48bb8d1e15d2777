"""The manifest of a checkpoint: its files, and the position of each source.

Invariant: a checkpoint is complete or ignored. Every file that a manifest names is durable before
the manifest is. A rename publishes the manifest; until then the previous one and the files of both
are kept. A torn manifest fails its checksum and is ignored.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import msgspec

from syncd.errors import DamagedFile
from syncd.index.saved import SavedIndex
from syncd.shard import WHOLE

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
    """The part of the outbox, not covered by a source's snapshot, that was being read.

    It ends at ``end``, and is applied up to (xid, id) ``after``.
    """

    end: str
    after: tuple[int, int]


class SavedSource(msgspec.Struct, frozen=True):
    """One source: its attach arguments, its position, its datasets, and its catalogue entry.

    ``doubted``: its table must be compared.
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
    """Time of the last complete reading of its table, to index or to compare it.

    Empty in a manifest of an older version.
    """


class Manifest(msgspec.Struct, frozen=True):
    """All facts that a start needs."""

    consumer: str
    incarnation: str
    nonce: str
    nonce_xid: int
    fingerprint_probe: int
    """Result of the fingerprint probe when the fingerprints in the files were computed.

    If the probe gives another number now, fingerprints cannot be compared.
    """
    saved_at: str
    sources: list[SavedSource]
    doubts: int = 0
    """Value of ``syncd.doubts`` for which the sources were compared; -1 if they were not yet."""
    format: int = FORMAT
    shard: str = str(WHOLE)
    """The shard whose rows the files hold: ``0/4``. A manifest of an older version has all rows."""
    bucket_probe: int = 0
    """Result of the bucket probe at the checkpoint: see ``fingerprint_probe``."""

    @property
    def files(self) -> set[str]:
        """Every file that the manifest names, as paths below the data directory."""
        return {
            name for source in self.sources for dataset in source.datasets for name in dataset.files
        }


class Envelope(msgspec.Struct, frozen=True):
    """The file's content: a manifest and its checksum."""

    crc32: int
    manifest: msgspec.Raw


def write_manifest(data_dir: Path, manifest: Manifest) -> int:
    """Make a manifest the newest one, durably; returns the number of bytes written.

    The files that it names must be durable already.
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
        # After a crash between the two renames the previous manifest is read.
        current.replace(data_dir / PREVIOUS)
    new.replace(current)
    sync_directory(data_dir)
    return len(content)


def read_manifest(path: Path) -> Manifest:
    """Read one manifest.

    Raises ``DamagedFile`` unless it is whole, and ``FileNotFoundError`` if it does not exist.
    """
    return decode_manifest(path.read_bytes(), path.name)


def decode_manifest(content: bytes, name: str) -> Manifest:
    """The manifest in ``content``; raises ``DamagedFile`` if its checksum or format is wrong."""
    try:
        envelope = msgspec.json.decode(content, type=Envelope)
        body = bytes(envelope.manifest)
        if zlib.crc32(body) != envelope.crc32:
            raise DamagedFile(f"{name}: the checksum is wrong")
        manifest = msgspec.json.decode(body, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DamagedFile(f"{name}: {error}") from error
    if manifest.format != FORMAT:
        raise DamagedFile(f"{name}: expected format {FORMAT}, got {manifest.format}")
    return manifest


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
