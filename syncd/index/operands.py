"""The values of one attached column, or of one path into a jsonb column, as arrays over slots, and what comparisons make of them.

Invariant: an array's element belongs to its slot for good, so arrays are only appended to. Comparisons have SQL's three values: each says for
which slots it is true, and for which it is false; for the rest, NULL among them, it is unknown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from syncd.types import ColumnKind

Chosen = NDArray[np.bool_]
Operator = Literal["in", "gt", "gte", "lt", "lte", "null"]
Operand = int | float | str | bool

INSTANT_BOUNDS = (-(2**63), 2**63 - 1)
"""Microseconds since 1970 that stand for -infinity and infinity."""

_FEW_VALUES = 8
_NULL, _STRING, _NUMBER, _BOOLEAN, _ARRAY, _OTHER = range(6)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "gt": lambda x, y: x > y,
    "gte": lambda x, y: x >= y,
    "lt": lambda x, y: x < y,
    "lte": lambda x, y: x <= y,
}
_INSTANT = re.compile(r"(\d{4,})-(\d\d)-(\d\d)(?:[T ](\d\d:\d\d:\d\d(?:\.\d+)?))?(?:[+]00:00)?( BC)?")


class Values(Protocol):
    """One column's values for the slots from 0 on."""

    count: int

    @property
    def nbytes(self) -> int:
        """Memory of the arrays."""

    def extend(self, values: Sequence[Any]) -> None:
        """Append the next slots' values, as JSON has them."""

    def true(self, operator: Operator, operands: Sequence[Operand], slots: slice) -> Chosen:
        """For which of the slots the comparison is true; ``in`` takes any number of operands, ``null`` none, the others one."""

    def false(self, operator: Operator, operands: Sequence[Operand], slots: slice) -> Chosen:
        """For which of the slots the comparison is false."""


def values_of(kind: ColumnKind) -> Values:
    """Empty arrays for a column of this kind."""
    match kind:
        case "integer" | "number" | "real" | "instant" | "timestamp" | "date":
            return Numbers(kind)
        case _:
            return Terms(kind)


