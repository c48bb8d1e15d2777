"""The language of filters: a request's filter, checked against a dataset's columns, as an
expression.

``{"lang": "en", "year": {"gte": 2020, "lt": 2024}, "tag": {"in": ["a", "b"]}, "not": {…}, "or":
[{…}]}``: all members of an object must be true. ``{"attributes": {"path": ["a.b"], "eq": 7}}``
names a key of a jsonb column that contains dots.

Invariant: a filter passes exactly the rows that the same condition in a WHERE clause passes. That
includes NULL: an unknown comparison is not true, and its ``not`` is not true either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import msgspec
import numpy as np

from syncd.errors import InvalidFilter, shortened
from syncd.index.filter.operators import ORDER, READERS, TEXT, operators_of
from syncd.index.filter.values import Chosen, Operand, Operator, Values
from syncd.types import AttachedColumn, ColumnKind

MAX_DEPTH = 16
MAX_CONDITIONS = 256
MAX_VALUES = 10_000
"""Most values in all lists of a filter together."""
MAX_PATH_KEYS = 16


@dataclass(frozen=True, slots=True)
class Path:
    """A column's place, and the keys that lead into its jsonb."""

    column: int
    keys: tuple[str, ...] = ()


Operands = Mapping[Path, Values]


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison of one column."""

    path: Path
    operator: Operator
    values: tuple[Operand, ...] = ()

    def true(self, operands: Operands, slots: slice) -> Chosen:
        """The slots for which the condition is true, (n,) bool."""
        return operands[self.path].true(self.operator, self.values, slots)

    def false(self, operands: Operands, slots: slice) -> Chosen:
        """The slots for which the condition is false, (n,) bool; for the others it is unknown."""
        return operands[self.path].false(self.operator, self.values, slots)


@dataclass(frozen=True, slots=True)
class Not:
    """True for the slots for which ``inner`` is false."""

    inner: Node

    def true(self, operands: Operands, slots: slice) -> Chosen:
        """See ``Condition``."""
        return self.inner.false(operands, slots)

    def false(self, operands: Operands, slots: slice) -> Chosen:
        """See ``Condition``."""
        return self.inner.true(operands, slots)


@dataclass(frozen=True, slots=True)
class And:
    """True if all parts are true, false if one part is false; without parts it is true."""

    parts: tuple[Node, ...]

    def true(self, operands: Operands, slots: slice) -> Chosen:
        """See ``Condition``."""
        return reduce(
            np.logical_and,
            (part.true(operands, slots) for part in self.parts),
            _constant(True, slots),
        )

    def false(self, operands: Operands, slots: slice) -> Chosen:
        """See ``Condition``."""
        return reduce(
            np.logical_or,
            (part.false(operands, slots) for part in self.parts),
            _constant(False, slots),
        )


@dataclass(frozen=True, slots=True)
class Or:
    """True if one part is true, false if all parts are false; without parts it is false."""

    parts: tuple[Node, ...]

    def true(self, operands: Operands, slots: slice) -> Chosen:
        """See ``Condition``."""
        return reduce(
            np.logical_or,
            (part.true(operands, slots) for part in self.parts),
            _constant(False, slots),
        )

    def false(self, operands: Operands, slots: slice) -> Chosen:
        """See ``Condition``."""
        return reduce(
            np.logical_and,
            (part.false(operands, slots) for part in self.parts),
            _constant(True, slots),
        )


@dataclass(frozen=True, slots=True)
class NoneOf:
    """True if no part is true: each is false or unknown. It is never unknown itself.

    In SQL: ``(a OR b) IS NOT TRUE``.
    """

    parts: tuple[Node, ...]

    def true(self, operands: Operands, slots: slice) -> Chosen:
        """See ``Condition``."""
        return np.logical_not(self.false(operands, slots))

    def false(self, operands: Operands, slots: slice) -> Chosen:
        """See ``Condition``."""
        return Or(self.parts).true(operands, slots)


Node = Condition | Not | And | Or | NoneOf


@dataclass(frozen=True, slots=True)
class Filter:
    """A checked filter. Filters with the same ``text`` pass the same rows."""

    root: Node
    text: bytes
    paths: frozenset[Path]
    conditions: int


def parse_filter(given: object, columns: Sequence[AttachedColumn], dataset: str) -> Filter | None:
    """Check a request's filter against a dataset's columns; None for ``{}``.

    Raises ``InvalidFilter``.
    """
    if not isinstance(given, Mapping):
        raise InvalidFilter(
            f"expected a filter as an object, got {_shown(given)}", hint='write {"column": value}'
        )
    if not given:
        return None
    if not columns:
        raise InvalidFilter(
            f"dataset {shortened(dataset)!r} has no filterable columns",
            hint="attach the table again with columns => ARRAY[…]",
        )
    reading = _Reading(columns, dataset)
    root = reading.node(given, MAX_DEPTH)
    text = msgspec.json.encode(given, order="deterministic")
    return Filter(root, text, frozenset(reading.paths), reading.conditions)


def find_path(name: str, columns: Sequence[AttachedColumn]) -> Path | None:
    """The path that a name in a filter or in ``include`` means, or None.

    It is a column, or behind dots keys into a jsonb column.
    """
    names = [column.name for column in columns]
    if name in names:
        return Path(names.index(name))
    for place, column in enumerate(columns):
        if column.kind == "json" and name.startswith(f"{column.name}."):
            keys = tuple(name[len(column.name) + 1 :].split("."))
            return Path(place, keys) if len(keys) <= MAX_PATH_KEYS else None
    return None


def listed(columns: Sequence[AttachedColumn]) -> str:
    """The columns as a hint lists them."""
    return (
        ", ".join(
            f"{column.name}.<key>" if column.kind == "json" else column.name for column in columns
        )
        or "none"
    )


class _Reading:
    """A filter that is being read: its paths so far, and how many conditions and values it has."""

    def __init__(self, columns: Sequence[AttachedColumn], dataset: str) -> None:
        self.columns = columns
        self.dataset = dataset
        self.paths: set[Path] = set()
        self.conditions = 0
        self.values = 0

    def node(self, given: object, depth: int) -> Node:
        """The expression of an object: all of its members must be true."""
        if not isinstance(given, Mapping):
            raise self.wrong(
                f"expected an object with conditions, got {_shown(given)}",
                'write {"column": value}',
            )
        if depth == 0:
            raise InvalidFilter(
                f"the filter is nested more than {MAX_DEPTH} deep",
                hint="use fewer levels of not, and, or",
            )
        parts: list[Node] = []
        for name, value in given.items():
            if name == "not":
                parts.append(Not(self.node(value, depth - 1)))
            # A column may be named "none": with anything but a list, the name is the column's.
            elif name in _LISTS and (name != "none" or isinstance(value, list)):
                if not isinstance(value, list) or not value:
                    raise self.wrong(
                        f"{name!r} takes a list of objects", f'write {{"{name}": [{{…}}, {{…}}]}}'
                    )
                parts.append(_LISTS[name](tuple(self.node(each, depth - 1) for each in value)))
            else:
                parts.append(self.column(name, value))
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def column(self, name: str, value: object) -> Node:
        """The conditions on one column."""
        path = find_path(name, self.columns)
        if path is None:
            raise self.wrong(
                f"dataset {shortened(self.dataset)!r} has no filterable column {shortened(name)!r}",
                "attach the table again with other columns => to filter on others",
            )
        kind = self.columns[path.column].kind
        if kind == "json" and isinstance(value, Mapping) and "path" in value:
            path, value = self.deeper(name, path, value)
        self.paths.add(path)
        if not isinstance(value, Mapping):
            return self.compare(name, kind, path, "eq", value)
        if not value:
            raise self.wrong(
                f"{shortened(name)!r} has no condition",
                f"its operators: {', '.join(operators_of(kind))}",
            )
        parts = []
        for operator, operand in value.items():
            if operator not in operators_of(kind):
                within = (
                    f"for a key of it write {shortened(f'{name}.{operator}')}; "
                    if kind == "json"
                    else ""
                )
                raise self.wrong(
                    f"{shortened(operator)!r} is not an operator of {shortened(name)!r}, "
                    f"which holds {READERS[kind][0]}",
                    f"{within}its operators: {', '.join(operators_of(kind))}",
                )
            parts.append(self.compare(name, kind, path, operator, operand))
        return parts[0] if len(parts) == 1 else And(tuple(parts))

    def deeper(
        self, name: str, path: Path, value: Mapping[str, object]
    ) -> tuple[Path, Mapping[str, object]]:
        """The path with the keys of ``path`` appended, and the conditions on it."""
        keys = value["path"]
        if not isinstance(keys, list) or not keys or not all(isinstance(key, str) for key in keys):
            raise self.wrong(
                f"'path' of {shortened(name)!r} takes a list of keys",
                f'write {{"{name}": {{"path": ["a.b"], "eq": 7}}}}',
            )
        if len(path.keys) + len(keys) > MAX_PATH_KEYS:
            raise self.wrong(
                f"'path' of {shortened(name)!r} has more than {MAX_PATH_KEYS} keys", "ask for fewer"
            )
        asked = {operator: operand for operator, operand in value.items() if operator != "path"}
        return Path(path.column, (*path.keys, *keys)), asked

    def compare(
        self, name: str, kind: ColumnKind, path: Path, operator: str, value: object
    ) -> Node:
        """The condition of one operator on one column."""
        self.conditions += 1
        if self.conditions > MAX_CONDITIONS:
            raise InvalidFilter(
                f"the filter has more than {MAX_CONDITIONS} conditions",
                hint='use {"in": […]} for many values',
            )
        null = Condition(path, "null")
        if operator in ("eq", "ne"):
            found = (
                null if value is None else Condition(path, "in", (self.operand(name, kind, value),))
            )
            return Not(found) if operator == "ne" else found
        if operator == "contains":
            wanted = self.operands(
                name, kind, operator, value if isinstance(value, list) else [value]
            )
            each = tuple(Condition(path, "in", (operand,)) for operand in wanted)
            # Without operands, every array that is not NULL matches.
            return And(each) if each else Not(Condition(path, "in"))
        if operator == "any":
            return Condition(path, "in", self.operands(name, kind, operator, value))
        if operator == "in":
            given = (
                [each for each in value if each is not None] if isinstance(value, list) else value
            )
            found = Condition(path, "in", self.operands(name, kind, operator, given))
            # NULL matches a list that has null, because it equals null. An empty list matches
            # nothing.
            return (
                found if given == value and value else Or((found, null) if given != value else ())
            )
        if operator == "is_array":
            if not isinstance(value, bool):
                raise self.wrong(
                    f"'is_array' of {shortened(name)!r} takes true or false",
                    'write {"is_array": true}',
                )
            return Condition(path, "is_array", (value,))
        if operator == "is" and isinstance(value, list):
            return Condition(path, "is_list", self.operands(name, kind, operator, value))
        if operator == "is" and value is None:
            return null
        if operator in TEXT:
            texts = value if isinstance(value, list) else [value]
            if not texts or not all(isinstance(each, str) for each in texts):
                raise self.wrong(
                    f"{operator!r} of {shortened(name)!r} takes a string, or a list of strings",
                    f'write {{"{operator}": "…"}}',
                )
            wanted = self.operands(name, kind, operator, texts)
            return Condition(path, operator, wanted)  # type: ignore[arg-type]  # one of TEXT
        if value is None:
            raise self.wrong(
                f"{operator!r} of {shortened(name)!r} does not accept null",
                'for IS NULL write {"column": null}',
            )
        if isinstance(value, bool) and operator in ORDER:
            raise self.wrong(
                f"true and false have no order for {operator!r}", 'write {"column": true}'
            )
        operand = self.operand(name, kind, value)
        return Condition(path, operator, (operand,))  # type: ignore[arg-type]  # ORDER or "is"

    def operands(
        self, name: str, kind: ColumnKind, operator: str, values: object
    ) -> tuple[Operand, ...]:
        """A list of values, each as the column compares it."""
        if not isinstance(values, list):
            raise self.wrong(
                f"{operator!r} of {shortened(name)!r} takes a list",
                f'write {{"{operator}": [...]}}',
            )
        self.values += len(values)
        if self.values > MAX_VALUES:
            raise InvalidFilter(
                f"the filter lists more than {MAX_VALUES} values", hint="split the request"
            )
        return tuple(self.operand(name, kind, value) for value in values)

    def operand(self, name: str, kind: ColumnKind, value: object) -> Operand:
        """A value as the column compares it."""
        what, read = READERS[kind]
        operand = read(value)
        if operand is None:
            raise self.wrong(
                f"{_shown(value)} cannot be compared with {shortened(name)!r}, which holds {what}",
                "null means IS NULL",
            )
        return operand

    def wrong(self, message: str, hint: str) -> InvalidFilter:
        """The error, with the filterable columns in its hint."""
        return InvalidFilter(message, hint=f"{hint}; columns: {listed(self.columns)}")


_LISTS: dict[str, type[And | Or | NoneOf]] = {"and": And, "or": Or, "none": NoneOf}


def _constant(value: bool, slots: slice) -> Chosen:
    return np.full(slots.stop - slots.start, value)


def _shown(value: object) -> str:
    return shortened(msgspec.json.encode(value).decode())
