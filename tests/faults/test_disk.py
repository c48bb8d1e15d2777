"""Full disks, damaged files, a data directory that goes away.

Searches go on, and a checkpoint on disk is complete or ignored.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from syncd.errors import RequestError
from tests.conftest import clone
from tests.daemon import READY_SECONDS, Daemon
from tests.faults.following import TABLES, applied, assert_in_step, attach_tables, change, logged
from tests.oracle.tables import NOTES
from tests.servers import PostgresServer

KINDS_OF_TABLES = (*TABLES, NOTES)
"""The tables of the other tests, and one with text keys, which are stored in two files."""

SMALL_CHUNKS = (
    "syncd.index.dataset.DatasetIndex.create.__func__.__kwdefaults__",
    {"half": False, "dim": None, "name": "", "chunk_bytes": 256},
)
"""Chunks of 16 rows instead of millions: they fill up, are written and mapped."""


@pytest.fixture(scope="module")
def shared(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A syncd that tests restart with damaged files."""
    for conninfo in clone(server):
        attach_tables(conninfo, KINDS_OF_TABLES)
        daemon = Daemon(conninfo, tmp_path_factory.mktemp("disk") / "data")
        yield daemon
        if daemon.process is not None:
            daemon.kill()


@pytest.fixture
def saved(shared: Daemon) -> Daemon:
    """The syncd is down with two checkpoints, and the tables have changed since."""
    if shared.process is not None:
        shared.kill()
    shared.start()
    applied(shared, change(shared.conninfo, seed=2, tables=KINDS_OF_TABLES))
    with shared.client() as client:
        client.checkpoint()
        applied(shared, change(shared.conninfo, seed=3, tables=KINDS_OF_TABLES))
        client.checkpoint()
    shared.kill()
    change(shared.conninfo, seed=4, tables=KINDS_OF_TABLES)
    shared.log.write_text("")
    return shared


# Damaged files


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def make_a_directory_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_a_loop_of(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


DAMAGES: list[Callable[[Path], None]] = [
    truncate,
    flip_a_bit,
    Path.unlink,
    make_a_directory_of,
    make_a_loop_of,
]


@pytest.mark.parametrize("kind", ["vectors", "norms", "keys", "key-ends", "live"])
def test_a_damaged_file_has_its_dataset_read_again_and_no_other(saved: Daemon, kind: str) -> None:
    """Five files of one kind, each damaged in another way."""
    newest = [path for path in saved.data_dir.rglob(f"*-{kind}-*") if path.is_file()]
    by_dataset = {path.parent: path for path in sorted(newest)}
    assert len(by_dataset) >= len(DAMAGES)
    for damage, path in zip(DAMAGES, by_dataset.values(), strict=False):
        damage(path)
    saved.start()
    assert_in_step(saved.conninfo, saved, KINDS_OF_TABLES)
    assert logged(saved, "dataset_damaged") == len(DAMAGES)
    assert logged(saved, "reconciling") == logged(saved, "source_to_be_read") == 0
    with saved.client() as client:
        client.checkpoint()
    saved.kill()
    saved.start()
    assert_in_step(saved.conninfo, saved, KINDS_OF_TABLES)
    assert logged(saved, "dataset_damaged") == len(DAMAGES)
    for path in by_dataset.values():  # syncd removes files only
        if path.is_dir():
            path.rmdir()


def change_a_digit(path: Path) -> None:
    """Damage the snapshot: the file is still JSON, and claims that the future has been applied."""
    content = re.sub(rb'"snapshot":"(\d+):(\d+):', rb'"snapshot":"9\1:9\2:', path.read_bytes())
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [truncate, change_a_digit, Path.unlink], ids=["torn", "changed", "missing"]
)
@pytest.mark.parametrize(
    "names",
    [["manifest.json"], ["manifest.previous.json"], ["manifest.json", "manifest.previous.json"]],
    ids=["the newest", "the previous", "both"],
)
def test_a_damaged_manifest_is_passed_over(
    saved: Daemon, damage: Callable[[Path], None], names: list[str]
) -> None:
    for name in names:
        damage(saved.data_dir / name)
    saved.start()
    assert_in_step(saved.conninfo, saved, KINDS_OF_TABLES)
    assert logged(saved, "there is no checkpoint") == (3 + 1 if len(names) == 2 else 0)
    with saved.client() as client:
        client.checkpoint()
    saved.kill()
    change(saved.conninfo, seed=5, tables=KINDS_OF_TABLES)
    saved.start()
    assert_in_step(saved.conninfo, saved, KINDS_OF_TABLES)


