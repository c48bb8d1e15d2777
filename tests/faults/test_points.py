"""A kill at any step of a first reading, start, pass, checkpoint, stop, build or compaction.

The next start is right.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
from collections.abc import Iterator

import pytest

from syncd.errors import ServiceUnavailable
from tests.conftest import clone
from tests.daemon import READY_SECONDS, Daemon
from tests.faults.following import applied, assert_in_step, attach_tables, change, change_one, until
from tests.faults.points import ARMED, CODES_POINTS, POINTS, READER_POINTS, Point, arm, reached
from tests.servers import PostgresServer

seeds = itertools.count(100)


@pytest.fixture(scope="module")
def mortal(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A syncd of one database that tests kill again and again.

    Rows are written ahead, and pages of a scan are short.
    """
    folder = tmp_path_factory.mktemp("points")
    for conninfo in clone(server):
        attach_tables(conninfo)
        daemon = Daemon(conninfo, folder / "data").with_points(folder)
        daemon.with_constant("syncd.index.storage.columns.WRITE_AHEAD_BYTES", 16)
        daemon.with_constant("syncd.sync.source.scan.PAGE_ROWS", (10, 10, 10))
        yield daemon
        if daemon.process is not None:
            daemon.kill()


@pytest.mark.parametrize("point", POINTS, ids=[f"{point.phase}: {point.name}" for point in POINTS])
def test_a_kill_at_any_point_is_followed_by_a_right_start(mortal: Daemon, point: Point) -> None:
    folder = mortal.data_dir.parent
    if mortal.process is not None and mortal.process.poll() is not None:  # after a test that failed
        mortal.kill()
        (folder / ARMED).unlink(missing_ok=True)
    if point.phase in ("scan", "start"):
        if mortal.process is not None:
            mortal.kill()
        if point.phase == "scan":
            shutil.rmtree(mortal.data_dir, ignore_errors=True)
        change(mortal.conninfo, seed=next(seeds))
        arm(folder, point)
        mortal.spawn()
    else:
        if mortal.process is None:
            mortal.start()
            save(mortal)
        change(mortal.conninfo, seed=next(seeds))
        if point.phase == "pass":
            arm(folder, point)
            change(mortal.conninfo, seed=next(seeds))
        elif point.phase == "checkpoint":
            save(mortal)  # two of them, so that the next one removes what the first alone needs
            applied(mortal, change(mortal.conninfo, seed=next(seeds)))
            save(mortal)
            # Too few bytes to be written ahead:
            applied(mortal, change_one(mortal.conninfo, seed=next(seeds)))
            arm(folder, point)
            with contextlib.suppress(ServiceUnavailable):
                save(mortal)
        else:
            arm(folder, point)
            assert mortal.process is not None
            mortal.process.send_signal(signal.SIGTERM)
    assert mortal.process is not None
    assert mortal.process.wait(READY_SECONDS) == -signal.SIGKILL, (
        f"{point} was not reached\n{mortal.log.read_text()[-3000:]}"
    )
    assert reached(folder) == repr(point)
    mortal.kill()
    change(mortal.conninfo, seed=next(seeds))
    mortal.start()
    assert_in_step(mortal.conninfo, mortal)


@pytest.fixture(scope="module")
def read(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A syncd with a reader, which tests kill again and again."""
    folder = tmp_path_factory.mktemp("points")
    for conninfo in clone(server):
        attach_tables(conninfo)
        daemon = Daemon(conninfo, folder / "data", readers=1).with_points(folder)
        yield daemon
        if daemon.process is not None:
            daemon.kill()


@pytest.mark.parametrize("point", READER_POINTS, ids=[point.name for point in READER_POINTS])
def test_a_kill_while_views_and_positions_are_published_is_followed_by_a_right_start(
    read: Daemon, point: Point
) -> None:
    folder = read.data_dir.parent
    if read.process is None:
        read.start()
    applied(read, change(read.conninfo, seed=next(seeds)))
    assert_in_step(read.conninfo, read)  # its searches have the datasets shared
    arm(folder, point)
    change(read.conninfo, seed=next(seeds))
    assert read.process is not None
    assert read.process.wait(READY_SECONDS) == -signal.SIGKILL, f"{point} was not reached"
    assert reached(folder) == repr(point)
    read.kill()
    read.start()
    assert_in_step(read.conninfo, read)


SMALL_CODES = {
    "syncd.index.build.plan.EXACT_ROWS": (16, 16),
    "syncd.index.build.plan.TAIL_ELEMENTS": 1,
    "syncd.index.build.plan.TAIL_ROWS": 8,
    "syncd.index.build.plan.LEAST_DEAD_SLOTS": 1,
    "syncd.index.build.plan.MOST_DEAD_SLOTS": 0.02,
    "syncd.index.generation.compaction.BLOCK_BYTES": 1,
    "syncd.index.build.measuring.CHEAPER_THAN_EXACT": 1e9,
    # Every row is a candidate, so codes miss none.
    "syncd.index.build.measuring.CANDIDATES": dict.fromkeys((10, 40, 100, 1000), (100_000,)),
    "syncd.index.build.measuring.QUERIES": {10: 20, 40: 5, 100: 5, 1000: 5},
    "syncd.sync.background.builder.LOOK_SECONDS": 0.02,
    "syncd.sync.background.builder.NICENESS": 0,  # a test waits for it
}
"""Datasets of 30 rows have codes, and each change leaves slots to give back."""


@pytest.fixture(scope="module")
def coded(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A syncd whose small datasets have codes, which tests kill again and again."""
    folder = tmp_path_factory.mktemp("points")
    for conninfo in clone(server):
        attach_tables(conninfo, rows=150)
        daemon = Daemon(conninfo, folder / "data").with_points(folder)
        for name, value in SMALL_CODES.items():
            daemon.with_constant(name, value)
        yield daemon
        if daemon.process is not None:
            daemon.kill()


@pytest.mark.parametrize(
    "point", CODES_POINTS, ids=[f"{point.phase}: {point.name}" for point in CODES_POINTS]
)
def test_a_kill_while_codes_are_made_or_slots_given_back_loses_nothing(
    coded: Daemon, point: Point
) -> None:
    folder = coded.data_dir.parent
    if coded.process is not None and coded.process.poll() is not None:  # after a test that failed
        coded.kill()
        (folder / ARMED).unlink(missing_ok=True)
    if point.phase == "build":
        if coded.process is not None:
            coded.kill()
        shutil.rmtree(coded.data_dir, ignore_errors=True)
        arm(folder, point)
        coded.spawn()
    else:
        if coded.process is None:
            coded.start()
        all_coded(coded)
        save(coded)
        if point.phase == "restart":
            coded.kill()
            arm(folder, point)
            coded.spawn()
        else:
            arm(folder, point)
            change(coded.conninfo, seed=next(seeds))
    assert coded.process is not None
    assert coded.process.wait(READY_SECONDS) == -signal.SIGKILL, (
        f"{point} was not reached\n{coded.log.read_text()[-3000:]}"
    )
    assert reached(folder) == repr(point)
    coded.kill()
    change(coded.conninfo, seed=next(seeds))
    coded.start()
    all_coded(coded)
    assert_in_step(coded.conninfo, coded)


def all_coded(daemon: Daemon) -> None:
    """Return once every dataset with enough rows has codes."""
    with daemon.client() as client:
        until(
            lambda: (
                all(each.index == "codes" for each in client.datasets() if each.count > 16)
                and any(each.index == "codes" for each in client.datasets())
            ),
            "codes",
        )


def save(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.checkpoint()
