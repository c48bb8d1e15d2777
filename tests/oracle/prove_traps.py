"""Break syncd on purpose, and see the suite fail: ``python -m tests.oracle.prove_traps [trap ...]``.

Each trap is a replacement in a copy of the package, which the tests' syncd processes then import. The exit status is 0 when every broken copy
failed at least one of its tests, and the copy that was not broken passed them all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
ORACLE = "tests/oracle/test_oracle.py"
RACES = "tests/faults/test_races.py"
LATE_COMMIT = f"{RACES}::test_a_transaction_that_took_a_lower_outbox_id_and_commits_later_is_noticed[usual poll]"
LOOK = f"{RACES}::test_every_commit_of_a_burst_is_noticed_by_the_look_for_open_writers_alone"
HALF = f"{RACES}::test_readers_never_see_half_of_a_transaction"
FAILED = 1
"""pytest's exit status when tests ran and some failed."""


@dataclass(frozen=True)
class Trap:
    """What is broken, as edits (file, text, replacement), and which tests must notice, each by itself."""

    edits: tuple[tuple[str, str, str], ...]
    tests: tuple[str, ...]


TRAPS = {
    "nothing is broken": Trap((), (ORACLE, LATE_COMMIT, LOOK, HALF)),
    "changes are those with an id above the last one": Trap(
        (
            (
                "syncd/postgres/outbox.py",
                "for outbox_range in ranges(cursor.position.snapshot, last):",
                'for outbox_range in [f"o.id > {cursor.position.outbox_id}"]:',
            ),
        ),
        (ORACLE, LATE_COMMIT),
    ),
    "the pass reads at READ COMMITTED": Trap(
        (("sql/queries/passes.sql", "BEGIN ISOLATION LEVEL REPEATABLE READ", "BEGIN ISOLATION LEVEL READ COMMITTED"),),
        (HALF,),
    ),
    "nobody looks for open writers before sleeping": Trap(
        (("syncd/sync/consumer.py", "frozenset(row[0]) if row else frozenset()", "frozenset()"),), (LOOK,)
    ),
    "a crash is nothing to look back for": Trap(
        (("syncd/sync/consumer.py", "watched.return_to_confirmed()", "pass"),), (ORACLE,)
    ),
}


def copy_package(folder: Path, trap: Trap) -> None:
    """The package as it is installed, broken; an edit whose text is not there exactly once is an error."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "syncd", folder / "syncd", ignore=ignore)
    for part in ("sql", "migrations"):
        shutil.copytree(CHECKOUT / part, folder / "syncd" / part, ignore=ignore, dirs_exist_ok=True)
    for name, text, replacement in trap.edits:
        path = folder / (name if name.startswith("syncd/") else f"syncd/{name}")
        content = path.read_text()
        assert content.count(text) == 1, f"{name} has {text!r} {content.count(text)} times"
        path.write_text(content.replace(text, replacement))


def run(trap: Trap) -> bool:
    """Whether the trap's tests notice it, or pass where nothing is broken."""
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        copy_package(Path(folder), trap)
        # The copy goes before the checkout, which would otherwise be found in the current directory.
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONSAFEPATH": "1"}
        for test in trap.tests:
            begun = time.monotonic()
            command = [sys.executable, "-m", "pytest", test, "-q", "-x", "-p", "no:cacheprovider"]
            done = subprocess.run(
                command, env=environment, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, check=False
            )
            as_meant = done.returncode == (FAILED if trap.edits else 0)
            fine &= as_meant
            verdict = "fails" if done.returncode == FAILED else "passes" if done.returncode == 0 else "did not run"
            print(
                f"  {'ok  ' if as_meant else 'WRONG'} {test} {verdict} after {time.monotonic() - begun:.0f} s",
                flush=True,
            )
            errors = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
            print("".join(f"       {line[4:].strip()[:150]}\n" for line in errors[:1]), end="", flush=True)
    return fine


def main() -> int:
    """All traps, or those that are named."""
    results = []
    for name in sys.argv[1:] or TRAPS:
        print(name, flush=True)
        results.append(run(TRAPS[name]))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
