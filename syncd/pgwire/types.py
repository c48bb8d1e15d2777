"""PostgreSQL's types on the wire: values of parameters, in text and in binary.

Values of the protocol are big-endian. The codes are the OIDs of pg_type, which never change.
"""

from __future__ import annotations

import base64
import binascii
import struct
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from syncd.pgwire.errors import INVALID_TEXT, SqlError, not_supported

BOOL, BYTEA, INT8, INT2, INT4, TEXT, JSON = 16, 17, 20, 21, 23, 25, 114
FLOAT4, FLOAT8, UNKNOWN, VARCHAR, BPCHAR, NAME = 700, 701, 705, 1043, 1042, 19
TIMESTAMPTZ, NUMERIC, UUID, VOID, JSONB = 1184, 1700, 2950, 2278, 3802
INT2_ARRAY, INT4_ARRAY, INT8_ARRAY, NUMERIC_ARRAY = 1005, 1007, 1016, 1231
FLOAT4_ARRAY, FLOAT8_ARRAY = 1021, 1022

OIDS = {
    "text": TEXT,
    "varchar": TEXT,
    "json": JSON,
    "jsonb": JSONB,
    "uuid": TEXT,
    "boolean": BOOL,
    "smallint": INT2,
    "int": INT4,
    "bigint": INT8,
    "real": FLOAT4,
    "double precision": FLOAT8,
    "decimal": NUMERIC,
    "numeric": NUMERIC,
    "real[]": FLOAT4_ARRAY,
    "double precision[]": FLOAT8_ARRAY,
    "decimal[]": NUMERIC_ARRAY,
    "numeric[]": NUMERIC_ARRAY,
    "smallint[]": INT2_ARRAY,
    "int[]": INT4_ARRAY,
    "bigint[]": INT8_ARRAY,
    "vector": TEXT,  # pgvector's types have no fixed OID; their text form is the vector's
    "halfvec": TEXT,
}
"""The types that a statement may cast an argument to, by sqlglot's names."""
MOST_NUMBERS = 250_000
"""Numbers of a vector that is a text: the event loop reads as many in about 20 ms."""
_TEXTS = frozenset({0, TEXT, UNKNOWN, VARCHAR, BPCHAR, NAME, JSON, NUMERIC, UUID})
_ELEMENTS = {INT2: "i2", INT4: "i4", INT8: "i8", FLOAT4: "f4", FLOAT8: "f8"}
_ARRAYS = {
    INT2_ARRAY: INT2,
    INT4_ARRAY: INT4,
    INT8_ARRAY: INT8,
    FLOAT4_ARRAY: FLOAT4,
    FLOAT8_ARRAY: FLOAT8,
    NUMERIC_ARRAY: NUMERIC,
}
NUMBERS: dict[int, struct.Struct] = {
    INT2: struct.Struct("!h"),
    INT4: struct.Struct("!i"),
    INT8: struct.Struct("!q"),
    FLOAT4: struct.Struct("!f"),
    FLOAT8: struct.Struct("!d"),
}
"""The binary form of each type of numbers."""
_floats = msgspec.json.Decoder(list[float])


def read_parameter(oid: int, is_binary: bool, raw: bytes, codec: str) -> Any:
    """A parameter's value: text, number, truth value or vector. Raises ``SqlError``."""
    if not is_binary or (oid in _TEXTS and oid not in (NUMERIC, UUID)):
        try:
            return raw.decode(codec)
        except UnicodeDecodeError:
            raise SqlError(
                "22021", f"a parameter is not valid {codec}", hint="Set client_encoding."
            ) from None
    try:
        if oid in NUMBERS:
            return NUMBERS[oid].unpack(raw)[0]
        if oid == BOOL:
            return raw == b"\x01"
        if oid == JSONB and raw[:1] == b"\x01":
            return raw[1:].decode(codec)
        if oid == BYTEA:
            return np.frombuffer(raw, "<f4")
        if oid in _ARRAYS:
            return read_array(raw)
    except (struct.error, ValueError):
        raise SqlError(
            "22P03", "a binary parameter is malformed", hint="Send it as text."
        ) from None
    raise not_supported(f"a binary parameter of type {oid}")


