"""Parsed statements: a call of a function, a command without rows, or a step of a cursor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from syncd.pgwire.lexer import Piece


@dataclass(frozen=True, slots=True)
class Value:
    """An argument: a constant of the text, or the literal or parameter at ``piece``.

    ``oid`` is the type that the statement casts it to; 0 for none.
    """

    piece: int | None = None
    constant: int | float | bool | None = None
    oid: int = 0


@dataclass(frozen=True, slots=True)
class Select:
    """A call of ``function``. ``columns`` are pairs of a column and its name in the result.

    None stands for all columns.
    """

    function: str
    arguments: Mapping[str, Value]
    columns: tuple[tuple[str | int, str | int], ...] | None
    limit: Value | None


@dataclass(frozen=True, slots=True)
class Command:
    """A statement that returns no rows; ``tag`` is its CommandComplete."""

    tag: str
    effect: str = ""
    """What it does to the session, such as ``begin``; empty: nothing."""
    name: str = ""
    """The cursor, statement or setting that it is about."""
    value: str | int = ""


@dataclass(frozen=True, slots=True)
class Show:
    """SHOW of one setting."""

    name: str


@dataclass(frozen=True, slots=True)
class Declare:
    """DECLARE … CURSOR FOR a SELECT."""

    name: str | int
    select: Select
    holds: bool


@dataclass(frozen=True, slots=True)
class Fetch:
    """FETCH or MOVE the next rows of a cursor."""

    name: str | int
    count: int | None
    moves: bool


Parsed = Select | Command | Show | Declare | Fetch


@dataclass(frozen=True, slots=True)
class Statement:
    """A parsed statement and its own literals and parameters."""

    parsed: Parsed
    pieces: list[Piece] = field(default_factory=list)

    def name(self, name: str | int) -> str:
        """A name as the client wrote it, in lower case unless it was quoted."""
        return str(self.pieces[name]) if isinstance(name, int) else name
