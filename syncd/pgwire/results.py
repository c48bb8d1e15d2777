"""Messages of results: the description of the columns, the rows, and the ends of statements.

pygwire has all of these messages. Those of every search are written here, because its own encoder
takes three times as long. Values of the protocol are big-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from pygwire import messages as pg
from pygwire.constants import TransactionStatus

from syncd.pgwire import types

MOST_NAME = 63
"""Characters of a column's name; PostgreSQL cuts names off as well."""
_SIZES = {
    types.BOOL: 1,
    types.INT2: 2,
    types.INT4: 4,
    types.INT8: 8,
    types.FLOAT4: 4,
    types.FLOAT8: 8,
    types.TIMESTAMPTZ: 8,
    types.VOID: 4,
}
_INT32 = struct.Struct("!i")
_ROW = struct.Struct("!cih")
_NULL = _INT32.pack(-1)
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_MICROSECOND = datetime.resolution


class Column(NamedTuple):
    """A column of a result."""

    name: str
    oid: int


READY = {status: pg.ReadyForQuery(status=status).to_wire() for status in TransactionStatus}
PARSE_COMPLETE = pg.ParseComplete().to_wire()
BIND_COMPLETE = pg.BindComplete().to_wire()
CLOSE_COMPLETE = pg.CloseComplete().to_wire()
NO_DATA = pg.NoData().to_wire()
EMPTY = pg.EmptyQueryResponse().to_wire()
SUSPENDED = pg.PortalSuspended().to_wire()


@lru_cache(1000)
def complete(tag: str) -> bytes:
    """The CommandComplete of a statement."""
    return pg.CommandComplete(tag=tag).to_wire()


@lru_cache(200)
def row_description(columns: tuple[Column, ...], binary: tuple[bool, ...]) -> bytes:
    """The RowDescription of a result; ``binary`` says it for each column."""
    return pg.RowDescription(
        fields=[
            pg.FieldDescription(
                name=column.name,
                type_oid=column.oid,
                type_size=_SIZES.get(column.oid, -1),
                type_modifier=-1,
                format_code=int(is_binary),
            )
            for column, is_binary in zip(columns, binary, strict=True)
        ]
    ).to_wire()


def data_rows(columns: Sequence[Sequence[bytes]]) -> list[bytes]:
    """One DataRow message for each row, from the columns of ``encoded``."""
    count, pack = len(columns), _ROW.pack
    return [
        pack(b"D", len(body) + 6, count) + body
        for body in map(b"".join, zip(*columns, strict=True))
    ]


def encoded(oid: int, is_binary: bool, codec: str, values: Sequence[Any]) -> list[bytes]:
    """A column's values, each with its length before it. Raises ``UnicodeEncodeError``."""
    pack = _INT32.pack
    return [
        _NULL if each is None else pack(len(each)) + each
        for each in _encoded(oid, is_binary, codec, values)
    ]


def _encoded(
    oid: int, is_binary: bool, codec: str, values: Sequence[Any]
) -> Sequence[bytes | None]:
    if oid == types.FLOAT8 and not is_binary:
        # All numbers in one call: 10 take 1 µs. It writes NULL, NaN and infinity as null.
        text = msgspec.json.encode(values)
        if b"null" not in text and len(values):
            return (text[1:-1] + b",").replace(b".0,", b",").split(b",")[:-1]
    return [
        # most keys are integers
        b"%d" % each
        if oid == types.TEXT and type(each) is int
        else None
        if each is None
        else _one(oid, is_binary, codec, each)
        for each in values
    ]


def _one(oid: int, is_binary: bool, codec: str, value: Any) -> bytes:
    if is_binary:
        if oid in types.NUMBERS:
            return types.NUMBERS[oid].pack(value)
        if oid == types.BOOL:
            return b"\x01" if value else b"\x00"
        if oid == types.TIMESTAMPTZ:
            return types.NUMBERS[types.INT8].pack((value - _EPOCH) // _MICROSECOND)
        if oid == types.VOID:
            return b""
    return text_of(oid, value).encode(codec)


def text_of(oid: int, value: Any) -> str:
    """A value as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "t" if value else "f"
    if oid in (types.FLOAT4, types.FLOAT8):
        number = float(value)
        if not math.isfinite(number):
            return "NaN" if number != number else "Infinity" if number > 0 else "-Infinity"
        return str(int(number)) if number.is_integer() and abs(number) < 1e15 else repr(number)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(" ", "microseconds")[:26] + "+00"
    return msgspec.json.encode(value).decode()
