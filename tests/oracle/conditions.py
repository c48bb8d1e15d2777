"""Random filters over a table with a column of every kind, and what each means in SQL, written without a look at how syncd evaluates it."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st
from psycopg import sql

TEXTS = [
    "",
    "a",
    "A",
    "b",
    "ab",
    "a ",
    "ä",
    "Z",
    "\U0001f600",
    "\uffee",
    "null",
    "1",
    "true",
    '"',
    "x" * 300,
]
FLOATS = [
    0.0,
    -0.0,
    0.1,
    0.5,
    1.0,
    1.5,
    -2.5,
    3e38,
    1e39,
    5e-324,
    1.7976931348623157e308,
    0.30000000000000004,
    16777217.0,
]
INTEGERS = [
    0,
    1,
    -1,
    2,
    7,
    2**15 - 1,
    2**31 - 1,
    -(2**31),
    2**53,
    2**53 + 1,
    2**63 - 1,
    -(2**63),
    2**63,
    10**30,
]
DIGITS = [
    "0.1", "0.10", "0.1000000000000000055511151231257827021181583404541015625", "0.10000000000000000001", "9007199254740992",
    "9007199254740993", "9007199254740992.5", "1" + "0" * 400, "1" + "0" * 399 + "1", "0." + "0" * 400 + "1", "0", "-1.5", "1e300",
]  # fmt: skip
WORDS = ["NaN", "Infinity", "-Infinity"]
INSTANTS = [
    "2000-01-01 00:00:00", "1999-12-31 22:00:00", "2000-01-01 11:30:00",
    "1999-12-31 23:59:59.999999", "2024-02-29 12:30:00.5", "0044-03-15 12:00:00 BC", "0001-02-29 12:00:00 BC", "12024-05-06 07:08:09",
    "294276-12-31 23:59:59", "4713-01-01 00:00:00 BC", "infinity", "-infinity", "2024-02-29 12:30:00",
]  # fmt: skip
ASKED_INSTANTS = [
    "2000-01-01T00:00:00", "2024-02-29T12:30:00.500000", "2024-02-29", "infinity", "-infinity", "12024-05-06 07:08:09",
    "0044-03-15 12:00:00 BC", "1999-12-31T22:00:00", "2000-01-01T11:30:00",
]  # fmt: skip
ZONES = ["Z", "+02:00", "-11:30", "+00:00"]
DATES = [
    "2000-01-01",
    "1999-12-31",
    "2024-02-29",
    "0044-03-15 BC",
    "5874897-12-31",
    "5874897-12-30",
    "4714-11-24 BC",
    "infinity",
    "-infinity",
]
UUIDS = [str(uuid.UUID(int=number)) for number in (0, 1, 2**127, 2**128 - 1)]
MOODS = ["sad", "ok", "happy"]
ASCII = ["", "a", "A", "AB", "Ab", "x"]
"""Which every collation turns into the same lower case."""
DOTTED = [["a.b"], ["a", "b"], ["a.b", "c.d"], [""], ["not"], ["path"], ["lang"]]
"""Keys as a list: of those with dots, and those that are words of the language."""

NUMBERS = [*FLOATS, *INTEGERS, -1.5, 0.1 + 2**-60]

numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**70), 2**70))
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4)


def whole(bits: int) -> list[int]:
    """Integers that fit."""
    return [number for number in INTEGERS if -(2 ** (bits - 1)) <= number < 2 ** (bits - 1)]


@dataclass(frozen=True)
class ColumnOf:
    """A column: its type, values for its rows as Postgres reads them, and operands for its filters as JSON has them."""

    type: str
    samples: list[Any]
    asked_samples: list[Any]
    compared: str
    """The SQL of the column ({0}) as it is compared."""
    operand: str
    """The SQL of an operand ({0}, a parameter)."""
    more: st.SearchStrategy[Any] = field(default_factory=st.nothing)
    more_asked: st.SearchStrategy[Any] = field(default_factory=st.nothing)
    ordered: bool = True
    array: bool = False

    @property
    def values(self) -> st.SearchStrategy[Any]:
        """For rows."""
        return st.one_of(st.sampled_from(self.samples), self.more)

    @property
    def operands(self) -> st.SearchStrategy[Any]:
        """For filters."""
        return st.one_of(st.sampled_from(self.asked_samples), self.more_asked)

    @property
    def operators(self) -> tuple[str, ...]:
        """Of one operand."""
        if self.array:
            return ("eq", "ne", "contains")
        return ("eq", "ne", "gt", "gte", "lt", "lte") if self.ordered else ("eq", "ne")


JSON_SCALARS = [None, True, False, *TEXTS, *NUMBERS, *map(Decimal, DIGITS)]
JSON_SAMPLES = [*JSON_SCALARS, [], ["a"], ["a", 1, None], [["a"]], [True], {}, {"lang": "a"}]
json_scalars = st.one_of(st.sampled_from(JSON_SCALARS), texts, numbers)
json_values = st.one_of(
    st.sampled_from(JSON_SAMPLES), json_scalars, st.lists(json_scalars, max_size=3)
)
documents = st.one_of(
    st.fixed_dictionaries(
        {},
        optional={
            "lang": json_values,
            "n": json_values,
            "deep": st.one_of(json_values, st.fixed_dictionaries({"x": json_values})),
            "a.b": st.one_of(json_values, st.fixed_dictionaries({"c.d": json_values})),
            "a": st.fixed_dictionaries({"b": json_values}),
            "": json_values,
            "not": json_values,
            "path": json_values,
        },
    ),
    json_values,
)


def written(document: Any) -> str:
    """JSON with the digits of a ``Decimal``."""
    if isinstance(document, Decimal):
        return format(document, "f")
    if isinstance(document, dict):
        return (
            "{"
            + ",".join(f"{json.dumps(key)}:{written(value)}" for key, value in document.items())
            + "}"
        )
    return (
        f"[{','.join(map(written, document))}]"
        if isinstance(document, list)
        else json.dumps(document)
    )


CASED = '{0} COLLATE "C"'
COLUMNS = {
    "small": ColumnOf("smallint", whole(16), NUMBERS, "{0}::numeric", "{0}::numeric", st.integers(-9, 9), numbers),
    "whole": ColumnOf("integer", whole(32), NUMBERS, "{0}::numeric", "{0}::numeric", st.integers(-9, 9), numbers),
    "large": ColumnOf("bigint", whole(64), NUMBERS, "{0}::numeric", "{0}::numeric", st.integers(-9, 9), numbers),
    "single": ColumnOf(
        "real", [*WORDS, "0.1", "0", "-0", "1.5", "16777216", "3e38"], [*WORDS, 0, 0.1, 1.5, 16777217, 3e38],
        "{0}", "{0}::real", st.floats(width=32).map(repr), st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    "double": ColumnOf(
        "double precision", [*WORDS, *map(repr, NUMBERS)], [*WORDS, *NUMBERS],
        "{0}", "{0}::double precision", numbers.map(repr), numbers,
    ),
    "exact": ColumnOf("numeric", [*WORDS, *DIGITS], [*WORDS, *NUMBERS, 10**400], "{0}", "{0}::numeric", numbers.map(repr), numbers),
    "word": ColumnOf("text", TEXTS, TEXTS, CASED, "{0}::text", texts, texts),
    "short": ColumnOf("varchar(300)", TEXTS, TEXTS, CASED, "{0}::text", texts, texts),
    "padded": ColumnOf("char(6)", [*TEXTS[:-1], "a\t"], TEXTS, CASED, "{0}::bpchar", texts, texts),
    "named": ColumnOf("label", TEXTS, TEXTS, CASED, "{0}::text", texts, texts),
    "mood": ColumnOf("mood", MOODS, [*MOODS, "bored"], "{0}::text", "{0}::text", ordered=False),
    "flag": ColumnOf("boolean", [True, False], [True, False], "{0}", "{0}::boolean", ordered=False),
    "uid": ColumnOf("uuid", UUIDS, [*UUIDS, UUIDS[2].upper(), UUIDS[1].replace("-", "")], "{0}", "{0}::uuid"),
    "at": ColumnOf(
        "timestamptz", INSTANTS, [*ASKED_INSTANTS, *(f"{when}{zone}" for when in ASKED_INSTANTS[:2] for zone in ZONES)],
        "{0}", "{0}::timestamptz",
    ),
    "local": ColumnOf("timestamp", INSTANTS, ASKED_INSTANTS, "{0}", "{0}::timestamp"),
    "day": ColumnOf("date", DATES, DATES, "{0}", "{0}::date"),
    "tags": ColumnOf(
        "text[]", [[], ["a"], ["a", None], [None], ["", "b", "a"], [["a", "b"], ["c", None]]], TEXTS,
        "{0}", "{0}::text", st.lists(st.one_of(st.none(), texts), max_size=3), texts, array=True,
    ),
    "counts": ColumnOf("bigint[]", [[], [1], [1, None], [0, 2**63 - 1]], whole(64), "{0}", "{0}::bigint", array=True),
    "moods": ColumnOf("mood[]", [[], ["sad"], ["ok", "sad"], [None]], MOODS, "{0}", "{0}::mood", array=True),
}  # fmt: skip
"""``label`` is a domain over text, ``mood`` an enum."""

CREATE = [
    "CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy')",
    "CREATE DOMAIN label AS text CHECK (VALUE <> 'forbidden')",
    "CREATE TABLE facts (id int PRIMARY KEY, v real[] NOT NULL DEFAULT '{1,2}', attributes jsonb, "
    + ", ".join(f"{name} {column.type}" for name, column in COLUMNS.items())
    + ")",
    f"SELECT syncd.attach('facts', vector => 'v', metric => 'l2', columns => '{{attributes,{','.join(COLUMNS)}}}')",
]

paths = st.sampled_from(
    [
        "attributes",
        "attributes.lang",
        "attributes.n",
        "attributes.deep",
        "attributes.deep.x",
        "attributes.none",
    ]
)


def asked(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Conditions on one column."""
    column = COLUMNS.get(name)
    operands = (
        column.operands
        if column is not None
        else st.one_of(st.sampled_from([*TEXTS, *NUMBERS]), st.booleans(), texts, numbers)
    )
    nothing_or = st.one_of(st.none(), operands)
    operators: dict[str, st.SearchStrategy[Any]] = {
        "eq": nothing_or,
        "ne": nothing_or,
        "in": st.lists(nothing_or, max_size=12),
    }
    if column is None or column.array:
        operators |= {
            "contains": st.one_of(operands, st.lists(operands, max_size=3)),
            "any": st.lists(operands, max_size=3),
        }
    if column is None or "gt" in column.operators:
        ordered = operands.filter(lambda value: not isinstance(value, bool))
        operators |= dict.fromkeys(("gt", "gte", "lt", "lte"), ordered)
    if column is None or column.type in ("text", "varchar(300)", "char(6)", "label"):
        some_texts = st.lists(st.sampled_from(ASCII), min_size=1, max_size=3)
        operators |= {
            "text_match": some_texts | texts | st.sampled_from(TEXTS),
            "text_match_insensitive": st.sampled_from(ASCII),
        }
    if column is None:
        arrays = st.lists(operands, max_size=3)
        operators |= {"is": st.one_of(nothing_or, arrays), "is_array": st.booleans()}
    some = st.sampled_from(sorted(operators)).flatmap(
        lambda word: st.fixed_dictionaries({word: operators[word]})
    )
    two = st.tuples(some, some).map(lambda both: both[0] | both[1])
    return st.one_of(nothing_or, some, some, two).map(lambda value: {name: value})


