"""Conversion of LlamaIndex's filters to syncd's.

They have the meaning of LlamaIndex's own ``SimpleVectorStore``. A missing key, or None, passes only
``NE``, ``NIN`` and ``IS_EMPTY``. ``NOT`` passes documents that pass none of its filters. An empty
list of filters passes every document. As in Python, True equals 1, a list is equal only as a whole,
and a text contains its parts. One difference: if two values have no order, such as a text and a
number, the document does not pass; ``SimpleVectorStore`` raises ``TypeError``.
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
"""Characters of a text as the value of ``IN``: every part of it becomes one value of the filter."""
MAX_MEMBERS = 16
"""Values of ``ANY`` and ``ALL`` that are compared with the keys of an object in the metadata.

Each of them needs a path of its own.
"""


def as_filter(filters: MetadataFilters) -> dict[str, Any]:
    """syncd's form of a filter; raises ``ValueError`` if there is none."""
    each = [
        as_filter(one) if isinstance(one, MetadataFilters) else as_condition(one)
        for one in filters.filters
    ]
    return {CONDITIONS[filters.condition]: each} if each else {}


def as_condition(condition: MetadataFilter) -> dict[str, Any]:
    """syncd's form of one comparison; raises ``ValueError`` if there is none."""
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
    kind = type(value).__name__
    raise ValueError(
        f"syncd has no filter {operator.value!r} on {key!r} for a value of type {kind}"
    )


def equal(key: str, value: Any) -> dict[str, Any]:
    """Filter: the key's value equals this one; a list as a whole."""
    if value is None:
        return on_key([key], {"in": []})  # nothing equals it
    if isinstance(value, list):
        return on_key([key], {"is": value})
    return within(key, [value])


def within(key: str, values: Any) -> dict[str, Any]:
    """Filter: the key's value is one of these, or a part of this text, as with Python's ``in``."""
    if isinstance(values, str):
        size = len(values)
        if size > MAX_SUBSTRINGS_OF:
            raise ValueError(
                f"IN and NIN on {key!r} take a list: a text of {size} characters is too long"
            )
        parts = (values[i:j] for i in range(size + 1) for j in range(i, size + 1))
        values = sorted(set(parts))
    if not isinstance(values, list):
        kind = type(values).__name__
        raise ValueError(f"IN and NIN on {key!r} take a list, got a value of type {kind}")  # noqa: TRY004
    return on_key([key], {"in": with_twins(values), "is_array": False})


def ordered(key: str, operator: str, value: Any) -> dict[str, Any]:
    """Filter: the key's value is above or below this one; True and False are 1 and 0."""
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
    """Filter: one of these is in the key's list, in its text, or a key of its object."""
    found = [on_key([key], {"any": with_twins(values), "is_array": True})]
    texts = [value for value in values if isinstance(value, str)]
    found += [on_key([key], {"text_match": texts})] if texts else []
    if len(texts) <= MAX_MEMBERS:
        found += [on_key([key, each], {"ne": None}) for each in texts]
    return {"or": found}


def contains_all(key: str, values: Sequence[Any]) -> dict[str, Any]:
    """Filter: all of these are in the key's list, in its text, or keys of its object."""
    if not values:
        return on_key([key], {"ne": None})
    if with_twins(values) == list(values):
        found = [on_key([key], {"contains": list(values), "is_array": True})]
    else:
        asked = [{"any": with_twins([each]), "is_array": True} for each in values]
        found = [{"and": [on_key([key], each) for each in asked]}]
    if all(isinstance(value, str) for value in values):
        found.append({"and": [on_key([key], {"text_match": each}) for each in values]})
        if len(values) <= MAX_MEMBERS:
            found.append({"and": [on_key([key, each], {"ne": None}) for each in values]})
    return {"or": found}


def with_twins(values: Sequence[Any]) -> list[Any]:
    """These values; after each 1 or 0 comes the True or False that equals it."""
    found: list[Any] = []
    for value in values:
        found.append(value)
        if not isinstance(value, str) and value in (0, 1):
            found.append(bool(value))
    return found
