"""The README is short, leads to every page, and its test command is CI's."""

from __future__ import annotations

import re

from tests.documents import CHECKOUT, PAGES, README


def test_the_readme_is_short_and_links_every_page() -> None:
    text = README.read_text("utf-8")
    assert len(text.encode()) <= 8000
    assert [page.name for page in PAGES[1:] if f"(syncd/docs/{page.name})" not in text] == []


def test_ci_runs_the_readmes_own_test_command() -> None:
    (command,) = re.findall(r"^.*-m pytest$", README.read_text("utf-8"), re.MULTILINE)
    ci = (CHECKOUT / ".ci" / "run").read_text("utf-8")
    assert command.split(" && ") == [
        "python3 -m venv .venv",
        ".venv/bin/pip install -q -e '.[dev]'",
        ".venv/bin/python -m pytest",
    ]
    assert [
        part
        for part in ("python3 -m venv .venv\n", "pip install -q -e '.[dev]'\n")
        if part not in ci
    ] == []
