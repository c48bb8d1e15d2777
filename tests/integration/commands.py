"""The command line in a process: run a command, and check its output and exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.daemon import Daemon

SECONDS = 60
BENCH_SECONDS = 240
"""Longest time of a benchmark.

Some wait for an index that is built in a thread of the lowest priority, which gets little of a busy
machine.
"""


def run(
    *arguments: str,
    stdin: str | None = None,
    cwd: Path | None = None,
    program: str = "syncd.cli.main",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run one command without the tester's own settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SYNCD_", "PG", "XDG_", "NO_COLOR"))
    }
    command = [sys.executable, "-m", program, *arguments]
    return subprocess.run(
        command,
        env=kept | environment,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=BENCH_SECONDS if "bench" in arguments[:1] or program == "tests.bench" else SECONDS,
        check=False,
        cwd=cwd,
    )


def printed_json(done: subprocess.CompletedProcess[str]) -> Any:
    """The result on stdout; the command printed nothing else there."""
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def assert_failed(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """Stdout is empty; stderr has the error, its reason and the next step, and no traceback."""
    assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    assert "\n  next: " in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@contextmanager
def watching(service: Daemon, *arguments: str, **streams: Any) -> Iterator[subprocess.Popen[bytes]]:
    """``syncd status --watch`` until the block ends; an interrupt ends it in order."""
    command = [
        sys.executable,
        "-m",
        "syncd.cli.main",
        "status",
        "--watch",
        "--socket",
        str(service.socket),
        *arguments,
    ]
    with subprocess.Popen(command, **streams) as process:
        try:
            yield process
            process.send_signal(signal.SIGINT)
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()
