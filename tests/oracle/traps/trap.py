"""A trap: edits that break the code, and the tests that must notice."""

from __future__ import annotations

from typing import NamedTuple


class Edit(NamedTuple):
    """One replacement. The text must be in the file exactly once."""

    file: str
    text: str
    replacement: str


class Trap(NamedTuple):
    """Edits, and the tests that must fail with them: each of the tests by itself."""

    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


def broken(file: str, text: str, replacement: str, *tests: str) -> Trap:
    """A trap of one edit."""
    return Trap((Edit(file, text, replacement),), tests)
