"""``syncd serve``, or another service, in its own process, for the duration of a block."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from syncd.errors import SyncdError

STOP_SECONDS = 60.0


@contextmanager
def serve(
    environment: Mapping[str, str],
    log: Path,
    cwd: Path | None = None,
    arguments: Sequence[str] = ("serve",),
) -> Iterator[subprocess.Popen[str]]:
    """Start the service, wait until it is ready, and stop it at the end of the block.

    Its stderr is appended to ``log``. ``environment`` is its whole environment. ``arguments`` are
    those of ``syncd``. With ``-P`` it runs the installed package, not a package in the current
    directory. Raises ``SyncdError`` if it does
    not start, or if it fails to stop cleanly after a block without errors.
    """
    command = " ".join(["syncd", *arguments])
    with log.open("ab") as stderr:
        process = subprocess.Popen(  # noqa: S603 - this program
            [sys.executable, "-P", "-m", "syncd.cli.main", *arguments],
            env=dict(environment),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
    with process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline().startswith("ready"):
                raise failure(f"{command} did not start", log, command)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
    if process.returncode != 0:
        raise failure(f"{command} ended with exit {process.returncode}", log, command)


def failure(what: str, log: Path, command: str) -> SyncdError:
    """An error that ends with the service's last log lines."""
    words = log.read_text(encoding="utf-8", errors="replace")[-2000:].strip()
    return SyncdError(f"{what}: {words}", hint=f"to see why, run: {command}")
