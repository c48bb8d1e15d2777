"""Checks of this machine: the program, the clock, the data directory and its disk."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from syncd.ops.amounts import ago, amount
from syncd.ops.findings import Finding, fail, ok, warn
from syncd.ops.look import Look, Service
from syncd.postgres.source import Source
from syncd.settings import Settings

CLOCK_SECONDS = 5.0
MINIMUM_FREE_BYTES = 100_000_000
UNKNOWN_DIMENSION = 768
ROW_BYTES = 64
"""Bytes of a row in the index without its vector: key, fingerprint, bitmaps."""


def check_program() -> Iterator[Finding]:
    """The program's version, and whether FAISS can be loaded: syncd cannot work without it."""
    try:
        import faiss  # it takes a moment to load, and only this command needs its version

        shown = f"faiss {faiss.__version__}"
    except ImportError as error:
        yield fail(
            "program", f"faiss cannot be loaded: {error}", "pip install --force-reinstall faiss-cpu"
        )
        return
    yield ok("program", f"syncd {version('syncd')}, Python {platform.python_version()}, {shown}")


def check_clock(look: Look) -> Iterator[Finding]:
    """The clocks of server and machine agree; only the ages in reports depend on them."""
    before = time.time()
    (there,) = look.row("read_clock")
    here = (before + time.time()) / 2
    difference = abs(there - here)
    if difference > CLOCK_SECONDS:
        detail = (
            f"the clocks of this machine and of the server differ by {ago(difference)}: "
            "reported ages may be wrong"
        )
        yield warn("clock", detail, "synchronise both machines' clocks, for example with chrony")
    else:
        yield ok("clock", f"differs from the server's by {ago(difference)}")


def check_data_directory(settings: Settings, service: Service) -> Iterator[Finding]:
    """This user can write the data directory."""
    path = settings.data_dir
    nearest = nearest_existing(path)
    fix = (
        "run as the user that owns it, or set SYNCD_DATA_DIR, or: "
        f"sudo install -d -o $(id -un) -m 750 {path}"
    )
    if not nearest.is_dir():
        yield fail(
            "data directory", f"{nearest} is not a directory", "set SYNCD_DATA_DIR to a directory"
        )
    elif not os.access(nearest, os.W_OK | os.X_OK):
        # A service that runs can write the directory.
        report = fail if service.status is None else warn
        owner = nearest.stat().st_uid
        detail = f"user {os.geteuid()} may not write {nearest}, which belongs to user {owner}"
        yield report("data directory", detail, fix)
    elif nearest != path:
        yield ok("data directory", f"{path} will be made by syncd serve")
    elif path.stat().st_mode & 0o002:
        yield warn("data directory", f"every user may write {path}", f"chmod o-w {path}")
    else:
        yield ok("data directory", f"{path} can be written")


def check_disk(settings: Settings, service: Service, need: int) -> Iterator[Finding]:
    """The disk has room for the indexes: ``need`` bytes, and the same again during a rebuild.

    ``need`` follows from the server's estimate of rows.
    """
    free = shutil.disk_usage(nearest_existing(settings.data_dir)).free
    need = max(need, sum(row.bytes for row in service.datasets))
    detail = (
        f"{amount(free)} free, the indexes need about {amount(need)}, "
        "and as much again while they are rebuilt"
    )
    fix = (
        f"free some space on the disk of {settings.data_dir}, or set SYNCD_DATA_DIR to a larger one"
    )
    if free < MINIMUM_FREE_BYTES:
        yield fail("disk", detail, fix)
    elif free < need:
        yield warn("disk", detail, fix)
    else:
        yield ok("disk", detail)


def index_bytes(look: Look, source: Source) -> int:
    """Bytes that a source's indexes take, about."""
    dimension = source.dimension or look.dimensions.get(source.id, UNKNOWN_DIMENSION)
    return look.table_rows.get(source.id, 0) * (dimension * (2 if source.half else 4) + ROW_BYTES)


def nearest_existing(path: Path) -> Path:
    """The directory itself, or the nearest existing directory above it."""
    return next((each for each in (path, *path.parents) if each.exists()), Path("/"))
