"""Every RPC call as a value: the request, and the decoder of its answer.

Each call is written once, here. Both clients turn these functions into methods of the same
signature.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Generic, Literal, TypeVar, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from syncd.errors import InvalidFilter
from syncd.json_values import json_value
from syncd.protocol.messages import (
    DEFAULT_PAGE_KEYS,
    DEFAULT_TIMEOUT_MS,
    At,
    AuthenticateParams,
    CheckpointResult,
    GetParams,
    GetResult,
    KeyPart,
    KeysParams,
    KeysResult,
    MissingShard,
    NoParams,
    Params,
    Partial,
    RebuildParams,
    RebuildResult,
    RecallParams,
    RecallResult,
    SearchParams,
    SearchResult,
    VerifyParams,
    VerifyResult,
    WaitParams,
    WaitResult,
    WhyParams,
    WireKey,
    WirePosition,
)
from syncd.protocol.status_messages import DatasetStatus, ServiceStatus, WhyResult
from syncd.protocol.wire import MAX_EXACT_INTEGER, vector_from_wire, vector_to_bytes

T = TypeVar("T")

Key = int | str | tuple[KeyPart, ...]
"""A row's key in Python: a composite key is a tuple. An integer over 2^53 comes as a string."""

KeyLike = int | str | uuid.UUID | date | Sequence[KeyPart | date]
Vector = Sequence[float] | NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request.

    ``patience_seconds`` is the time that the request grants the service; None: no limit.
    """

    method: str
    params: Params
    decode: Callable[[msgspec.Raw], T]
    patience_seconds: float | None = 0.0
    encoded: list[bytes] = field(default_factory=list, init=False, compare=False, repr=False)
    """The request without its id, once it was sent: a router sends it to each shard."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that a search found."""

    key: Key
    distance: float
    columns: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """An indexed row; it has a ``vector`` if the call asked for vectors."""

    key: Key
    vector: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """Some of a dataset's keys.

    ``next`` is the next page's ``after_key``; None after the last page.
    """

    keys: list[Key]
    next: Key | None
    positions: Mapping[str, WirePosition] = field(default_factory=dict)
    coverage: float = 1.0
    missing: Sequence[MissingShard] = ()


class Found(list[T]):
    """The rows of an answer, and what it covers.

    ``positions`` are those of the shards that answered, by name; one syncd alone is ``0/1``.
    ``position`` is the oldest of them. ``coverage`` is the share of all rows that could be found,
    1 if no shard is ``missing``.
    """

    def __init__(
        self,
        rows: Iterable[T] = (),
        *,
        position: WirePosition | None = None,
        positions: Mapping[str, WirePosition] | None = None,
        coverage: float = 1.0,
        missing: Sequence[MissingShard] = (),
        lag_seconds: float = 0.0,
    ) -> None:
        super().__init__(rows)
        self.positions = positions or {}
        self.position = position or min(self.positions.values(), key=WirePosition.age, default=None)
        self.coverage = coverage
        self.missing = missing
        self.lag_seconds = lag_seconds


@overload
def search(
    dataset: str,
    vector: Vector | None = None,
    *,
    key: KeyLike | None = None,
    k: int = 10,
    filter: Mapping[str, Any] | None = None,
    recall: float | None = None,
    exact: bool = False,
    max_distance: float | None = None,
    include: Sequence[str] | None = None,
    consistency: Literal["eventual", "strong"] | None = None,
    after: str | None = None,
    timeout_ms: int | None = None,
    partial: Partial | None = None,
    at: At | None = None,
) -> Call[Found[Hit]]: ...


@overload
def search(
    dataset: str,
    *,
    vectors: Sequence[Vector] | NDArray[np.floating],
    k: int = 10,
    filter: Mapping[str, Any] | None = None,
    recall: float | None = None,
    exact: bool = False,
    max_distance: float | None = None,
    include: Sequence[str] | None = None,
    consistency: Literal["eventual", "strong"] | None = None,
    after: str | None = None,
    timeout_ms: int | None = None,
    partial: Partial | None = None,
    at: At | None = None,
) -> Call[Found[list[Hit]]]: ...