def asked_by_list(keys: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Conditions on what a list of keys leads to."""
    return asked("attributes.any").map(
        lambda wanted: {
            "attributes": {"path": keys}
            | (each if isinstance(each := wanted["attributes.any"], dict) else {"eq": each})
        }
    )


def filters(columns: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    """Filters on some of the columns."""
    by_list = st.sampled_from(DOTTED).flatmap(asked_by_list)
    return st.recursive(
        st.sampled_from(columns).flatmap(
            lambda name: (
                st.one_of(paths.flatmap(asked), by_list) if name == "attributes" else asked(name)
            )
        ),
        lambda inner: st.one_of(
            inner.map(lambda one: {"not": one}),
            st.lists(inner, min_size=1, max_size=3).map(lambda some: {"none": some}),
            st.lists(inner, min_size=1, max_size=3).map(lambda some: {"or": some}),
            st.lists(inner, min_size=1, max_size=3).map(lambda some: {"and": some}),
            st.tuples(inner, inner).map(lambda both: both[0] | both[1]),
        ),
        max_leaves=4,
    )


@st.composite
def tables_and_filters(draw: st.DrawFn) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of which some columns have values, and filters on these."""
    columns = draw(
        st.lists(st.sampled_from(["attributes", *COLUMNS]), min_size=1, max_size=3, unique=True)
    )
    values = {
        name: COLUMNS[name].values if name in COLUMNS else documents.map(written)
        for name in columns
    }
    row = st.fixed_dictionaries(
        {name: st.one_of(st.none(), each, each, each) for name, each in values.items()}
    )
    return draw(st.lists(row, min_size=1, max_size=12)), draw(
        st.lists(filters(columns), min_size=4, max_size=8)
    )


def condition(wanted: dict[str, Any]) -> sql.Composable:
    """The same as SQL."""
    parts: list[sql.Composable] = [sql.SQL("true")]
    for name, value in wanted.items():
        if name == "not":
            parts.append(sql.SQL("NOT ({})").format(condition(value)))
        elif name in ("or", "and"):
            parts.append(
                sql.SQL("({})").format(sql.SQL(f" {name.upper()} ").join(map(condition, value)))
            )
        elif name == "none":
            parts.append(
                sql.SQL("({}) IS NOT TRUE").format(sql.SQL(" OR ").join(map(condition, value)))
            )
        elif isinstance(value, dict):
            keys = value.get("path", [])
            parts += [
                compared(name, operator, operand, keys)
                for operator, operand in value.items()
                if operator != "path"
            ]
        else:
            parts.append(compared(name, "eq", value))
    return sql.SQL(" AND ").join(sql.SQL("({})").format(part) for part in parts)


def compared(name: str, operator: str, value: Any, keys: Sequence[str] = ()) -> sql.Composable:
    """One comparison, of a column or of what keys lead to in it."""
    column, _, path = name.partition(".")
    kind = COLUMNS.get(column)
    left: sql.Composable = sql.Identifier(column)
    if kind is None:
        left = sql.SQL("nullif({} #> {}, 'null')").format(
            left, sql.Literal([*(path.split(".") if path else []), *keys])
        )
    is_null = sql.SQL("{} IS NULL").format(left)
    match operator:
        case "ne":
            return sql.SQL("NOT ({})").format(compared(name, "eq", value, keys))
        case "eq":
            return is_null if value is None else one_of(left, kind, [value])
        case "in":
            given = [each for each in value if each is not None]
            found = one_of(left, kind, given) if given else sql.SQL("false")
            return found if given == value else sql.SQL("({} OR {})").format(found, is_null)
        case "any":
            return known(left, sql.SQL("false")) if not value else one_of(left, kind, value)
        case "contains":
            every = value if isinstance(value, list) else [value]
            if not every:
                return known(left, sql.SQL("true"))
            return sql.SQL(" AND ").join(one_of(left, kind, [each]) for each in every)
        case "is" if value is None:
            return is_null
        case "is":
            exact = (
                [Decimal(repr(each)) if isinstance(each, float) else each for each in value]
                if isinstance(value, list)
                else value
            )
            return sql.SQL("{} = {}::jsonb").format(
                left,
                sql.Literal(written(Decimal(repr(exact)) if isinstance(exact, float) else exact)),
            )
        case "is_array":
            return sql.SQL("(jsonb_typeof({}) = 'array') = {}").format(left, sql.Literal(value))
        case "text_match" | "text_match_insensitive" if isinstance(value, list):
            return sql.SQL("({})").format(
                sql.SQL(" OR ").join(compared(name, operator, each, keys) for each in value)
            )
        case "text_match" | "text_match_insensitive":
            text = sql.SQL("{}::text").format(left)
            if kind is None:
                text = sql.SQL(
                    "CASE WHEN jsonb_typeof({0}) = 'string' THEN {0} #>> '{{}}' END"
                ).format(left)
            query = (
                "position(lower({}) in lower({})) > 0"
                if operator.endswith("insensitive")
                else "position({} in {}) > 0"
            )
            return sql.SQL(query).format(sql.Literal(value), text)
    sign = sql.SQL({"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}[operator])
    if kind is not None:
        shown = sql.SQL(kind.compared).format(left)
        return sql.SQL("{} {} {}").format(shown, sign, operand_of(kind, value))
    if isinstance(value, str):
        inner = sql.SQL("({} #>> '{{}}') COLLATE \"C\" {} {}").format(
            left, sign, sql.Literal(value)
        )
        return sql.SQL("CASE WHEN jsonb_typeof({}) = 'string' THEN {} END").format(left, inner)
    inner = sql.SQL("({} #>> '{{}}')::numeric {} {}::numeric").format(left, sign, literal(value))
    return sql.SQL("CASE WHEN jsonb_typeof({}) = 'number' THEN {} END").format(left, inner)


def known(left: sql.Composable, answer: sql.Composable) -> sql.Composable:
    """An answer for whatever is not NULL."""
    return sql.SQL("CASE WHEN {} IS NOT NULL THEN {} END").format(left, answer)


def one_of(left: sql.Composable, kind: ColumnOf | None, values: list[Any]) -> sql.Composable:
    """Whether a column is, or an array has, one of some values."""
    if kind is None:
        documents = [
            written(Decimal(repr(value)) if isinstance(value, float) else value) for value in values
        ]
        parts = [
            sql.SQL("{} @> {}::jsonb").format(left, sql.Literal(document)) for document in documents
        ]
        return sql.SQL("({})").format(sql.SQL(" OR ").join(parts))
    operands = sql.SQL(", ").join(operand_of(kind, value) for value in values)
    if kind.array:
        return sql.SQL("{} && ARRAY[{}]").format(left, operands)
    return sql.SQL("{} IN ({})").format(sql.SQL(kind.compared).format(left), operands)


def operand_of(kind: ColumnOf, value: Any) -> sql.Composable:
    """An operand of a column's type."""
    return sql.SQL(kind.operand).format(literal(value))


def literal(value: Any) -> sql.Composable:
    """A number or a string as it was written."""
    if isinstance(value, float):
        return sql.Literal(repr(value) if math.isfinite(value) else str(value))
    return sql.Literal(
        str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    )
