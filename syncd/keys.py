"""Conversion of keys between the forms of table, outbox, index and request.

Invariant: one key has one text. The trigger writes this text, the pass reads it and the index
stores it, whatever the sessions' settings are. A request may name a time in another form of ISO
8601; it is converted to this text here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, date, datetime

from syncd.types import Key, KeyKind

KEY_KINDS: dict[str, KeyKind] = {
    "smallint": "integer",
    "integer": "integer",
    "bigint": "integer",
    "uuid": "uuid",
    "text": "text",
    "character varying": "text",
    "date": "date",
    "timestamp without time zone": "timestamp",
    "timestamp with time zone": "timestamptz",
}
"""Kind of each base type that a key's column may have."""

TIMES: frozenset[KeyKind] = frozenset({"date", "timestamp", "timestamptz"})
_DAY = r"\d{4,7}-\d\d-\d\d"
_TIME = r"T\d\d:\d\d:\d\d(\.\d{1,6})?"
_TEXTS = {
    "uuid": re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
    "date": re.compile(rf"{_DAY}( BC)?|-?infinity"),
    "timestamp": re.compile(rf"{_DAY}{_TIME}( BC)?|-?infinity"),
    "timestamptz": re.compile(rf"{_DAY}{_TIME}\+00:00( BC)?|-?infinity"),
}
_INTEGER_BOUND = 2**63


def parse_key(kinds: Sequence[KeyKind], text: str | int) -> Key:
    """syncd's form of a key of the outbox or of a row.

    Raises ``ValueError`` if no key of these kinds has such a text.
    """
    if len(kinds) == 1:
        return parse_element(kinds[0], text)
    elements = json.loads(str(text))
    if not isinstance(elements, list) or len(elements) != len(kinds):
        raise ValueError(f"{text} is not a key of {len(kinds)} columns")
    for kind, element in zip(kinds, elements, strict=True):
        if isinstance(element, int) is not (kind == "integer"):
            raise ValueError(f"{text} is not a key of the kinds {', '.join(kinds)}")
        parse_element(kind, element)
    return json.dumps(elements, separators=(",", ":"), ensure_ascii=False)


def parse_keys(kinds: Sequence[KeyKind], texts: Sequence[str | int]) -> list[Key]:
    """``parse_key`` of many texts."""
    if kinds != ["integer"]:
        return [parse_key(kinds, text) for text in texts]
    numbers = [int(text) for text in texts]
    if numbers and not -_INTEGER_BOUND <= min(numbers) <= max(numbers) < _INTEGER_BOUND:
        raise ValueError(f"{max(numbers, key=abs)} is not an integer of 64 bits")
    return list(numbers)


def parse_element(kind: KeyKind, text: str | int) -> Key:
    """syncd's form of one column's value; raises ``ValueError``."""
    if kind == "integer":
        number = int(text)
        if not -_INTEGER_BOUND <= number < _INTEGER_BOUND:
            raise ValueError(f"{text} is not an integer of 64 bits")
        return number
    pattern = _TEXTS.get(kind)
    if pattern is not None and not pattern.fullmatch(str(text)):
        raise ValueError(f"{text} is not a {kind}")
    return str(text)


def parse_readable(kinds: Sequence[KeyKind], texts: Sequence[str]) -> list[Key]:
    """``parse_key`` of the texts that are keys of these kinds.

    After an ALTER TABLE the outbox may hold keys of the column's previous type.
    """
    keys = []
    for text in texts:
        with suppress(ValueError, TypeError):
            keys.append(parse_key(kinds, text))
    return keys


def has_null(text: str) -> bool:
    """Whether a composite key of the outbox has a part that is NULL."""
    try:
        elements = json.loads(text)
    except ValueError:
        return False
    return isinstance(elements, list) and None in elements


def canonical_time(kind: KeyKind, text: str) -> str:
    """The text of a date or an instant that a request names in any form of ISO 8601.

    An instant without an offset is in UTC. Other texts are returned unchanged: years before 1 and
    after 9999, and infinity.
    """
    try:
        if kind == "date":
            return date.fromisoformat(text).isoformat()
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    if kind == "timestamp":
        return iso_text(moment.replace(tzinfo=None))
    instant = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return iso_text(instant.astimezone(UTC).replace(tzinfo=None)) + "+00:00"


def iso_text(moment: datetime) -> str:
    """The form that PostgreSQL writes in JSON: no trailing zeros in the fraction of a second."""
    text = moment.isoformat()
    return text.rstrip("0") if "." in text else text
