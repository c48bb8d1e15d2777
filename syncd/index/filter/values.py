"""The values of one attached column, or of one path into a jsonb column, as arrays over slots.

Invariant: an array's element belongs to its slot forever, so arrays are only appended to.
Comparisons have SQL's three values: ``true`` and ``false`` each return slots, and for the other
slots the comparison is unknown. NULL is always unknown. An operand takes the column's type.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from syncd.types import ColumnKind

Chosen = NDArray[np.bool_]
Operator = Literal[
    "in",
    "gt",
    "gte",
    "lt",
    "lte",
    "null",
    "text_match",
    "text_match_insensitive",
    "is",
    "is_list",
    "is_array",
]
"""``is_list`` compares with the array of its operands; ``in`` compares with each operand."""
Operand = int | float | str | bool

COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "gt": lambda x, y: x > y,
    "gte": lambda x, y: x >= y,
    "lt": lambda x, y: x < y,
    "lte": lambda x, y: x <= y,
}
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
DAY_MICROSECONDS = 86_400_000_000
INSTANTS = ("instant", "timestamp", "date")
EXACT_CHARACTERS = 16
"""Most characters of a number whose float64 is sure to print as the same number.

A decimal of up to 15 digits survives the way to float64 and back; the sixteenth is the point.
"""

_FEW_VALUES = 8
_INSTANT = re.compile(
    r"(\d{4,})-(\d\d)-(\d\d)(?:[T ](\d\d:\d\d:\d\d(?:\.\d{1,6})?))?(?:[+]00:00)?( BC)?", re.ASCII
)
_FIRST_DAY, _FIRST_MICROSECOND = np.datetime64("2000-01-01", "D"), np.datetime64("2000-01-01", "us")
_USUAL_CHARACTERS = len("2000-01-01T00:00:00.000000")


class Values(Protocol):
    """Values of one column, for the slots from 0 on."""

    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the arrays."""

    def extend(self, values: Sequence[Any]) -> None:
        """Append the values of the next slots: as JSON has them, with numbers as ``number`` reads
        them.
        """

    def true(self, operator: Operator, operands: Sequence[Operand], slots: slice) -> Chosen:
        """The slots for which the comparison is true, (n,) bool.

        ``in``, ``is_list`` and the text operators take any number of operands, ``null`` takes none,
        the others one.
        """

    def false(self, operator: Operator, operands: Sequence[Operand], slots: slice) -> Chosen:
        """The slots for which the comparison is false, (n,) bool."""


