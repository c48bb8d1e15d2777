"""SQL by name: every statement lives in a file of ``syncd.sql`` and is loaded from there once."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import LiteralString

NAME_MARK = "-- name: "
NOT_ASCII = re.compile(r"[^\x00-\x7f]")


@cache
def script(path: str) -> str:
    """A whole SQL file, for example ``schema/0001_tables.sql``. A character beyond ASCII, which
    only comments have, becomes a question mark: the server converts comments as well, and its
    encoding may lack the character.
    """
    return NOT_ASCII.sub("?", files("syncd.sql").joinpath(path).read_text(encoding="utf-8"))


@cache
def statements(path: str) -> dict[str, LiteralString]:
    """The statements of a file under ``queries/``, by the name in the comment above each."""
    found: dict[str, LiteralString] = {}
    for block in script(f"queries/{path}.sql").split(NAME_MARK)[1:]:
        name, _, body = block.partition("\n")
        # The files are part of the package, so their text is as literal as a string in the code.
        found[name.strip()] = body.strip().removesuffix(";")
    return found


def statement(path: str, name: str) -> LiteralString:
    """One statement, without its final semicolon; raises ``KeyError`` if the file has none of that
    name.
    """
    return statements(path)[name]


def executable_script(path: str) -> str:
    """A whole SQL file for Alembic, which would take ``:name`` for a parameter of its own."""
    return re.sub(r"(?<!:):(?=[A-Za-z0-9_])", r"\\:", script(path))