def read_array(raw: bytes) -> NDArray[np.number[Any]]:
    """The numbers of an array in PostgreSQL's binary form (``array_send``).

    Raises ``ValueError`` or ``struct.error``.
    """
    dimensions, _, element = struct.unpack_from("!iii", raw)
    if not dimensions:
        return np.empty(0, dtype=np.float32)
    count, _ = struct.unpack_from("!ii", raw, 12)
    kind = np.dtype(_ELEMENTS.get(element, "V0")).newbyteorder(">")
    row = np.dtype([("size", ">i4"), ("value", kind)])
    if dimensions != 1 or not kind.itemsize or len(raw) != 20 + count * row.itemsize:
        raise ValueError("an array of numbers has one dimension and no NULL")
    rows = np.frombuffer(raw, row, offset=20)
    if not (rows["size"] == kind.itemsize).all():
        raise ValueError("an array of numbers has no NULL")
    return rows["value"]


def vector_bytes(value: Any) -> bytes | list[float]:
    """A vector as the RPC takes it, from its text, an array, or PostgreSQL's binary array."""
    if isinstance(value, np.ndarray):
        with np.errstate(over="ignore"):  # too large for float32: infinity, which the RPC refuses
            return value.astype("<f4").tobytes()
    if isinstance(value, str):
        text = value.strip()
        if text.count(",") >= MOST_NUMBERS:
            raise SqlError(
                "54000",
                f"the vector has more than {MOST_NUMBERS} numbers",
                detail="too_large",
                hint="Pass a vector of the dataset's dimension.",
            )
        if text[:1] == "{" and text[-1:] == "}":
            text = f"[{text[1:-1]}]"
        try:
            return _floats.decode(text)
        except msgspec.MsgspecError:
            pass
    raise _invalid("a vector", value, "Write a vector as '[0.1, 0.2, 0.3]'.")


def vector_from_base64(value: Any) -> bytes | list[float]:
    """A vector from the base64 of a ``real[]`` in PostgreSQL's binary form."""
    try:
        return vector_bytes(read_array(base64.b64decode(value)))
    except (binascii.Error, ValueError, TypeError, struct.error):
        raise SqlError(
            INVALID_TEXT,
            "the vector is not an array of one dimension without NULL",
            detail="invalid_params",
            hint="Pass an array such as ARRAY[0.1, 0.2, 0.3].",
        ) from None


def as_text(value: Any) -> str:
    """An argument of type text."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    raise _invalid("a text", value, "Pass a text.")


def as_int(value: Any) -> int:
    """An argument of type integer."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.strip()
        digits = text[1:] if text[:1] in ("-", "+") else text
        if digits.isascii() and digits.isdigit() and len(digits) < 20:
            return int(text)
    raise _invalid("an integer", value, "Pass a whole number.")


def as_float(value: Any) -> float:
    """An argument of type real or double precision."""
    try:
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise _invalid("a number", value, "Pass a number.")


def as_bool(value: Any) -> bool:
    """An argument of type boolean."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("t", "true", "y", "yes", "on", "1"):
            return True
        if text in ("f", "false", "n", "no", "off", "0"):
            return False
    raise _invalid("a boolean", value, "Pass true or false.")


def as_json(value: Any) -> Any:
    """An argument of type jsonb."""
    if isinstance(value, str):
        try:
            return msgspec.json.decode(value)
        except (msgspec.MsgspecError, RecursionError):
            pass
    raise _invalid("JSON", value, """Pass a JSON object, such as '{"lang": "en"}'.""")


def _invalid(kind: str, value: Any, hint: str) -> SqlError:
    shown = value if isinstance(value, str) else type(value).__name__
    return SqlError(
        INVALID_TEXT, f"expected {kind}, got {shown[:60]!r}", detail="invalid_params", hint=hint
    )