def search(
    dataset: str,
    vector: Vector | None = None,
    *,
    vectors: Sequence[Vector] | NDArray[np.floating] | None = None,
    key: KeyLike | None = None,
    k: int = 10,
    filter: Mapping[str, Any] | None = None,  # noqa: A002 - the contract's name
    recall: float | None = None,
    exact: bool = False,
    max_distance: float | None = None,
    include: Sequence[str] | None = None,
    consistency: Literal["eventual", "strong"] | None = None,
    after: str | None = None,
    timeout_ms: int | None = None,
    partial: Partial | None = None,
    at: At | None = None,
) -> Call[Found[Hit]] | Call[Found[list[Hit]]]:
    """The nearest rows to a vector, to each of several vectors, or to an indexed row.

    The nearest row comes first. The row of ``key`` itself is left out. With ``partial="allow"``
    shards may be missing in the answer, which names them. With ``at="cut"`` the rows are those of
    one snapshot, on all shards; ``at`` may also be the ``position`` of an earlier such answer.
    """
    timeout = DEFAULT_TIMEOUT_MS if timeout_ms is None else timeout_ms
    params = SearchParams(
        dataset=dataset,
        vector=None if vector is None else vector_to_bytes(vector),
        vectors=None if vectors is None else [vector_to_bytes(each) for each in vectors],
        key=None if key is None else _key_to_wire(key),
        k=k,
        filter=None if filter is None else _filter(filter),
        recall=recall,
        exact=exact,
        max_distance=max_distance,
        include=None if include is None else list(include),
        consistency=consistency or "eventual",
        after=after,
        timeout_ms=timeout,
        partial=partial or "refuse",
        at=at,
    )
    if vectors is None:
        return Call("search", params, _hits, timeout / 1000)
    return Call("search", params, _hits_of_each, timeout / 1000)


def _filter(given: object) -> dict[str, Any]:
    """A filter with values of JSON; raises ``InvalidFilter``."""
    if not isinstance(given, Mapping):
        raise InvalidFilter(
            f"expected a filter as a dict, got a value of type {type(given).__name__}",
            hint='write {"column": value}',
        )
    try:
        found: dict[str, Any] = json_value(given)
    except ValueError as error:
        raise InvalidFilter(
            f"the filter cannot be sent: {error}", hint="pass strings, numbers, lists and dicts"
        ) from error
    return found


def get(
    dataset: str,
    keys: Sequence[KeyLike],
    vectors: bool = False,
    *,
    partial: Partial | None = None,
    at: At | None = None,
) -> Call[Found[Row]]:
    """Those of the requested rows that are indexed; with ``vectors``, each with its vector.

    See ``search`` for ``partial`` and ``at``.
    """
    params = GetParams(
        dataset=dataset,
        keys=[_key_to_wire(key) for key in keys],
        vectors=vectors,
        partial=partial or "refuse",
        at=at,
    )
    return Call("get", params, _rows)


def keys_page(
    dataset: str,
    *,
    after_key: KeyLike | None = None,
    limit: int = DEFAULT_PAGE_KEYS,
    partial: Partial | None = None,
) -> Call[Page]:
    """One page of a dataset's keys, in a stable order. See ``search`` for ``partial``."""
    after = None if after_key is None else _key_to_wire(after_key)
    params = KeysParams(dataset=dataset, after_key=after, limit=limit, partial=partial or "refuse")
    return Call("keys", params, _page)


def datasets() -> Call[list[DatasetStatus]]:
    """Every dataset and its state."""
    return Call("datasets", NoParams(), _decoder(list[DatasetStatus]))


def status() -> Call[ServiceStatus]:
    """The service's state."""
    return Call("status", NoParams(), _decoder(ServiceStatus))


def wait(after: str, timeout_ms: int | None = None) -> Call[WirePosition]:
    """Wait until the indexes include the token's transaction; returns a position that does."""
    timeout = DEFAULT_TIMEOUT_MS if timeout_ms is None else timeout_ms
    return Call("wait", WaitParams(after=after, timeout_ms=timeout), _position, timeout / 1000)


def checkpoint() -> Call[CheckpointResult]:
    """Save a checkpoint now. The call has no time limit."""
    return Call("checkpoint", NoParams(), _decoder(CheckpointResult), None)


def verify(
    dataset: str | None = None, *, repair: bool = False, deep: bool = False
) -> Call[VerifyResult]:
    """Compare a dataset with its table, at one snapshot; None: all datasets.

    With ``repair``, rows that differ are read again. The call has no time limit.
    """
    return Call(
        "verify",
        VerifyParams(dataset=dataset, repair=repair, deep=deep),
        _decoder(VerifyResult),
        None,
    )


