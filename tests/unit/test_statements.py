"""The SQL files: statements that must agree, and none that nothing runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from syncd.statements import statement, statements

ROOT = Path(__file__).parents[2]
QUERIES = sorted(path.stem for path in (ROOT / "sql" / "queries").glob("*.sql"))
READ_LIVE_ROWS = (
    "read_rows_by_key",
    "read_rows_by_composite_key",
    "read_page",
    "read_all_but",
    "read_unkeyed_rows",
)
KEY = re.compile(r"(?s)FROM \(SELECT .*? AS syncd_key")
PLACEHOLDER = re.compile(r"\{\w+\}")


def columns(name: str) -> str:
    """The text of a statement from SELECT to FROM {source}, without its key."""
    text = statement("passes", name)
    selected = text[text.index("SELECT syncd_r.") : text.index("FROM {source}")]
    return " ".join(KEY.sub("FROM (SELECT", selected).split())


def test_all_statements_that_read_live_rows_give_the_same_columns() -> None:
    assert len({columns(name) for name in READ_LIVE_ROWS}) == 1


@pytest.mark.parametrize("path", QUERIES)
def test_comments_of_statements_hold_no_placeholder(path: str) -> None:
    """A name that is filled in could end the comment."""
    comments = [
        line
        for text in statements(path).values()
        for line in text.splitlines()
        if line.lstrip().startswith("--")
    ]
    assert [line for line in comments if PLACEHOLDER.search(line)] == []


def test_every_statement_is_run_by_name() -> None:
    code = "".join(
        path.read_text()
        for folder in ("syncd", "migrations", "tests")
        for path in (ROOT / folder).rglob("*.py")
    )
    named = set(re.findall(r'"(\w+)"', code))
    unused = {
        f"{path}: {name}" for path in QUERIES for name in statements(path) if name not in named
    }
    assert unused == {f"check: dimension_of_{form}" for form in ("array", "bytes", "text")}
