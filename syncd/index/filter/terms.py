"""Values that are compared once each, although many slots may have them.

They are text, uuids, booleans, arrays, and the values of a path into a jsonb column.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from syncd.index.filter.values import (
    COMPARE,
    Chosen,
    Growing,
    Operand,
    Operator,
    as_float,
    canonical,
)
from syncd.types import ColumnKind

_NULL, _STRING, _NUMBER, _ARRAY, _OTHER = range(5)


class Terms:
    """A dictionary of the values that occur, and each slot's number in it; see ``Values``.

    The entry of an array is the set of its elements' numbers. ``in`` is true of an array if it is
    true of one of its elements.
    """

    def __init__(self, kind: ColumnKind) -> None:
        self._kind = kind
        self._codes = Growing("<i4")
        self._numbers = _Dictionary()
        self._tags = Growing("u1")
        self._floats = Growing("<f8")
        self._members = Growing("<i4")
        self._owners = Growing("<i4")
        self.count = 0

    @property
    def nbytes(self) -> int:
        """See ``Values``. An entry of the dictionary takes about 150 bytes with its text."""
        return self._codes.room.nbytes + self._members.room.nbytes * 2 + 150 * len(self._numbers)

    def extend(self, values: Sequence[Any]) -> None:
        """See ``Values``."""
        numbers = self._numbers
        plain = self._kind in ("text", "enum", "uuid")  # only strings and None: 0.05 µs each
        codes = [numbers[key] for key in (values if plain else map(self._key, values))]
        self._codes.extend(np.array(codes, dtype=np.int32))
        self.count += len(values)
        self._describe()

    def true(self, operator: Operator, operands: Sequence[Operand], slots: slice) -> Chosen:
        """See ``Values``."""
        return np.asarray(self._table(operator, operands)[0][self._codes.rows[slots]])

    def false(self, operator: Operator, operands: Sequence[Operand], slots: slice) -> Chosen:
        """See ``Values``."""
        true, known = self._table(operator, operands)
        return np.asarray((known & ~true)[self._codes.rows[slots]])

    def _key(self, value: Any) -> Any:
        """The dictionary's key for a value.

        ``True`` and 1 have different keys. So have the float 0.1 and the exact decimal of its bits.
        """
        if isinstance(value, str):
            return value.rstrip(" ") if self._kind == "character" else value
        if isinstance(value, bool):
            return "boolean", value
        if isinstance(value, list):
            elements = value if self._kind == "json" else _flat(value)
            numbers = [self._numbers[self._element(element)] for element in elements]
            return "array", frozenset(numbers), tuple(numbers) if self._kind == "json" else ()
        value = ("object",) if isinstance(value, dict) else canonical(value)
        return ("digits", value) if isinstance(value, Decimal) else value

    def _array(self, elements: Sequence[Any]) -> int | None:
        """The number of a whole array, or None if no slot has an equal one."""
        numbers = [self._numbers.get(self._key(element)) for element in elements]
        return (
            None
            if None in numbers
            else self._numbers.get(("array", frozenset(numbers), tuple(numbers)))
        )

    def _element(self, value: Any) -> Any:
        return ("object",) if isinstance(value, list) else self._key(value)

    def _describe(self) -> None:
        """Extend the arrays that describe entries up to the dictionary's end."""
        entries = self._numbers.entries
        tags, floats, members, owners = [], [], [], []
        for number in range(self._tags.size, len(entries)):
            entry = entries[number]
            tags.append(_tag(entry))
            floats.append(as_float(_digits(entry)) if tags[-1] == _NUMBER else 0.0)
            if tags[-1] == _ARRAY:
                members += entry[1]
                owners += [number] * len(entry[1])
        self._tags.extend(np.array(tags, dtype=np.uint8))
        self._floats.extend(np.array(floats))
        self._members.extend(np.array(members, dtype=np.int32))
        self._owners.extend(np.array(owners, dtype=np.int32))

    def _table(self, operator: Operator, operands: Sequence[Operand]) -> tuple[Chosen, Chosen]:
        """Two arrays (entries,) bool: whether the comparison is true, and whether it is known."""
        tags = self._tags.rows
        if operator == "null":
            return tags == _NULL, np.ones(len(tags), dtype=np.bool_)
        if operator == "is_array":
            return ((tags == _ARRAY) == operands[0]) & (tags != _NULL), tags != _NULL
        true = np.zeros(len(tags), dtype=np.bool_)
        if operator in ("is", "is_list"):
            same = (
                self._array(operands)
                if operator == "is_list"
                else self._numbers.get(self._key(operands[0]))
            )
            if same is not None:
                true[same] = True
            return true, tags != _NULL
        if operator == "in":
            found = [self._numbers.get(self._key(each)) for each in operands]
            numbers = np.array([number for number in found if number is not None], dtype=np.int32)
            true[numbers] = True
            if self._owners.size and numbers.size:
                members = self._members.rows
                hit = members == numbers[0] if numbers.size == 1 else np.isin(members, numbers)
                true[self._owners.rows[hit]] = True
            return true, tags != _NULL
        operand, entries = self._key(operands[0]), self._numbers.entries
        if isinstance(operand, str):
            known = tags == _STRING
            strings = np.flatnonzero(known).tolist()
            if operator in ("text_match", "text_match_insensitive"):
                fold = str.lower if operator.endswith("insensitive") else str
                # Trailing spaces of operands count, as in position().
                wanted = [fold(str(each)) for each in operands]
                true[strings] = [
                    any(each in fold(entries[number]) for each in wanted) for number in strings
                ]
                return true, known
            # Python compares strings by code point, as the collation "C" does.
            true[strings] = [COMPARE[operator](entries[number], operand) for number in strings]
            return true, known
        compare = COMPARE[operator]
        known, exact = tags == _NUMBER, _digits(operand)
        value = as_float(exact)
        true = known & compare(self._floats.rows, value)
        # Rounding to float64 may have made different numbers equal: compare those exactly.
        for number in np.flatnonzero(known & (self._floats.rows == value)).tolist():
            true[number] = compare(_digits(entries[number]), exact)
        return true, known


class _Dictionary(dict[Any, int]):
    """Values and their numbers, in the order of arrival; NULL is 0.

    Reading a missing key adds it.
    """

    def __init__(self) -> None:
        super().__init__({None: 0})
        self.entries: list[Any] = [None]

    def __missing__(self, key: Any) -> int:
        number = self[key] = len(self.entries)
        self.entries.append(key)
        return number


def _digits(entry: Any) -> Decimal:
    return entry[1] if isinstance(entry, tuple) else Decimal(repr(entry))


def _flat(elements: Iterable[Any]) -> list[Any]:
    """All elements of an array with any number of dimensions."""
    flat: list[Any] = []
    for element in elements:
        flat += _flat(element) if isinstance(element, list) else [element]
    return flat


def _tag(entry: Any) -> int:
    if entry is None:
        return _NULL
    if isinstance(entry, str):
        return _STRING
    if isinstance(entry, tuple):
        return {"array": _ARRAY, "digits": _NUMBER}.get(entry[0], _OTHER)
    return _NUMBER
