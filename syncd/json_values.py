"""JSON form of Python values, for the metadata of documents and for filters.

Both use one conversion, so that a filter finds the stored values. A value that JSON or PostgreSQL's
``jsonb`` cannot hold is refused, never changed: NaN, infinities, NUL characters, sets, bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np

MAX_DEPTH = 64
"""Depth of nested lists and objects; PostgreSQL and every JSON parser read far more."""
MAX_DIGITS = 4000
"""Digits of an integer; Python does not write more than 4300."""


def json_value(value: object, depth: int = MAX_DEPTH) -> Any:
    """The JSON form of a value; raises ``ValueError``, which names the value that has none.

    A datetime, date or time becomes its ISO 8601 text, a UUID its text. A ``Decimal`` becomes the
    nearest number. A numpy scalar or array becomes numbers, a tuple a list.
    """
    match value:
        case None | bool():
            return value
        case str():
            return text(value)
        case np.generic() | np.ndarray() if not isinstance(value, float):  # np.float64 is a float
            return json_value(numpy_value(value), depth)
        case int():
            if abs(value) >= 10**MAX_DIGITS:
                raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
            return int(value)
        case float() | Decimal():
            if not math.isfinite(value):
                raise ValueError(f"{value} is not a number of JSON")
            is_whole = isinstance(value, Decimal) and value == value.to_integral_value()
            return int(value) if is_whole else float(value)
        case datetime() | date() | time():
            return value.isoformat()
        case UUID():
            return str(value)
    if depth == 0:
        raise ValueError(f"lists and objects are nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        return {key_text(key): json_value(each, depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(each, depth - 1) for each in value]
    raise ValueError(f"a value of type {type(value).__name__} has no form in JSON")


def text(value: str) -> str:
    """The same text; raises ``ValueError`` if PostgreSQL cannot store it."""
    if "\0" in value:
        raise ValueError("text with a NUL character, which PostgreSQL cannot store")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("text with a lone surrogate, which UTF-8 cannot store") from None
    return str.__str__(value)  # an enum's own text, not its name


def numpy_value(value: np.generic | np.ndarray[Any, Any]) -> Any:
    """Python's form of a scalar or an array: numbers, text, times, or an object array's objects."""
    kind = value.dtype.kind
    if kind not in "biufUMO":
        raise ValueError(f"a numpy value of type {value.dtype} has no form in JSON")
    if kind in "fM":  # Python has neither longdouble nor nanoseconds
        value = value.astype(np.float64 if kind == "f" else "datetime64[us]")
    return value.tolist()


def key_text(key: object) -> str:
    """The name of an object's member; raises ``ValueError``."""
    if isinstance(key, str):
        return text(key)
    if isinstance(key, int | UUID) and not isinstance(key, bool):
        return str(key)
    raise ValueError(f"a key of type {type(key).__name__} has no form in JSON")
