"""``pip install -e '.[dev]'``, as in CI, brings every framework: without one, tests are skipped."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_BE_MISSING = (
    "langchain-core",
    "langchain-tests",
    "llama-index-core",
    "django",
    "psycopg[pool]",
)


def brought_by(extra: str) -> set[str]:
    """The packages of an extra, and of the extras that it names."""
    extras: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    found: set[str] = set()
    for line in extras[extra]:
        if others := re.fullmatch(r"syncd\[(.+)\]", line):
            found.update(*map(brought_by, others[1].split(",")))
        else:
            found.add(line.partition(">")[0])
    return found


@pytest.mark.parametrize("package", MAY_BE_MISSING)
def test_dev_brings_the_packages_that_the_tests_of_apps_need(package: str) -> None:
    assert package in brought_by("dev")
