"""Random filters over a table with a column of every kind, and the same conditions in SQL.

The SQL is written without a look at how syncd evaluates a filter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from hypothesis import strategies as st
from psycopg import sql

from tests.oracle.columns import (
    ASCII,
    COLUMNS,
    DOTTED,
    NUMBERS,
    TEXTS,
    ColumnOf,
    documents,
    numbers,
    texts,
    written,
)

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
    """Conditions on the value that a list of keys leads to."""
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
    """Rows with values in some columns, and filters on these columns."""
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
    """A filter as SQL."""
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
    """One comparison: of a column, or of the value that keys lead to in it."""
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
    """An answer for values that are not NULL."""
    return sql.SQL("CASE WHEN {} IS NOT NULL THEN {} END").format(left, answer)


def one_of(left: sql.Composable, kind: ColumnOf | None, values: list[Any]) -> sql.Composable:
    """Whether a column is one of some values, or an array contains one."""
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
    """An operand of the column's type."""
    return sql.SQL(kind.operand).format(literal(value))


def literal(value: Any) -> sql.Composable:
    """A number or a string as it was written."""
    if isinstance(value, float):
        return sql.Literal(repr(value) if math.isfinite(value) else str(value))
    return sql.Literal(
        str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    )
