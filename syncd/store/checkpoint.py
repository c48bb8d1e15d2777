"""Checkpoints on disk: written, read, and their unneeded files removed.

Invariant: only a file that no kept checkpoint names is removed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.store.data_dir import LOCK_FILE
from syncd.store.manifest import MANIFEST, PREVIOUS, Manifest, read_manifest, write_manifest

DAMAGED = "manifest.damaged.json"
INDEX_DIRECTORY = re.compile(r"[0-9a-f]{8}")
INDEX_FILE = re.compile(
    r"[0-9]{4,}-(vectors|norms|prints|keys|key-ends|columns|column-ends|live|codebook|codes)"
    r"-[0-9]{6,}\.[a-z0-9]+"
)

logger = structlog.get_logger()


@dataclass(slots=True)
class CheckpointStore:
    """The checkpoints of one data directory; the newest and the previous one are kept."""

    data_dir: Path
    newest: Manifest | None = None
    previous: Manifest | None = None
    lock: tuple[int, int] | None = None
    """Device and inode of the lock file, which identify the directory."""

    def __post_init__(self) -> None:
        self.lock = self.find_lock()

    def find_lock(self) -> tuple[int, int] | None:
        """Device and inode of the present lock file; None if there is none."""
        try:
            found = (self.data_dir / LOCK_FILE).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def check_directory(self) -> None:
        """Raise ``DataDirectoryError`` unless the directory is the one that was locked.

        Another directory may belong to another syncd.
        """
        if self.find_lock() != self.lock:
            raise DataDirectoryError(
                f"the data directory {self.data_dir} was removed or replaced while syncd ran",
                hint="restart syncd: it creates a new one and reads the tables again; until then "
                "it still answers",
            )

    def load(self) -> Manifest | None:
        """The newest whole manifest.

        A damaged one is moved away, so that it never replaces the previous one.
        """
        whole: list[Manifest] = []
        for name in (MANIFEST, PREVIOUS):
            try:
                whole.append(read_manifest(self.data_dir / name))
            except FileNotFoundError:
                continue
            except (DamagedFile, OSError) as error:
                logger.warning("manifest_ignored", file=name, reason=str(error))
                (self.data_dir / name).replace(self.data_dir / DAMAGED)
        self.newest, self.previous = [*whole, None, None][:2]
        return self.newest

    def save(self, manifest: Manifest) -> int:
        """Write a manifest whose files are durable; returns the number of bytes written.

        Then remove the files that neither it nor the previous manifest needs.
        """
        written = write_manifest(self.data_dir, manifest)
        obsolete = self.previous.files if self.previous is not None else set()
        self.previous, self.newest = self.newest, manifest
        for name in obsolete - self.kept_files():
            remove_file(self.data_dir, name)
        return written

    def remove_leftovers(self) -> int:
        """At start, remove dataset files that no kept manifest names; returns their number.

        They are left from a crash or a rebuild. Only names in syncd's own form are removed: the
        directory may be a user's home.
        """
        kept = self.kept_files()
        removed = 0
        for path in self.data_dir.glob("*/*/*/*"):
            name = path.relative_to(self.data_dir).as_posix()
            ours = INDEX_DIRECTORY.fullmatch(path.parent.name) and INDEX_FILE.fullmatch(path.name)
            if ours and name not in kept and path.is_file():
                remove_file(self.data_dir, name)
                removed += 1
        return removed

    def remove_left(self, directories: Sequence[Path]) -> list[Path]:
        """Remove files of indexes that are gone, unless a kept manifest names them.

        Returns the directories with files that stay.
        """
        kept = {name.rpartition("/")[0] for name in self.kept_files()} if directories else set()
        later = []
        for directory in directories:
            if directory.relative_to(self.data_dir).as_posix() in kept:
                later.append(directory)
                continue
            for path in list(directory.glob("*")):
                if INDEX_FILE.fullmatch(path.name):
                    remove_file(self.data_dir, path.relative_to(self.data_dir).as_posix())
        return later

    @property
    def nonces(self) -> list[str]:
        """Nonces of the kept checkpoints; to resume one, the database must prove that it knows its
        nonce.
        """
        return [manifest.nonce for manifest in (self.newest, self.previous) if manifest is not None]

    def kept_files(self) -> set[str]:
        """The files that the kept manifests name."""
        return {
            name
            for manifest in (self.newest, self.previous)
            if manifest is not None
            for name in manifest.files
        }


def remove_file(data_dir: Path, name: str) -> None:
    """Remove a file, and the directories that become empty."""
    path = data_dir / name
    path.unlink(missing_ok=True)
    for folder in list(path.relative_to(data_dir).parents)[:-1]:
        try:
            (data_dir / folder).rmdir()
        except OSError:
            break
