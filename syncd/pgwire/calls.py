"""Calls of RPC methods for SELECT statements: their parameters, and their results as rows."""

from __future__ import annotations

import types as python_types
import typing
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, Protocol

import msgspec

from syncd.errors import InvalidParams
from syncd.pgwire import types
from syncd.pgwire.errors import SqlError
from syncd.pgwire.lexer import Parameter
from syncd.pgwire.parsed import Select, Statement, Value
from syncd.pgwire.results import MOST_NAME, Column
from syncd.protocol import messages, status_messages
from syncd.protocol.messages import Params

NO_PARAMS = messages.NoParams()


@dataclass(frozen=True, slots=True)
class Unlocked:
    """The result of ``pg_advisory_unlock_all()``."""

    pg_advisory_unlock_all: str = ""


@dataclass(frozen=True, slots=True)
class Argument:
    """What an argument is: its type if the client declares none, its reader, the RPC's name."""

    oid: int
    read: Callable[[Any], Any]
    parameter: str


@dataclass(frozen=True, slots=True)
class Bound:
    """The parameters of one execution: declared types, formats, values, and their encoding."""

    oids: Sequence[int] = ()
    binary: Sequence[bool] = ()
    values: Sequence[bytes | None] = ()
    codec: str = "utf-8"


class Caller(Protocol):
    """What runs the methods of the RPC."""

    def call(self, method: str, params: Params, size: int) -> Any:
        """A method's result, or an awaitable of it; raises what the method raises."""


ARGUMENTS = {
    "dataset": Argument(types.TEXT, types.as_text, "dataset"),
    "query": Argument(types.TEXT, types.vector_bytes, "vector"),
    "query_array": Argument(types.TEXT, types.vector_from_base64, "vector"),
    "key": Argument(types.TEXT, types.as_text, "key"),
    "k": Argument(types.INT4, types.as_int, "k"),
    "filter": Argument(types.TEXT, types.as_json, "filter"),
    "recall": Argument(types.FLOAT4, types.as_float, "recall"),
    "max_distance": Argument(types.FLOAT8, types.as_float, "max_distance"),
    "fresh": Argument(types.BOOL, types.as_bool, "consistency"),
    "exact": Argument(types.BOOL, types.as_bool, "exact"),
    "after": Argument(types.TEXT, types.as_text, "after"),
    "timeout_ms": Argument(types.INT4, types.as_int, "timeout_ms"),
}
LIMIT = Argument(types.INT8, types.as_int, "")
FOUND = (Column("key", types.TEXT), Column("distance", types.FLOAT8))
UNLOCKED = (Column("pg_advisory_unlock_all", types.VOID),)


def columns_of(statement: Statement) -> list[Column]:
    """The columns of a SELECT's result; raises ``SqlError`` for one that there is not."""
    select = statement.parsed
    assert isinstance(select, Select)
    given = {column.name: column for column in _all_columns(select.function)}
    if select.columns is None:
        return list(given.values())
    found = []
    for column, label in select.columns:
        name = statement.name(column)
        if name not in given:
            raise SqlError(
                "42703",
                f"{select.function} has no column {name[:60]!r}",
                hint=f"Its columns: {', '.join(given)}.",
            )
        found.append(Column(statement.name(label)[:MOST_NAME], given[name].oid))
    return found


def parameter_oids(statement: Statement, declared: Sequence[int]) -> list[int]:
    """The types of a SELECT's parameters: declared, cast, or their argument's."""
    oids = dict(enumerate(declared, 1))
    select = statement.parsed
    if isinstance(select, Select):
        for value, argument in [
            *((value, ARGUMENTS[name]) for name, value in select.arguments.items()),
            *([(select.limit, LIMIT)] if select.limit is not None else []),
        ]:
            piece = None if value.piece is None else statement.pieces[value.piece]
            if isinstance(piece, Parameter) and oids.get(piece.number, 0) in (0, types.UNKNOWN):
                oids[piece.number] = value.oid or argument.oid
    numbers = [piece.number for piece in statement.pieces if isinstance(piece, Parameter)]
    return [oids.get(number, types.TEXT) for number in range(1, max([*numbers, *oids, 0]) + 1)]


