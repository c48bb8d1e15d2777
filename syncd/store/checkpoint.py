"""Checkpoints on disk: write one, read the newest whole one, and remove files that no kept one
names.
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
    r"[0-9]{4,}-(vectors|norms|prints|keys|key-ends|columns|column-ends|live|codebook|codes)-[0-9]{6,}\.[a-z0-9]+"
)

logger = structlog.get_logger()


@dataclass(slots=True)
class CheckpointStore:
    """The checkpoints of one data directory; the newest and the one before it are kept."""

    data_dir: Path
    newest: Manifest | None = None
    previous: Manifest | None = None
    lock: tuple[int, int] | None = None
    """Device and inode of the lock file, by which the directory is known."""

    def __post_init__(self) -> None:
        self.lock = self.find_lock()

    def find_lock(self) -> tuple[int, int] | None:
        """The lock file that is there now."""
        try:
            found = (self.data_dir / LOCK_FILE).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def check_directory(self) -> None:
        """Raise ``DataDirectoryError`` unless the directory is the one that was locked: another one
        may be another syncd's.
        """
        if self.find_lock() != self.lock:
            raise DataDirectoryError(
                f"the data directory {self.data_dir} was removed or replaced while syncd ran",
                hint="restart syncd: it makes a new one and reads the tables again; until then it "
                "goes on answering",
            )

    def load(self) -> Manifest | None:
        """The newest whole manifest. One that is damaged is set aside, so that it never takes the
        previous one's place.
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
        """Write a manifest whose files are durable, then remove what neither it nor the one before
        it needs. Returns bytes written.
        """
        written = write_manifest(self.data_dir, manifest)
        obsolete = self.previous.files if self.previous is not None else set()
        self.previous, self.newest = self.newest, manifest
        for name in obsolete - self.kept_files():
            remove_file(self.data_dir, name)
        return written

    def remove_leftovers(self) -> int:
        """At start: remove dataset files that no kept manifest names, left by a crash or a rebuild.
        Returns how many.

        Only what is named as syncd names its files: the directory may be somebody's home.
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
        """What the database must be able to prove for a checkpoint on disk to be resumed."""
        return [manifest.nonce for manifest in (self.newest, self.previous) if manifest is not None]

    def kept_files(self) -> set[str]:
        """The files of the manifests that are kept."""
        return {
            name
            for manifest in (self.newest, self.previous)
            if manifest is not None
            for name in manifest.files
        }


def remove_file(data_dir: Path, name: str) -> None:
    """Remove a file and the directories that it leaves empty."""
    path = data_dir / name
    path.unlink(missing_ok=True)
    for folder in list(path.relative_to(data_dir).parents)[:-1]:
        try:
            (data_dir / folder).rmdir()
        except OSError:
            break
