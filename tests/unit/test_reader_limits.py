"""Readers and the system's limits: the service goes on, and names the limit to raise."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from syncd.index.storage.arena import ARENA_BYTES
from syncd.readers.running import ReaderLost
from syncd.service import shared_memory
from syncd.settings import Settings
from tests.forks import Child


def test_without_addresses_for_shared_memory_the_main_process_answers_alone(tmp_path: Path) -> None:
    def started() -> tuple[bool, str]:
        pages, *_ = Path("/proc/self/statm").read_text().split()
        enough = int(pages) * resource.getpagesize() + ARENA_BYTES // 2
        resource.setrlimit(resource.RLIMIT_AS, (enough, enough))
        with capture_logs() as logs:
            alone = shared_memory(Settings(data_dir=tmp_path, readers=2)) is None
        return alone, logs[0]["hint"]

    alone, hint = Child(started).result()
    assert alone
    assert "ulimit -v" in hint


@pytest.mark.parametrize(
    ("number", "limit"),
    [(errno.EMFILE, "ulimit -n"), (errno.EAGAIN, "ulimit -u"), (errno.ENOMEM, "memory")],
)
def test_a_reader_that_the_system_does_not_start_names_the_limit(number: int, limit: str) -> None:
    lost = ReaderLost.not_started(1, OSError(number, os.strerror(number)))
    assert os.strerror(number) in lost.reason
    assert limit in lost.hint


def test_a_reader_that_ended_says_by_which_signal() -> None:
    assert ReaderLost.ended(2, -signal.SIGKILL).message == "reader 2: it was ended by SIGKILL"
    assert "dmesg" in ReaderLost.ended(2, -signal.SIGKILL).hint
    assert ReaderLost.ended(2, -40).reason == "it was ended by signal 40"
    assert ReaderLost.ended(2, 1).reason == "it ended with exit 1"
