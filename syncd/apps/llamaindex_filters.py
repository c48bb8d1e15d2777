"""LlamaIndex's filters in syncd's words, with the meaning that they have in LlamaIndex's own
``SimpleVectorStore``.

A missing key, or None, passes ``NE``, ``NIN`` and ``IS_EMPTY`` alone; ``NOT`` passes what none of
its filters does; no filters pass everything. As in Python, True equals 1, a value equals a list
only as a whole, and a text contains its parts. Where Python would compare what has no order, such
as a text with a number, and the reference store raises ``TypeError``, a document does not pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)

from syncd.apps.metadata_filters import on_key

ORDER = {
    FilterOperator.GT: "gt",
    FilterOperator.GTE: "gte",
    FilterOperator.LT: "lt",
    FilterOperator.LTE: "lte",
}
CONDITIONS = {
    FilterCondition.AND: "and",
    FilterCondition.OR: "or",
    FilterCondition.NOT: "none",
    None: "and",
}
TEXTS = {
    FilterOperator.TEXT_MATCH: "text_match",
    FilterOperator.TEXT_MATCH_INSENSITIVE: "text_match_insensitive",
}
MAX_SUBSTRINGS_OF = 100
"""Characters of a text that ``IN`` looks in: it is asked for each of its parts."""
MAX_MEMBERS = 16
"""Values of ``ANY`` and ``ALL`` that are looked for among the keys of an object in the metadata,
each by a path of its own.
"""


def as_filter(filters: MetadataFilters) -> dict[str, Any]:
    """A filter; raises ``ValueError`` for what syncd cannot ask."""
    each = [
        as_filter(one) if isinstance(one, MetadataFilters) else as_condition(one)
        for one in filters.filters
    ]
    return {CONDITIONS[filters.condition]: each} if each else {}


def as_condition(condition: MetadataFilter) -> dict[str, Any]:
    """One comparison."""
    key, operator, value = condition.key, condition.operator, condition.value
    match operator:
        case FilterOperator.IS_EMPTY:
            return {
                "or": [
                    on_key([key], {"eq": None}),
                    on_key([key], {"is": ""}),
                    on_key([key], {"is": []}),
                ]
            }
        case FilterOperator.EQ:
            return equal(key, value)
        case FilterOperator.NE:
            return {"none": [equal(key, value)]}
        case FilterOperator.IN:
            return within(key, value)
        case FilterOperator.NIN:
            return {"none": [within(key, value)]}
        case FilterOperator.CONTAINS if isinstance(value, str | int | float):
            return contains_any(key, [value])
        case FilterOperator.ANY if isinstance(value, str | list):
            return contains_any(key, list(value))
        case FilterOperator.ALL if isinstance(value, str | list):
            return contains_all(key, list(value))
        case FilterOperator.TEXT_MATCH | FilterOperator.TEXT_MATCH_INSENSITIVE if isinstance(
            value, str
        ):
            return on_key([key], {TEXTS[operator]: value})
        case _ if operator in ORDER and isinstance(value, str | int | float):
            return ordered(key, ORDER[operator], value)
    raise ValueError(
        f"syncd has no filter {operator.value!r} for a value of type {type(value).__name__}, asked "
        f"of {key!r}"
    )


def equal(key: str, value: Any) -> dict[str, Any]:
    """Its value equals this one: a list as a whole."""
    if value is None:
        return on_key([key], {"in": []})  # nothing equals it
    if isinstance(value, list):
        return on_key([key], {"is": value})
    return within(key, [value])


def within(key: str, values: Any) -> dict[str, Any]:
    """Its value is one of these, or, as Python has it, a part of this text."""
    if isinstance(values, str):
        size = len(values)
        if size > MAX_SUBSTRINGS_OF:
            raise ValueError(
                f"IN and NIN on {key!r} take a list: a text of {size} characters is too long"
            )
        values = sorted(
            {values[start:stop] for start in range(size + 1) for stop in range(start, size + 1)}
        )
    if not isinstance(values, list):
        kind = type(values).__name__
        raise ValueError(f"IN and NIN on {key!r} take a list, got a value of type {kind}")  # noqa: TRY004
    return on_key([key], {"in": with_twins(values), "is_array": False})


def ordered(key: str, operator: str, value: Any) -> dict[str, Any]:
    """Its value is above or below this one; True and False are 1 and 0."""
    asked: list[dict[str, Any]] = [{operator: value}]
    if not isinstance(value, str):
        compare = {
            "gt": float.__gt__,
            "gte": float.__ge__,
            "lt": float.__lt__,
            "lte": float.__le__,
        }[operator]
        asked += [{"is": flag} for flag in (False, True) if compare(float(flag), float(value))]
    return {"or": [on_key([key], each) for each in asked]}


def contains_any(key: str, values: Sequence[Any]) -> dict[str, Any]:
    """Its list has one of these, or its text has one of these in it, or its object has one of these
    keys.
    """
    found = [on_key([key], {"any": with_twins(values), "is_array": True})]
    texts = [value for value in values if isinstance(value, str)]
    found += [on_key([key], {"text_match": texts})] if texts else []
    found += (
        [on_key([key, each], {"ne": None}) for each in texts] if len(texts) <= MAX_MEMBERS else []
    )
    return {"or": found}


def contains_all(key: str, values: Sequence[Any]) -> dict[str, Any]:
    """The same of every one of these."""
    if not values:
        return on_key([key], {"ne": None})
    if with_twins(values) == list(values):
        found = [on_key([key], {"contains": list(values), "is_array": True})]
    else:
        found = [
            {
                "and": [
                    on_key([key], {"any": with_twins([each]), "is_array": True}) for each in values
                ]
            }
        ]
    if all(isinstance(value, str) for value in values):
        found.append({"and": [on_key([key], {"text_match": each}) for each in values]})
        found += (
            [{"and": [on_key([key, each], {"ne": None}) for each in values]}]
            if len(values) <= MAX_MEMBERS
            else []
        )
    return {"or": found}


def with_twins(values: Sequence[Any]) -> list[Any]:
    """These values, and after a 1 or a 0 the True or False that equals it."""
    return [
        twin
        for value in values
        for twin in (
            [value, bool(value)] if not isinstance(value, str) and value in (0, 1) else [value]
        )
    ]
