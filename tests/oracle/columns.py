"""Columns of every kind: values for rows, operands for filters, and their form in SQL."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st

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
    "0.1", "0.10", "0.1000000000000000055511151231257827021181583404541015625",
    "0.10000000000000000001", "9007199254740992", "9007199254740993", "9007199254740992.5",
    "1" + "0" * 400, "1" + "0" * 399 + "1", "0." + "0" * 400 + "1", "0", "-1.5", "1e300",
]  # fmt: skip
WORDS = ["NaN", "Infinity", "-Infinity"]
INSTANTS = [
    "2000-01-01 00:00:00", "1999-12-31 22:00:00", "2000-01-01 11:30:00",
    "1999-12-31 23:59:59.999999", "2024-02-29 12:30:00.5", "0044-03-15 12:00:00 BC",
    "0001-02-29 12:00:00 BC", "12024-05-06 07:08:09", "294276-12-31 23:59:59",
    "4713-01-01 00:00:00 BC", "infinity", "-infinity", "2024-02-29 12:30:00",
]  # fmt: skip
ASKED_INSTANTS = [
    "2000-01-01T00:00:00", "2024-02-29T12:30:00.500000", "2024-02-29", "infinity", "-infinity",
    "12024-05-06 07:08:09", "0044-03-15 12:00:00 BC", "1999-12-31T22:00:00", "2000-01-01T11:30:00",
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
"""Texts that every collation turns into the same lower case."""
DOTTED = [["a.b"], ["a", "b"], ["a.b", "c.d"], [""], ["not"], ["path"], ["lang"]]
"""Keys as a list: keys with dots, and keys that are words of the filter language."""

NUMBERS = [*FLOATS, *INTEGERS, -1.5, 0.1 + 2**-60]

numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**70), 2**70))
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4)


def whole(bits: int) -> list[int]:
    """Integers of at most this many bits."""
    return [number for number in INTEGERS if -(2 ** (bits - 1)) <= number < 2 ** (bits - 1)]


@dataclass(frozen=True)
class ColumnOf:
    """A column: its type, values for rows as PostgreSQL reads them, and operands of filters."""

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
        """Values for rows."""
        return st.one_of(st.sampled_from(self.samples), self.more)

    @property
    def operands(self) -> st.SearchStrategy[Any]:
        """Operands for filters."""
        return st.one_of(st.sampled_from(self.asked_samples), self.more_asked)

    @property
    def operators(self) -> tuple[str, ...]:
        """Operators with one operand."""
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
    """A document as JSON, with all digits of a ``Decimal``."""
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


ASKED_WITH_ZONES = [f"{when}{zone}" for when in ASKED_INSTANTS[:2] for zone in ZONES]
TAGS = [[], ["a"], ["a", None], [None], ["", "b", "a"], [["a", "b"], ["c", None]]]
COUNTS = [[], [1], [1, None], [0, 2**63 - 1]]
CASED = '{0} COLLATE "C"'
NUMERIC = ("{0}::numeric", "{0}::numeric", st.integers(-9, 9), numbers)
"""How every integer column is compared, with more values and operands for it."""

COLUMNS = {
    "small": ColumnOf("smallint", whole(16), NUMBERS, *NUMERIC),
    "whole": ColumnOf("integer", whole(32), NUMBERS, *NUMERIC),
    "large": ColumnOf("bigint", whole(64), NUMBERS, *NUMERIC),
    "single": ColumnOf(
        "real", [*WORDS, "0.1", "0", "-0", "1.5", "16777216", "3e38"],
        [*WORDS, 0, 0.1, 1.5, 16777217, 3e38], "{0}", "{0}::real",
        st.floats(width=32).map(repr), st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
    "double": ColumnOf(
        "double precision", [*WORDS, *map(repr, NUMBERS)], [*WORDS, *NUMBERS],
        "{0}", "{0}::double precision", numbers.map(repr), numbers,
    ),
    "exact": ColumnOf(
        "numeric", [*WORDS, *DIGITS], [*WORDS, *NUMBERS, 10**400],
        "{0}", "{0}::numeric", numbers.map(repr), numbers,
    ),
    "word": ColumnOf("text", TEXTS, TEXTS, CASED, "{0}::text", texts, texts),
    "short": ColumnOf("varchar(300)", TEXTS, TEXTS, CASED, "{0}::text", texts, texts),
    "padded": ColumnOf("char(6)", [*TEXTS[:-1], "a\t"], TEXTS, CASED, "{0}::bpchar", texts, texts),
    "named": ColumnOf("label", TEXTS, TEXTS, CASED, "{0}::text", texts, texts),
    "mood": ColumnOf("mood", MOODS, [*MOODS, "bored"], "{0}::text", "{0}::text", ordered=False),
    "flag": ColumnOf("boolean", [True, False], [True, False], "{0}", "{0}::boolean", ordered=False),
    "uid": ColumnOf(
        "uuid", UUIDS, [*UUIDS, UUIDS[2].upper(), UUIDS[1].replace("-", "")], "{0}", "{0}::uuid"
    ),
    "at": ColumnOf(
        "timestamptz", INSTANTS, [*ASKED_INSTANTS, *ASKED_WITH_ZONES], "{0}", "{0}::timestamptz"
    ),
    "local": ColumnOf("timestamp", INSTANTS, ASKED_INSTANTS, "{0}", "{0}::timestamp"),
    "day": ColumnOf("date", DATES, DATES, "{0}", "{0}::date"),
    "tags": ColumnOf(
        "text[]", TAGS, TEXTS, "{0}", "{0}::text",
        st.lists(st.one_of(st.none(), texts), max_size=3), texts, array=True,
    ),
    "counts": ColumnOf("bigint[]", COUNTS, whole(64), "{0}", "{0}::bigint", array=True),
    "moods": ColumnOf(
        "mood[]", [[], ["sad"], ["ok", "sad"], [None]], MOODS, "{0}", "{0}::mood", array=True
    ),
}  # fmt: skip
"""A column of each kind. ``label`` is a domain over text, ``mood`` an enum."""

CREATE = [
    "CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy')",
    "CREATE DOMAIN label AS text CHECK (VALUE <> 'forbidden')",
    "CREATE TABLE facts (id int PRIMARY KEY, v real[] NOT NULL DEFAULT '{1,2}', attributes jsonb, "
    + ", ".join(f"{name} {column.type}" for name, column in COLUMNS.items())
    + ")",
    "SELECT syncd.attach('facts', vector => 'v', metric => 'l2', "
    f"columns => '{{attributes,{','.join(COLUMNS)}}}')",
]