class _Growing:
    """An array that is appended to; what was read of it stays as it is."""

    def __init__(self, dtype: str) -> None:
        self.room: NDArray[Any] = np.empty(0, dtype=dtype)
        self.size = 0

    @property
    def rows(self) -> NDArray[Any]:
        return self.room[: self.size]

    def extend(self, values: NDArray[Any]) -> None:
        stop = self.size + len(values)
        if stop > len(self.room):
            larger = np.empty(max(stop, self.size + self.size // 2, 16), dtype=self.room.dtype)
            larger[: self.size] = self.rows
            self.room = larger
        self.room[self.size : stop] = values
        self.size = stop


class Numbers:
    """int64 for integers and, as microseconds since 1970, for points in time; float64 for other numbers.

    As in Postgres NaN equals itself and is above every other number. real values are rounded to float32, operands too.
    """

    def __init__(self, kind: ColumnKind) -> None:
        self._kind = kind
        self._whole = kind not in ("number", "real")
        self._rows = _Growing("<i8" if self._whole else "<f8")
        self._nulls = _Growing("?")
        self._any_null = False
        self.count = 0

    @property
    def nbytes(self) -> int:
        """See ``Values``."""
        return self._rows.room.nbytes + self._nulls.room.nbytes

    def extend(self, values: Sequence[Any]) -> None:
        """See ``Values``. A value that is none of the column's kind, which only another type's column could hold, counts as NULL."""
        nulls = np.fromiter((value is None for value in values), dtype=np.bool_, count=len(values))
        try:
            rows = self._converted(values, bool(nulls.any()))
        except (ValueError, TypeError, OverflowError):
            singly = [self._one(value) for value in values]
            nulls = np.fromiter((value is None for value in singly), dtype=np.bool_, count=len(values))
            rows = np.array([0 if value is None else value for value in singly], dtype=self._rows.room.dtype)
        self._any_null |= bool(nulls.any())
        self._rows.extend(rows)
        self._nulls.extend(nulls)
        self.count += len(values)

    def true(self, operator: Operator, operands: Sequence[Operand], slots: slice) -> Chosen:
        """See ``Values``."""
        if operator == "null":
            return self._nulls.rows[slots].copy()
        rows = self._rows.rows[slots]
        chosen = self._in(rows, operands) if operator == "in" else self._ordered(rows, operator, operands[0])
        return chosen & ~self._nulls.rows[slots] if self._any_null else chosen

    def false(self, operator: Operator, operands: Sequence[Operand], slots: slice) -> Chosen:
        """See ``Values``."""
        known: Chosen = ~self.true(operator, operands, slots)
        return known & ~self._nulls.rows[slots] if self._any_null and operator != "null" else known

    def _converted(self, values: Sequence[Any], any_null: bool) -> NDArray[Any]:
        if self._kind in ("instant", "timestamp", "date"):
            # Postgres writes +00:00, since the session's time zone is UTC; numpy wants none.
            texts = ["NaT" if value is None else value.removesuffix("+00:00") for value in values]
            return np.array(texts, dtype="datetime64[us]").view(np.int64)
        if self._whole:
            return np.array([0 if value is None else value for value in values] if any_null else values, dtype=np.int64)
        rows = np.array(values, dtype=np.float64)
        return _rounded(rows) if self._kind == "real" else rows

    def _one(self, value: Any) -> int | float | None:
        if self._kind in ("instant", "timestamp", "date"):
            return instant(value) if isinstance(value, str) else None
        if self._whole:
            return value if type(value) is int and -(2**63) <= value < 2**63 else None
        if isinstance(value, str):  # NaN and the infinities, for which JSON has no number
            return float(value) if value in ("NaN", "Infinity", "-Infinity") else None
        number = None if value is None or isinstance(value, bool | list | dict) else as_float(value)
        return number if number is None or self._kind == "number" else float(_rounded(np.array(number)))

    def _operand(self, value: Operand) -> float:
        number = as_float(value)
        return float(_rounded(np.array(number))) if self._kind == "real" else number

    def _in(self, rows: NDArray[Any], operands: Sequence[Operand]) -> Chosen:
        if self._whole:
            wanted = [int(each) for each in operands if math.isfinite(each) and each == int(each)]  # type: ignore[arg-type]
            wanted = [each for each in wanted if -(2**63) <= each < 2**63]
        else:
            wanted = [self._operand(each) for each in operands]  # type: ignore[misc]  # floats here, ints above
        if len(wanted) > _FEW_VALUES:
            chosen = np.isin(rows, np.array(wanted, dtype=rows.dtype))
        else:
            chosen = np.zeros(len(rows), dtype=np.bool_)
            for each in wanted:
                chosen |= rows == each
        if any(each != each for each in wanted):
            chosen |= np.isnan(rows)
        return chosen

    def _ordered(self, rows: NDArray[Any], operator: str, operand: Operand) -> Chosen:
        if self._whole:
            if (
                isinstance(operand, float) and not operand.is_integer()
            ):  # nothing lies between it and the integers beside it
                if math.isinf(operand):
                    return np.full(len(rows), (operand > 0) == operator.startswith("lt"))
                operator, operand = "gt" if operator.startswith("gt") else "lte", math.floor(operand)
            operand = int(operand)
            if not -(2**63) <= operand < 2**63:
                return np.full(len(rows), (operand > 0) == operator.startswith("lt"))
            return np.asarray(_COMPARE[operator](rows, operand))
        number = self._operand(operand)
        if math.isnan(number):
            return {"gt": lambda: np.zeros(len(rows), dtype=np.bool_), "gte": lambda: np.isnan(rows),
                    "lt": lambda: ~np.isnan(rows), "lte": lambda: np.ones(len(rows), dtype=np.bool_)}[operator]()  # fmt: skip
        # A row's NaN is above any number: it is not below it.
        return ~(rows <= number) if operator == "gt" else ~(rows < number) if operator == "gte" else np.asarray(
            _COMPARE[operator](rows, number)
        )  # fmt: skip


class Terms:
    """A dictionary of the values that occur, and each slot's number in it. A comparison is made once a value, not once a slot.

    For text, uuids and booleans, for arrays, and for what a path into a jsonb column finds. An array's entry is the set of its elements' numbers.
    """

    def __init__(self, kind: ColumnKind) -> None:
        self._kind = kind
        self._codes = _Growing("<i4")
        self._numbers = _Dictionary()
        self._tags = _Growing("u1")
        self._floats = _Growing("<f8")
        self._members = _Growing("<i4")
        self._owners = _Growing("<i4")
        self._with_null: list[int] = []
        self.count = 0

    @property
    def nbytes(self) -> int:
        """See ``Values``. An entry of the dictionary takes about 150 bytes with its text."""
        return self._codes.room.nbytes + 150 * len(self._numbers)

    def extend(self, values: Sequence[Any]) -> None:
        """See ``Values``."""
        numbers = self._numbers
        if self._kind in ("text", "uuid"):  # nothing but strings and None: 0.05 µs each
            codes = list(map(numbers.__getitem__, values))
        else:
            codes = [numbers[key] for key in map(self._key, values)]
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
        """What stands for a value in the dictionary: ``True`` is not 1 there."""
        if isinstance(value, bool):
            return "boolean", value
        if isinstance(value, list):
            elements = _flat(value) if self._kind != "json" else value
            return "array", frozenset(self._numbers[self._element(element)] for element in elements)
        return ("object",) if isinstance(value, dict) else value

    def _element(self, value: Any) -> Any:
        return ("array", None) if isinstance(value, list) else self._key(value)

    def _describe(self) -> None:
        """Bring what is kept of each entry up to the dictionary's end."""
        entries = self._numbers.entries
        tags, floats, members, owners = [], [], [], []
        for number in range(self._tags.size, len(entries)):
            entry = entries[number]
            tags.append(_tag(entry))
            floats.append(as_float(entry) if tags[-1] == _NUMBER else 0.0)
            if tags[-1] == _ARRAY and entry[1]:
                members += entry[1]
                owners += [number] * len(entry[1])
                if 0 in entry[1] and self._kind != "json":  # in jsonb a null is a value like others
                    self._with_null.append(number)
        self._tags.extend(np.array(tags, dtype=np.uint8))
        self._floats.extend(np.array(floats))
        self._members.extend(np.array(members, dtype=np.int32))
        self._owners.extend(np.array(owners, dtype=np.int32))

    def _table(self, operator: Operator, operands: Sequence[Operand]) -> tuple[Chosen, Chosen]:
        """For each entry: whether the comparison is true, and whether it is known."""
        tags = self._tags.rows
        if operator == "null":
            return tags == _NULL, np.ones(len(tags), dtype=np.bool_)
        if operator == "in":
            found = [self._numbers.get(self._key(each)) for each in operands]
            numbers = np.array([number for number in found if number is not None], dtype=np.int32)
            true = np.zeros(len(tags), dtype=np.bool_)
            true[numbers] = True
            if self._owners.size and numbers.size:
                members = self._members.rows
                hit = members == numbers[0] if numbers.size == 1 else np.isin(members, numbers)
                true[self._owners.rows[hit]] = True
            known = tags != _NULL
            known[self._with_null] = False  # x = ANY(ARRAY['a', NULL]) is true or unknown
            return true, known | true
        operand, compare = operands[0], _COMPARE[operator]
        if isinstance(operand, str):
            known = tags == _STRING
            true = np.zeros(len(tags), dtype=np.bool_)
            entries = self._numbers.entries
            strings = np.flatnonzero(known).tolist()
            # Python compares strings by code point, as the collation "C" does.
            true[strings] = [compare(entries[number], operand) for number in strings]
            return true, known
        known = tags == _NUMBER
        return known & compare(self._floats.rows, as_float(operand)), known


class _Dictionary(dict[Any, int]):
    """Values and their numbers, in the order in which they came; NULL is 0. Asking for one that is not there adds it."""

    def __init__(self) -> None:
        super().__init__({None: 0})
        self.entries: list[Any] = [None]

    def __missing__(self, key: Any) -> int:
        number = self[key] = len(self.entries)
        self.entries.append(key)
        return number


def as_float(value: Any) -> float:
    """A number as float64; one that is too large is infinite."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def instant(text: str) -> int | None:
    """Microseconds since 1970 of what Postgres writes for a date or a timestamp in UTC; None for anything else."""
    if text in ("infinity", "-infinity"):
        return INSTANT_BOUNDS[text == "infinity"]
    match = _INSTANT.fullmatch(text)
    if match is None:
        return None
    year, month, day, time, before_christ = match.groups()
    number = 1 - int(year) if before_christ else int(year)
    # The calendar repeats every 400 years, and Python's knows the years from 1 to 9999.
    cycles, number = divmod(number - 2000, 400)
    try:
        moment = datetime.fromisoformat(f"{2000 + number}-{month}-{day}T{time or '00:00:00'}").replace(tzinfo=UTC)
    except ValueError:
        return None
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    microseconds = (since.days + cycles * 146_097) * 86_400_000_000 + since.seconds * 1_000_000 + since.microseconds
    return max(INSTANT_BOUNDS[0], min(INSTANT_BOUNDS[1], microseconds))


def _rounded(numbers: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return np.asarray(numbers.astype(np.float32).astype(np.float64))


def _flat(elements: Iterable[Any]) -> list[Any]:
    """The elements of an array of several dimensions."""
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
        return {"boolean": _BOOLEAN, "array": _ARRAY if entry[-1] is not None else _OTHER, "object": _OTHER}[entry[0]]
    return _NUMBER