def run(statement: Statement, bound: Bound, caller: Caller, size: int) -> Any:
    """The rows of a SELECT, or an awaitable for ``values_of``. Raises ``SqlError`` or the RPC's."""
    select = statement.parsed
    assert isinstance(select, Select)
    if select.function in ("datasets", "status"):
        return caller.call(select.function, NO_PARAMS, size)
    if select.function == "pg_advisory_unlock_all":
        return Unlocked()
    fields: dict[str, Any] = {}
    for name, value in select.arguments.items():
        argument = ARGUMENTS[name]
        given = _given(statement, value, bound)
        if given is not None:
            fields[argument.parameter] = argument.read(given)
        elif name in ("dataset", "query", "query_array", "key"):
            raise SqlError(
                "22004",
                f"the argument {name!r} is NULL",
                detail="invalid_params",
                hint="Leave out rows in which it is NULL.",
            )
    fields["consistency"] = "strong" if fields.get("consistency") else "eventual"
    try:
        params = msgspec.convert(fields, messages.SearchParams)
    except msgspec.ValidationError as error:
        raise InvalidParams(
            _named(str(error)), hint="k is 1 or more, recall between 0 and 1"
        ) from None
    params.check()
    return caller.call("search", params, size)


def values_of(statement: Statement, bound: Bound, result: Any) -> list[Sequence[Any]]:
    """A method's result as columns, those that the statement names."""
    select = statement.parsed
    assert isinstance(select, Select)
    limit = None
    if select.limit is not None:
        given = _given(statement, select.limit, bound)
        limit = None if given is None else types.as_int(given)
        if limit is not None and limit < 0:
            raise SqlError("2201W", "LIMIT must not be negative", hint="Pass a LIMIT of 0 or more.")
    names = [column.name for column in _all_columns(select.function)]
    if select.columns is not None:
        chosen = [statement.name(column) for column, _ in select.columns]
    else:
        chosen = names
    if isinstance(result, messages.SearchResult):
        found: dict[str, list[Any]] = {"key": result.keys, "distance": result.distances}
        return [found[name][:limit] for name in chosen]
    if isinstance(result, msgspec.Raw):  # many datasets, encoded in a worker thread
        result = msgspec.json.decode(result, type=list[status_messages.DatasetStatus])
    rows = (result if isinstance(result, list) else [result])[:limit]
    return [[getattr(row, name) for row in rows] for name in chosen]


def awaits(result: Any) -> bool:
    """Whether a result is still to come."""
    return isinstance(result, Awaitable)


def _given(statement: Statement, value: Value, bound: Bound) -> Any:
    if value.piece is None:
        return value.constant
    piece = statement.pieces[value.piece]
    if isinstance(piece, str):
        return piece
    place = piece.number - 1
    if not 0 <= place < len(bound.values):
        raise SqlError(
            "42P02", f"there is no parameter ${piece.number}", hint="Bind a value to it."
        )
    raw = bound.values[place]
    if raw is None:
        return None
    return types.read_parameter(bound.oids[place], bound.binary[place], raw, bound.codec)


def _all_columns(function: str) -> Sequence[Column]:
    if function == "datasets":
        return _columns_of_struct(status_messages.DatasetStatus)
    if function == "status":
        return _columns_of_struct(status_messages.ServiceStatus)
    return UNLOCKED if function == "pg_advisory_unlock_all" else FOUND


@cache
def _columns_of_struct(struct: type[msgspec.Struct]) -> Sequence[Column]:
    hints = typing.get_type_hints(struct)
    return [Column(name, _oid_of(hints[name])) for name in struct.__struct_fields__]


_PYTHON_TYPES: Mapping[Any, int] = {
    str: types.TEXT,
    bool: types.BOOL,
    int: types.INT8,
    float: types.FLOAT8,
    datetime: types.TIMESTAMPTZ,
}


def _oid_of(hint: Any) -> int:
    if typing.get_origin(hint) in (typing.Union, python_types.UnionType):
        hints = [each for each in typing.get_args(hint) if each is not type(None)]
        return _oid_of(hints[0]) if len(hints) == 1 else types.JSON
    if typing.get_origin(hint) is typing.Literal:
        return types.TEXT
    return _PYTHON_TYPES.get(hint, types.JSON)


def _named(reason: str) -> str:
    reason, _, path = reason.partition(" - at `$")
    where = path.rstrip("`").lstrip(".")
    return f"{where}: {reason[0].lower()}{reason[1:]}" if where else reason
