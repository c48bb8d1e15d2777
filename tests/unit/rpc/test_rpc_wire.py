from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from syncd.errors import InvalidParams, InvalidVector
from syncd.protocol.wire import (
    key_from_wire,
    key_to_wire,
    keys_to_wire,
    vector_from_wire,
    vector_to_bytes,
    vector_to_wire,
)
from syncd.types import Key, KeyKind

UUID = "6f1c0c9e-53a1-4e8a-9c61-0c8b8d1f7a10"


@pytest.mark.parametrize(
    ("kind", "key", "wire"),
    [
        ("integer", 0, 0),
        ("integer", -5, -5),
        ("integer", 2**53, 2**53),
        ("integer", 2**53 + 1, str(2**53 + 1)),
        ("integer", -(2**63), str(-(2**63))),
        ("uuid", UUID, UUID),
        ("text", "", ""),
        ("text", "9007199254740993", "9007199254740993"),
        ("text", "é\n", "é\n"),
        ("composite", '[1,"a"]', [1, "a"]),
        ("composite", '["é",null,true,1.5,9007199254740993]', ["é", None, True, 1.5, 2**53 + 1]),
    ],
)
def test_a_key_comes_back_from_the_wire_as_it_was(kind: KeyKind, key: Key, wire: Any) -> None:
    assert key_to_wire(kind, key) == wire
    assert keys_to_wire(kind, [key, key]) == [wire, wire]
    assert key_from_wire(kind, wire) == key


def test_one_large_key_among_many_is_a_string() -> None:
    assert keys_to_wire("integer", [1, 2**53 + 1, -1]) == [1, str(2**53 + 1), -1]
    assert keys_to_wire("integer", [1, -(2**53) - 1]) == [1, str(-(2**53) - 1)]
    assert keys_to_wire("integer", []) == []


def test_an_integer_key_may_be_a_string_and_a_uuid_may_be_written_in_any_way() -> None:
    assert key_from_wire("integer", "-12") == -12
    assert key_from_wire("integer", 2**53 + 1) == 2**53 + 1
    assert key_from_wire("uuid", UUID.upper()) == UUID
    assert key_from_wire("uuid", UUID.replace("-", "")) == UUID


@pytest.mark.parametrize(
    ("kind", "given", "key"),
    [
        ("date", "20240229", "2024-02-29"),
        ("date", "0044-03-15 BC", "0044-03-15 BC"),
        ("timestamp", "2024-02-29 12:30", "2024-02-29T12:30:00"),
        ("timestamp", "2024-02-29T12:30:00.500", "2024-02-29T12:30:00.5"),
        ("timestamp", "infinity", "infinity"),
        ("timestamptz", "2024-02-29T12:30:00.123456Z", "2024-02-29T12:30:00.123456+00:00"),
        ("timestamptz", "2024-02-29 14:30:00+02:00", "2024-02-29T12:30:00+00:00"),
        ("timestamptz", "2024-02-29T12:30", "2024-02-29T12:30:00+00:00"),
        ("timestamptz", "10000-01-01T00:00:00+00:00", "10000-01-01T00:00:00+00:00"),
    ],
)
def test_a_time_may_be_written_in_any_form_of_iso_8601(kind: KeyKind, given: str, key: Key) -> None:
    assert key_from_wire(kind, given) == key
    assert (
        key_from_wire("composite", [1, given, "a"], ["integer", kind, "text"]) == f'[1,"{key}","a"]'
    )


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("integer", "abc"),
        ("integer", ""),
        ("integer", "1.5"),
        ("integer", "--1"),
        ("integer", "٣"),
        ("integer", "9" * 5000),
        ("integer", 2**63),
        ("integer", [1]),
        ("uuid", 1),
        ("uuid", "abc"),
        ("uuid", [UUID]),
        ("text", 1),
        ("text", ["a"]),
        ("composite", 1),
        ("composite", "1"),
        ("composite", "[]"),
        ("composite", "a"),
        ("composite", []),
    ],
)
def test_a_key_of_another_kind_is_refused(kind: KeyKind, value: Any) -> None:
    with pytest.raises(InvalidParams) as caught:
        key_from_wire(kind, value)
    assert caught.value.hint
    assert len(caught.value.message) < 200


def test_a_vector_comes_back_from_either_form_as_it_was() -> None:
    vector = np.random.default_rng(1).standard_normal(768, dtype=np.float32)
    for wire in (vector_to_wire(vector), vector_to_bytes(vector), vector_to_bytes(vector.tolist())):
        back = vector_from_wire(wire)
        assert back.dtype == np.float32
        assert np.array_equal(back, vector)


@pytest.mark.parametrize(
    "wire", [[], b"", [1e39], vector_to_bytes([1.0, float("nan")]), vector_to_bytes([float("inf")])]
)
def test_a_vector_that_is_empty_or_not_finite_is_invalid(wire: Any) -> None:
    with pytest.raises(InvalidVector):
        vector_from_wire(wire)


def test_bytes_that_are_not_a_whole_number_of_float32_are_refused() -> None:
    with pytest.raises(InvalidParams):
        vector_from_wire(b"12345")


@pytest.mark.parametrize("vector", [["a"], [[1.0]], 3, object()])
def test_a_client_refuses_to_send_a_value_that_is_not_a_vector(vector: Any) -> None:
    with pytest.raises(InvalidParams):
        vector_to_bytes(vector)
