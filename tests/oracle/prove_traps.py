"""Break syncd on purpose, and see the tests fail: ``python -m tests.oracle.prove_traps``.

With names of traps, only those are run. Each trap edits a copy of the package, which the tests and
their syncd processes import. The exit status is 0 if each of a trap's tests fails, and if the
tests of the unchanged copy pass.

``--list`` breaks nothing. It prints the names of the traps, and reports texts and tests that are
not found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.oracle.traps.cluster import CLUSTER_TRAPS
from tests.oracle.traps.database import DATABASE_TRAPS
from tests.oracle.traps.index import INDEX_TRAPS
from tests.oracle.traps.service import LATE_COMMIT, OPEN_WRITERS, ORACLE, SERVICE_TRAPS, SNAPSHOT
from tests.oracle.traps.trap import Trap

CHECKOUT = Path(__file__).parents[2]
TRAPS = {
    "nothing is broken": Trap((), (ORACLE, LATE_COMMIT, OPEN_WRITERS, SNAPSHOT)),
    **SERVICE_TRAPS,
    **DATABASE_TRAPS,
    **INDEX_TRAPS,
    **CLUSTER_TRAPS,
}
"""Every trap by its name, and the unchanged copy."""
PYTEST = (sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider")
"""pytest in one process: with more processes, ``-x`` ends with another exit status."""
ALSO_LONG = ("-m", "long or not long")
"""For a test that a trap names: it runs also if it is marked ``long``."""
FAILED = 1
"""pytest's exit status when tests ran and some failed."""
VERDICTS = {0: "passes", FAILED: "fails"}


def misplaced(trap: Trap) -> list[str]:
    """The edits whose text is not in its file exactly once."""
    texts = [
        (edit.file, edit.text, (CHECKOUT / edit.file).read_text("utf-8").count(edit.text))
        for edit in trap.edits
    ]
    return [f"{name} has {text!r} {found} times" for name, text, found in texts if found != 1]


def missing_tests() -> list[str]:
    """pytest's messages about tests that traps name and that do not exist."""
    tests = sorted({test for trap in TRAPS.values() for test in trap.tests})
    command = [*PYTEST, "--collect-only", "--assert=plain", *tests]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    return [line for line in done.stderr.splitlines() if line] if done.returncode else []


def copy_package(folder: Path, trap: Trap) -> None:
    """Copy the package as it is installed, and break the copy.

    Raises ``ValueError`` if the text of an edit is not found exactly once.
    """
    if faults := misplaced(trap):
        raise ValueError("; ".join(faults))
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(CHECKOUT / "syncd", folder / "syncd", ignore=ignore)
    for part in ("sql", "migrations"):
        shutil.copytree(CHECKOUT / part, folder / "syncd" / part, ignore=ignore, dirs_exist_ok=True)
    # pytest imports from the folder of the tests
    shutil.copytree(CHECKOUT / "tests", folder / "tests", ignore=ignore)
    shutil.copy(CHECKOUT / "pyproject.toml", folder)
    for edit in trap.edits:
        path = folder / (edit.file if edit.file.startswith("syncd/") else f"syncd/{edit.file}")
        path.write_text(path.read_text("utf-8").replace(edit.text, edit.replacement), "utf-8")


def run(trap: Trap) -> bool:
    """Return whether each of the trap's tests fails, or passes if nothing is broken."""
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        checkout, data = Path(folder) / "checkout", CHECKOUT.parent / "shared"
        copy_package(checkout, trap)
        if data.is_dir():  # the folder of real vectors, if there is one alongside the checkout
            (Path(folder) / "shared").symlink_to(data)
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYTHONSAFEPATH": "1"}
        for test in trap.tests:
            begun = time.monotonic()
            done = subprocess.run(
                [*PYTEST, "-x", *(ALSO_LONG if "::" in test else ()), test],
                env=environment,
                cwd=checkout,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            as_meant = done.returncode == (FAILED if trap.edits else 0)
            fine &= as_meant
            mark = "ok  " if as_meant else "WRONG"
            verdict = VERDICTS.get(done.returncode, "did not run")
            seconds = time.monotonic() - begun
            print(f"  {mark} {test} {verdict} after {seconds:.0f} s", flush=True)
            errors = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
            for line in errors[:1]:
                print(f"       {line[4:].strip()[:150]}", flush=True)
    return fine


def main() -> int:
    """Run all traps, or those that are named."""
    if sys.argv[1:] == ["--list"]:
        for name, trap in TRAPS.items():
            print("\n  WRONG ".join([name, *misplaced(trap)]))
        missing = missing_tests()
        print("".join(f"WRONG {line}\n" for line in missing), end="")
        return 1 if missing or any(misplaced(trap) for trap in TRAPS.values()) else 0
    results = []
    for name in sys.argv[1:] or TRAPS:
        print(name, flush=True)
        results.append(run(TRAPS[name]))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
