"""The operators of each kind of column, and how their operands are read."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta

from syncd.index.filter.values import Operand, instant
from syncd.types import ColumnKind

EQUAL = ("eq", "ne", "in")
ORDER = ("gt", "gte", "lt", "lte")
SETS = ("contains", "any")
"""In SQL: ``@>`` and ``&&`` of arrays."""
TEXT = ("text_match", "text_match_insensitive")
"""The column's text contains the operand, or one of them; the second ignores case."""
WHOLE = ("is", "is_array")
"""Operators of a jsonb key.

``is``: its value equals the operand (``eq`` also finds an array that has it as an element).
``is_array``: its value is, or is not, an array.
"""

NUMBER_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _integer(value: object) -> Operand | None:
    # An operand with a fraction is valid for an integer column: for example, all values above 1.5.
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _number(value: object) -> Operand | None:
    return NUMBER_WORDS.get(value) if isinstance(value, str) else _integer(value)


def _text(value: object) -> Operand | None:
    return value if isinstance(value, str) else None


def _boolean(value: object) -> Operand | None:
    return value if isinstance(value, bool) else None


def _uuid(value: object) -> Operand | None:
    try:
        return str(uuid.UUID(value)) if isinstance(value, str) else None
    except ValueError:
        return None


def _instant(value: object) -> Operand | None:
    """A point in time, in microseconds since 2000; UTC if no time zone is given."""
    if not isinstance(value, str):
        return None
    exact = instant(value)
    moment = None if exact is not None else _moment(value)
    if moment is None:
        return exact
    local = instant(moment.replace(tzinfo=None).isoformat())
    offset = moment.utcoffset() or timedelta()
    return None if local is None else local - offset // timedelta(microseconds=1)


def _timestamp(value: object) -> Operand | None:
    """A timestamp without a time zone, like the column's values."""
    if not isinstance(value, str) or value.endswith("+00:00"):
        return None
    exact = instant(value)
    moment = None if exact is not None else _moment(value)
    return exact if moment is None or moment.tzinfo is not None else instant(moment.isoformat())


def _date(value: object) -> Operand | None:
    return instant(value, date=True) if isinstance(value, str) else None


def _moment(text: str) -> datetime | None:
    """A time in any ISO 8601 form that Python reads; PostgreSQL writes only one of them."""
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def _scalar(value: object) -> Operand | None:
    return value if isinstance(value, str | int | float | bool) else None


READERS: dict[ColumnKind, tuple[str, Callable[[object], Operand | None]]] = {
    "integer": ("numbers", _integer),
    "real": ("numbers", _number),
    "double": ("numbers", _number),
    "numeric": ("numbers", _number),
    "text": ("strings", _text),
    "character": ("strings", _text),
    "enum": ("names of an enum, as strings", _text),
    "boolean": ("true and false", _boolean),
    "uuid": ("uuids", _uuid),
    "instant": ("points in time such as 2024-01-31T12:00:00Z", _instant),
    "timestamp": ("timestamps without a time zone such as 2024-01-31T12:00:00", _timestamp),
    "date": ("dates such as 2024-01-31", _date),
    "text_array": ("arrays of strings: pass one string", _text),
    "integer_array": ("arrays of numbers: pass one number", _integer),
    "json": ("a string, a number, true or false", _scalar),
}


def operators_of(kind: ColumnKind) -> tuple[str, ...]:
    """The operators of a column of this kind."""
    match kind:
        case "boolean" | "enum":
            return EQUAL
        case "text_array" | "integer_array":
            return (*EQUAL, *SETS)
        case "json":
            return (*EQUAL, *ORDER, *SETS, *TEXT, *WHOLE)
        case "text" | "character":
            return (*EQUAL, *ORDER, *TEXT)
        case _:
            return (*EQUAL, *ORDER)