class Growing:
    """An array that grows by appending. Parts that were read before never change."""

    def __init__(self, dtype: str) -> None:
        self.room: NDArray[Any] = np.empty(0, dtype=dtype)
        self.size = 0

    @property
    def rows(self) -> NDArray[Any]:
        """All appended values."""
        return self.room[: self.size]

    def extend(self, values: NDArray[Any]) -> None:
        """Append ``values``."""
        stop = self.size + len(values)
        if stop > len(self.room):
            larger = np.empty(max(stop, self.size + self.size // 2, 16), dtype=self.room.dtype)
            larger[: self.size] = self.rows
            self.room = larger
        self.room[self.size : stop] = values
        self.size = stop


class Numbers:
    """Numbers and times: int64 for integers, days and microseconds since 2000, else float64.

    A numeric that no float64 prints as is also kept exactly. As in PostgreSQL, NaN equals itself
    and is above every other number. Values of type real are rounded to float32, and so are their
    operands.
    """

    def __init__(self, kind: ColumnKind) -> None:
        self._kind = kind
        self._whole = kind == "integer" or kind in INSTANTS
        self._rows = Growing("<i8" if self._whole else "<f8")
        self._nulls = Growing("?")
        self._any_null = False
        self._exact_slots: list[int] = []
        self._exact_values: list[Decimal] = []
        self.count = 0

    @property
    def nbytes(self) -> int:
        """See ``Values``. A numeric with many digits takes about 200 bytes."""
        return self._rows.room.nbytes + self._nulls.room.nbytes + 200 * len(self._exact_slots)

    def extend(self, values: Sequence[Any]) -> None:
        """See ``Values``. A value of another kind counts as NULL.

        Only a column of another type could hold such a value.
        """
        nulls = np.fromiter((value is None for value in values), dtype=np.bool_, count=len(values))
        try:
            rows = self._converted(values, bool(nulls.any()))
        except (ValueError, TypeError, OverflowError):
            singly = [self._one(value) for value in values]
            nulls = np.fromiter(
                (value is None for value in singly), dtype=np.bool_, count=len(values)
            )
            rows = np.array(
                [0 if value is None else value for value in singly], dtype=self._rows.room.dtype
            )
        if self._kind == "numeric":
            for place, value in enumerate(values):
                if (
                    type(value) is not float
                    and value is not None
                    and isinstance(canonical(value), Decimal)
                ):
                    self._exact_slots.append(self.count + place)
                    self._exact_values.append(Decimal(value))
        self._any_null |= bool(nulls.any())
        self._rows.extend(rows)
        self._nulls.extend(nulls)
        self.count += len(values)

    def true(self, operator: Operator, operands: Sequence[Operand], slots: slice) -> Chosen:
        """See ``Values``."""
        if operator == "null":
            return self._nulls.rows[slots].copy()
        rows = self._rows.rows[slots]
        if operator == "in":
            chosen = _whole_in(rows, operands) if self._whole else self._in(rows, operands, slots)
        else:
            operand = operands[0]
            chosen = (
                _whole_ordered(rows, operator, operand)
                if self._whole
                else self._ordered(rows, operator, operand, slots)
            )
        return chosen & ~self._nulls.rows[slots] if self._any_null else chosen

    def false(self, operator: Operator, operands: Sequence[Operand], slots: slice) -> Chosen:
        """See ``Values``."""
        known: Chosen = ~self.true(operator, operands, slots)
        return known & ~self._nulls.rows[slots] if self._any_null and operator != "null" else known

    def _converted(self, values: Sequence[Any], any_null: bool) -> NDArray[Any]:
        if self._kind in INSTANTS:
            # PostgreSQL writes +00:00, because the session's time zone is UTC; numpy does not
            # accept it.
            texts = ["NaT" if value is None else value.removesuffix("+00:00") for value in values]
            if max(map(len, texts), default=0) > _USUAL_CHARACTERS or any(
                " " in text for text in texts
            ):
                raise ValueError("numpy cannot read years before Christ or with five digits")
            epoch = _FIRST_DAY if self._kind == "date" else _FIRST_MICROSECOND
            return np.where(
                [value is None for value in values],
                0,
                (np.array(texts, dtype=epoch.dtype) - epoch).view(np.int64),
            )
        if self._whole:
            return np.array(
                [0 if value is None else value for value in values] if any_null else values,
                dtype=np.int64,
            )
        rows = np.array(values, dtype=np.float64)
        return _rounded(rows) if self._kind == "real" else rows

    def _one(self, value: Any) -> int | float | None:
        if self._kind in INSTANTS:
            return instant(value, date=self._kind == "date") if isinstance(value, str) else None
        if self._whole:
            return value if type(value) is int and INT64_MIN <= value <= INT64_MAX else None
        if isinstance(value, str):  # NaN and the infinities: JSON has no number for them
            return float(value) if value in ("NaN", "Infinity", "-Infinity") else None
        found = None if value is None or isinstance(value, bool | list | dict) else as_float(value)
        return found if found is None or self._kind != "real" else float(_rounded(np.array(found)))

    def _operand(self, value: Operand) -> Any:
        """A value in the column's type: a float, or a ``Decimal`` if no float64 prints as this
        numeric.
        """
        if self._kind == "numeric":
            return canonical(value) if not isinstance(value, str) else float(value)
        found = as_float(value)
        rounded = float(_rounded(np.array(found)))
        return rounded if self._kind == "real" and math.isfinite(rounded) else found

    def _in(self, rows: NDArray[Any], operands: Sequence[Operand], slots: slice) -> Chosen:
        wanted = [self._operand(each) for each in operands]
        chosen = _any_of(rows, [each for each in wanted if isinstance(each, float)])
        exact = {each for each in wanted if isinstance(each, Decimal)}
        for slot, value in self._exact(slots):
            chosen[slot] = value in exact
        return chosen

    def _ordered(self, rows: NDArray[Any], operator: str, operand: Operand, slots: slice) -> Chosen:
        wanted, compare = self._operand(operand), COMPARE[operator]
        value = as_float(wanted)
        if math.isnan(value):
            nans = np.isnan(rows)
            return (
                ~nans
                if operator == "lt"
                else nans
                if operator == "gte"
                else np.full_like(nans, operator == "lte")
            )
        # A NaN in a row is above every number, so it must not count as below the operand.
        below = {"gt": "lte", "gte": "lt"}.get(operator)
        chosen = np.asarray(compare(rows, value) if below is None else ~COMPARE[below](rows, value))
        # Rounding to float64 keeps the order of numbers. Only numbers that it makes equal are
        # compared again, exactly.
        printed = Decimal(repr(value))
        if isinstance(wanted, Decimal):
            chosen[rows == value] = compare(printed, wanted)
        for slot, exact in self._exact(slots):
            if rows[slot] == value:
                chosen[slot] = compare(exact, wanted if isinstance(wanted, Decimal) else printed)
        return chosen

    def _exact(self, slots: slice) -> Iterator[tuple[int, Decimal]]:
        """The numerics that no float64 prints as, and their places among these slots."""
        first, last = (bisect_left(self._exact_slots, slot) for slot in (slots.start, slots.stop))
        for place in range(first, last):
            yield self._exact_slots[place] - slots.start, self._exact_values[place]


def _any_of(rows: NDArray[Any], wanted: Sequence[float]) -> Chosen:
    if len(wanted) > _FEW_VALUES:
        chosen = np.isin(rows, np.array(wanted, dtype=rows.dtype))
    else:
        chosen = np.zeros(len(rows), dtype=np.bool_)
        for each in wanted:
            chosen |= rows == each
    return chosen | np.isnan(rows) if any(each != each for each in wanted) else chosen


def _whole_in(rows: NDArray[Any], operands: Sequence[Operand]) -> Chosen:
    wanted = [int(each) for each in operands if not isinstance(each, float) or each.is_integer()]
    return _any_of(rows, [each for each in wanted if INT64_MIN <= each <= INT64_MAX])


def _whole_ordered(rows: NDArray[Any], operator: str, operand: Operand) -> Chosen:
    # No integer lies between the operand and its floor, so the floor gives the same answer.
    if isinstance(operand, float) and not operand.is_integer():
        operator, operand = "gt" if operator.startswith("gt") else "lte", math.floor(operand)
    operand = int(operand)
    if not INT64_MIN <= operand <= INT64_MAX:
        return np.full(len(rows), (operand > 0) == operator.startswith("lt"))
    return np.asarray(COMPARE[operator](rows, operand))


def number(text: str) -> float | Decimal:
    """A JSON number: the float64 that prints as it if there is one, else a ``Decimal`` with all
    digits.
    """
    value = float(text)
    return (
        value
        if len(text) <= EXACT_CHARACTERS or Decimal(repr(value)) == Decimal(text)
        else Decimal(text)
    )


def canonical(value: Any) -> Any:
    """A form of a number in which equal numbers are equal: a float that prints as it, else a
    ``Decimal``.

    Other values are returned unchanged.
    """
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        return value
    exact, rounded = Decimal(value), as_float(value)
    return rounded if Decimal(repr(rounded)) == exact else exact


def as_float(value: Any) -> float:
    """A number as float64; infinite if it is too large."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def instant(text: str, *, date: bool = False) -> int | None:
    """Microseconds since 2000 of a timestamp in UTC, or days since 2000 of a date.

    ``text`` is in PostgreSQL's output form; None for any other text. As in PostgreSQL, the smallest
    and the largest number mean the infinities.
    """
    if text in ("infinity", "-infinity"):
        return INT64_MAX if text == "infinity" else INT64_MIN
    match = _INSTANT.fullmatch(text)
    if match is None:
        return None
    year, month, day, time, before_christ = match.groups()
    if date and (time is not None or text.endswith("+00:00")):
        return None
    # The calendar repeats every 400 years, and Python supports only the years 1 to 9999.
    cycles, within = divmod((1 - int(year) if before_christ else int(year)) - 2000, 400)
    try:
        moment = datetime.fromisoformat(f"{2000 + within}-{month}-{day}T{time or '00:00:00'}")
    except ValueError:
        return None
    since = moment - datetime(2000, 1, 1)  # both are in UTC
    days = since.days + cycles * 146_097
    found = (
        days if date else days * DAY_MICROSECONDS + since.seconds * 1_000_000 + since.microseconds
    )
    return max(INT64_MIN + 1, min(INT64_MAX - 1, found))


def _rounded(numbers: NDArray[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return np.asarray(numbers.astype(np.float32).astype(np.float64))