# Full disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "data"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root, and mount")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip(f"this container may not mount: {mounted.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill_up(disk: Path) -> Path:
    """Leave no byte free; returns the file that fills the disk."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        try:
            while file.write(bytes(65_536)):
                pass
        except OSError:
            pass
    return ballast


@pytest.fixture
def on_a_small_disk(database: str, small_disk: Path) -> Iterator[Daemon]:
    """A syncd on the small disk, not started."""
    attach_tables(database)
    daemon = Daemon(database, small_disk).with_constant(*SMALL_CHUNKS)
    yield daemon
    if daemon.process is not None:
        daemon.kill()


def test_a_full_disk_fails_checkpoints_and_nothing_else_and_is_forgotten_when_there_is_space(
    database: str, on_a_small_disk: Daemon
) -> None:
    daemon = on_a_small_disk.start()
    with daemon.client() as client, psycopg.connect(database, autocommit=True) as db:
        client.checkpoint()
        ballast = fill_up(daemon.data_dir)
        for seed in range(2, 10):  # more often than nonces are kept for older copies
            change(database, seed=seed)
            db.execute(
                "UPDATE items SET topic = 'new ' || %s WHERE n = ANY (%s)", [seed, [seed, seed + 1]]
            )
            assert_in_step(database, daemon)  # in memory, new datasets included
            with pytest.raises(RequestError, match="No space left on device"):
                client.checkpoint()
            error = client.status().checkpoint.error
            assert error is not None
            assert "No space left" in error
        daemon.kill()
        change(database, seed=11)
        daemon.start()  # with its disk still full
        assert_in_step(database, daemon)
        assert logged(daemon, "reconciling") == 0
        ballast.unlink()
        client.checkpoint()
        assert client.status().checkpoint.error is None
        change(database, seed=12)
        daemon.kill()
        daemon.start()
        assert_in_step(database, daemon)
        assert logged(daemon, "reconciling") == logged(daemon, "dataset_damaged") == 0


def test_a_disk_that_is_full_while_a_table_is_read_for_the_first_time(
    database: str, on_a_small_disk: Daemon
) -> None:
    ballast = fill_up(on_a_small_disk.data_dir)
    os.truncate(ballast, ballast.stat().st_size - 8192)  # room for the lock, the socket and a file
    daemon = on_a_small_disk.start()
    assert_in_step(database, daemon)
    with daemon.client() as client:
        with pytest.raises(RequestError, match="No space left on device"):
            client.checkpoint()
        ballast.unlink()
        client.checkpoint()
    daemon.kill()
    change(database, seed=2)
    daemon.start()
    assert_in_step(database, daemon)
    assert logged(daemon, "there is no checkpoint") == 3
    daemon.stop()


def test_a_stop_with_a_full_disk_ends_in_order_and_the_previous_checkpoint_stays(
    database: str, on_a_small_disk: Daemon
) -> None:
    daemon = on_a_small_disk.start()
    with daemon.client() as client:
        client.checkpoint()
    ballast = fill_up(daemon.data_dir)
    applied(daemon, change(database, seed=2))
    daemon.stop()
    assert logged(daemon, "checkpoint_failed") > 0
    ballast.unlink()
    daemon.start()
    assert_in_step(database, daemon)
    assert logged(daemon, "there is no checkpoint") == 3


# A data directory that goes away


def test_a_data_directory_removed_under_a_running_syncd_is_said_and_made_again_by_the_next_start(
    database: str, daemon: Daemon
) -> None:
    attach_tables(database)
    daemon.start()
    with daemon.client() as client:
        client.checkpoint()
        shutil.rmtree(daemon.data_dir)
        change(database, seed=2)
        assert_in_step(database, daemon)
        with pytest.raises(RequestError, match="was removed or replaced"):
            client.checkpoint()
        daemon.data_dir.mkdir()  # perhaps another syncd's
        with pytest.raises(RequestError, match="was removed or replaced"):
            client.checkpoint()
        assert not list(daemon.data_dir.iterdir())
    daemon.stop()
    daemon.start()
    assert_in_step(database, daemon)
    with daemon.client() as client:
        client.checkpoint()
    daemon.stop()


def test_files_removed_under_a_running_syncd_are_written_again_by_the_next_checkpoint(
    database: str, daemon: Daemon
) -> None:
    attach_tables(database)
    daemon.with_constant(*SMALL_CHUNKS).start()
    with daemon.client() as client:
        client.checkpoint()
        for path in daemon.data_dir.glob("docs/*/*/*"):
            path.unlink()
        for path in daemon.data_dir.glob("items/*"):
            shutil.rmtree(path)
        change(database, seed=2, tables=TABLES[:1])
        assert_in_step(database, daemon)
        client.checkpoint()
    daemon.kill()
    change(database, seed=3)
    daemon.start()
    assert_in_step(database, daemon)
    assert logged(daemon, "dataset_damaged") == 0


def test_a_data_directory_that_becomes_read_only_fails_checkpoints_and_nothing_else(
    database: str, small_disk: Path
) -> None:
    attach_tables(database)
    daemon = Daemon(database, small_disk).start()
    try:
        with daemon.client() as client:
            client.checkpoint()
            # A mount of its own: the open lock file keeps the first one writable.
            subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", small_disk], check=True)
            change(database, seed=2)
            assert_in_step(database, daemon)
            with pytest.raises(RequestError, match="Read-only file system"):
                client.checkpoint()
            subprocess.run(["umount", small_disk], check=True)
            client.checkpoint()
        daemon.kill()
        change(database, seed=3)
        daemon.start()
        assert_in_step(database, daemon)
        assert logged(daemon, "there is no checkpoint") == 3
    finally:
        if daemon.process is not None:
            daemon.kill()


def test_two_on_one_data_directory_the_second_is_refused_also_while_the_first_dies(
    database: str, daemon: Daemon
) -> None:
    """The lock ends with its process, however that ends: the next start needs no operator."""
    attach_tables(database)
    daemon.start()
    second = Daemon(database, daemon.data_dir, consumer="second")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGSTOP)  # frozen, it still holds the lock
    process = second.spawn()
    assert process.wait(READY_SECONDS) == 1
    second.kill()
    daemon.kill()
    change(database, seed=2)
    daemon.start()
    assert_in_step(database, daemon)