def rebuild(dataset: str) -> Call[RebuildResult]:
    """Build a dataset again from its table, alongside the one that serves, and swap them.

    The call has no time limit.
    """
    return Call("rebuild", RebuildParams(dataset=dataset), _decoder(RebuildResult), None)


def recall(dataset: str, k: int = 10) -> Call[RecallResult]:
    """Recall@k that searches reach, for several targets. The call has no time limit."""
    return Call("recall", RecallParams(dataset=dataset, k=k), _decoder(RecallResult), None)


def why(dataset: str) -> Call[WhyResult]:
    """The service's explanation of a dataset's state."""
    return Call("why", WhyParams(dataset=dataset), _decoder(WhyResult))


def ping() -> Call[str]:
    """``"pong"``."""
    return Call("ping", NoParams(), _decoder(str))


def discover() -> Call[dict[str, Any]]:
    """The OpenRPC document of the service."""
    return Call("rpc.discover", NoParams(), _decoder(dict[str, Any]))


def authenticate(token: str) -> Call[bool]:
    """Send the token of a TCP connection. Both clients do this when they connect."""
    return Call("authenticate", AuthenticateParams(token=token), _decoder(bool))


def _decoder(kind: type[T]) -> Callable[[msgspec.Raw], T]:
    return msgspec.json.Decoder(kind).decode


_search_result = _decoder(SearchResult)
_get_result = _decoder(GetResult)
_keys_result = _decoder(KeysResult)
_wait_result = _decoder(WaitResult)


def _hits(raw: msgspec.Raw) -> Found[Hit]:
    result = _search_result(raw)
    columns = {} if result.columns is msgspec.UNSET else result.columns
    return _found(_hit_list(result.keys, result.distances, columns), result)


def _hits_of_each(raw: msgspec.Raw) -> Found[list[Hit]]:
    result = _search_result(raw)
    columns = {} if result.columns is msgspec.UNSET else result.columns
    lists = [
        _hit_list(keys, distances, {name: values[i] for name, values in columns.items()})
        for i, (keys, distances) in enumerate(zip(result.keys, result.distances, strict=True))
    ]
    return _found(lists, result)


def _found(rows: Iterable[T], result: SearchResult) -> Found[T]:
    return Found(
        rows,
        position=result.position,
        positions=result.positions,
        coverage=result.coverage,
        missing=result.missing,
        lag_seconds=result.lag_seconds,
    )


def _hit_list(keys: Any, distances: Any, columns: Mapping[str, Sequence[Any]]) -> list[Hit]:
    if not columns:
        return [
            Hit(_key_from_wire(key), distance)
            for key, distance in zip(keys, distances, strict=True)
        ]
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return [
        Hit(_key_from_wire(key), distance, row)
        for key, distance, row in zip(keys, distances, rows, strict=True)
    ]


def _rows(raw: msgspec.Raw) -> Found[Row]:
    result = _get_result(raw)
    rows = [
        Row(
            _key_from_wire(row.key),
            None if row.vector is msgspec.UNSET else vector_from_wire(row.vector),
        )
        for row in result.rows
    ]
    return Found(rows, positions=result.positions, coverage=result.coverage, missing=result.missing)


def _page(raw: msgspec.Raw) -> Page:
    result = _keys_result(raw)
    following = None if result.next is None else _key_from_wire(result.next)
    keys = [_key_from_wire(key) for key in result.keys]
    return Page(keys, following, result.positions, result.coverage, result.missing)


def _position(raw: msgspec.Raw) -> WirePosition:
    return _wait_result(raw).position


def _key_to_wire(key: KeyLike) -> WireKey:
    if isinstance(key, str):
        return key
    if isinstance(key, uuid.UUID):
        return str(key)
    if isinstance(key, date):  # a datetime is one too
        return key.isoformat()
    if isinstance(key, Sequence):
        return [part.isoformat() if isinstance(part, date) else part for part in key]
    number = int(key)  # numpy's integers come here too
    return number if abs(number) <= MAX_EXACT_INTEGER else str(number)


def _key_from_wire(key: WireKey) -> Key:
    return tuple(key) if isinstance(key, list) else key
