"""Killed at every step of a first reading, a start, a pass, a checkpoint and a stop: after a restart the index equals the table."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import signal
from collections.abc import Iterator

import pytest

from syncd.errors import ServiceUnavailable
from tests.conftest import clone
from tests.daemon import Daemon
from tests.faults.following import assert_in_step, attach_tables, change
from tests.faults.points import POINTS, Point, arm, reached
from tests.servers import PostgresServer

seeds = itertools.count(100)


@pytest.fixture(scope="module")
def mortal(server: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A syncd that is killed again and again, over one database; rows are written ahead, and pages of a scan are short."""
    folder = tmp_path_factory.mktemp("points")
    for conninfo in clone(server):
        attach_tables(conninfo)
        daemon = Daemon(conninfo, folder / "data").with_points(folder)
        daemon.with_constant("syncd.index.columns.WRITE_AHEAD_BYTES", 16)
        daemon.with_constant("syncd.sync.watched.SCAN_PAGE_ROWS", (10, 10, 10))
        yield daemon
        if daemon.process is not None:
            daemon.kill()


@pytest.mark.parametrize("point", POINTS, ids=[f"{point.phase}: {point.name}" for point in POINTS])
def test_a_kill_at_any_point_leaves_what_the_next_start_makes_right(mortal: Daemon, point: Point) -> None:
    folder = mortal.data_dir.parent
    if mortal.process is not None and mortal.process.poll() is not None:  # after a test that failed
        mortal.kill()
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
            change(mortal.conninfo, seed=next(seeds))
            save(mortal)
            change(mortal.conninfo, seed=next(seeds))
            arm(folder, point)
            with contextlib.suppress(ServiceUnavailable):
                save(mortal)
        else:
            arm(folder, point)
            assert mortal.process is not None
            mortal.process.send_signal(signal.SIGTERM)
    assert mortal.process is not None
    assert mortal.process.wait(30) == -signal.SIGKILL, f"{point} was not reached\n{mortal.log.read_text()[-3000:]}"
    assert reached(folder) == repr(point)
    mortal.kill()
    change(mortal.conninfo, seed=next(seeds))
    mortal.start()
    assert_in_step(mortal.conninfo, mortal)


def save(daemon: Daemon) -> None:
    with daemon.client() as client:
        client.checkpoint()
