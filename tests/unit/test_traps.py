"""The traps that ``python -m tests.oracle.prove_traps`` sets still fit the code."""

from __future__ import annotations

from tests.oracle.prove_traps import TRAPS, misplaced, missing_tests


def test_every_trap_finds_its_text_once_and_its_tests() -> None:
    assert {name: faults for name, trap in TRAPS.items() if (faults := misplaced(trap))} == {}
    assert missing_tests() == []
