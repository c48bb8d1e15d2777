"""The command line of a soak."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from syncd.errors import SyncdError
from tests.daemon import Daemon


class AnySoak(Protocol):
    """A soak: it runs for some seconds, and raises an error if a check fails."""

    daemon: Daemon
    counts: Counter[str]

    def run(self, seconds: float) -> None: ...

    def close(self) -> None: ...


def main(make: Callable[[Path, int], AnySoak], description: str | None, minutes: float) -> int:
    """Run a soak, and print its counts; exit status 0 if every check passed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="syncd-soak-") as folder:
        soak = make(Path(folder), options.seed)
        try:
            soak.run(options.minutes * 60)
        except (AssertionError, SyncdError) as error:
            print(soak.daemon.log.read_text()[-20_000:], file=sys.stderr)
            print(f"wrong: {error!r}", file=sys.stderr)
            return 1
        finally:
            soak.close()
            print(json.dumps(soak.counts, sort_keys=True))
    return 0
