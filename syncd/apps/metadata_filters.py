"""Conversion of LangChain's filters over metadata to syncd filters over the table's column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from syncd.errors import InvalidFilter
from syncd.index.filter.language import MAX_PATH_KEYS

METADATA = "metadata"
WORDS = ("eq", "ne", "in", "gt", "gte", "lt", "lte", "and", "or", "not")
"""Words that may begin with a ``$``, as in the filters of LangChain's other stores."""


def on_key(keys: Sequence[str], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Filter over one key of the metadata, which may have any characters."""
    return {METADATA: {"path": list(keys), **asked}}


def on_metadata(conditions: object) -> dict[str, Any]:
    """syncd's form of ``{"lang": "en", "year": {"gte": 2020}, "not": {…}, "or": [{…}]}``.

    A name with dots is a key of that name; in documents that lack this key it is a path. A list is
    compared as a whole. Raises ``InvalidFilter``.
    """
    if not isinstance(conditions, Mapping):
        raise InvalidFilter(
            f"expected a filter as a dict, got a value of type {type(conditions).__name__}",
            hint='write {"lang": "en", "year": {"gte": 2020}}',
        )
    parts: list[dict[str, Any]] = []
    for given, value in conditions.items():
        name = without_dollar(given)
        if name == "not" and isinstance(value, Mapping):
            parts.append({"not": on_metadata(value)})
        elif name in ("and", "or", "none") and isinstance(value, list | tuple):
            parts.append({name: [on_metadata(each) for each in value]})
        else:
            parts.append(on_name(given, value))
    return parts[0] if len(parts) == 1 else {"and": parts} if parts else {}


def on_name(name: object, value: object) -> dict[str, Any]:
    """Filter over one name; raises ``InvalidFilter``."""
    if not isinstance(name, str):
        raise InvalidFilter(
            f"expected a key of the metadata as text, got {name!r:.100}",
            hint='write {"lang": "en"}',
        )
    if isinstance(value, Mapping):
        asked = {without_dollar(operator): operand for operator, operand in value.items()}
    else:
        asked = {"is" if isinstance(value, list | tuple) else "eq": value}
    deeper = asked.pop("path", [])
    if not isinstance(deeper, list | tuple):
        raise InvalidFilter(
            f"'path' of {name!r:.100} takes a list of keys",
            hint=f'write {{"{name}": {{"path": ["a.b"]}}}}',
        )
    keys, parts = [name, *deeper], [*name.split("."), *deeper]
    if len(keys) == len(parts) or len(parts) > MAX_PATH_KEYS:
        return on_key(keys, asked)
    there, lacking = on_key(keys, {"ne": None}), on_key(keys, {"eq": None})
    return {"or": [{"and": [there, on_key(keys, asked)]}, {"and": [lacking, on_key(parts, asked)]}]}


def without_dollar(word: Any) -> Any:
    """An operator or a condition without a leading ``$``."""
    if isinstance(word, str) and word.startswith("$") and word[1:] in WORDS:
        return word[1:]
    return word
