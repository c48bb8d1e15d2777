"""Parameters and results of the RPC methods, as they are in JSON.

These structs are the only description of the protocol. The server decodes with them, both clients
encode with them, and ``rpc.discover`` is generated from them. Unknown parameters are refused.
Unknown members of a result are ignored, so that an older client can read a newer service's answers.
The results that show state are in ``status_messages``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from syncd.errors import InvalidParams, TooLarge
from syncd.types import Position, RecallOf, Snapshot

MAX_INCLUDED = 100
MAX_RESULTS = 1_000_000
"""Rows that one search may ask for, over all its vectors.

Their keys and distances are in memory at once.
"""
MOST_MEASURED = 1000
"""Largest k for which recall is measured; above, searches are exact."""
MAX_PAGE_KEYS = 100_000
MAX_GET_BYTES = 64 << 20
"""Bytes of vectors in one answer."""
DEFAULT_PAGE_KEYS = 10_000
DEFAULT_TIMEOUT_MS = 5000
MAX_TIMEOUT_MS = 86_400_000

KeyPart = int | str | float | bool | None
WireKey = int | str | list[KeyPart]
"""A key in JSON: a number (a string above 2^53), a string, or an array for a composite key."""

WireVector = list[float] | bytes
"""A vector in JSON: numbers, or the base64 of little-endian float32."""

Partial = Literal["refuse", "allow"]
"""Whether shards may be missing in an answer; else the error is ``shards_unavailable``."""

Milliseconds = Annotated[int, Meta(ge=0, le=MAX_TIMEOUT_MS)]


class WirePosition(msgspec.Struct, frozen=True):
    """A position in JSON: the snapshot is in PostgreSQL's own text form."""

    snapshot: str
    outbox_id: int

    @classmethod
    def of(cls, position: Position) -> WirePosition:
        """JSON form of a position."""
        return cls(str(position.snapshot), position.outbox_id)

    def age(self) -> tuple[int, int]:
        """``Snapshot.age`` of its snapshot."""
        _, xmax, in_progress = self.snapshot.split(":")
        return int(xmax), -(in_progress.count(",") + 1 if in_progress else 0)

    def position(self) -> Position:
        """The position that this is the JSON form of."""
        return Position(Snapshot.parse(self.snapshot), self.outbox_id)


At = Literal["cut"] | WirePosition
"""Which rows answer: those at one snapshot for all shards, or at the one of an earlier answer."""


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The base of every method's parameters."""

    def check(self) -> None:
        """Raise a ``RequestError`` for a fault that the types alone do not tell.

        The server calls this after decoding.
        """


class NoParams(Params, frozen=True):
    """A method without parameters."""


class SearchParams(Params, frozen=True):
    """The nearest rows to a vector, to each of several vectors, or to an indexed row."""

    dataset: str
    vector: WireVector | None = None
    vectors: list[WireVector] | None = None
    key: WireKey | None = None
    k: Annotated[int, Meta(ge=1, le=MAX_RESULTS)] = 10
    # Any: a value of another type is an InvalidFilter, not an InvalidParams
    filter: Annotated[Any, Meta(extra_json_schema={"type": ["object", "null"]})] = None
    recall: Annotated[float, Meta(gt=0, le=1)] | None = None
    exact: bool = False
    max_distance: float | None = None
    include: Annotated[list[str], Meta(max_length=MAX_INCLUDED)] | None = None
    consistency: Literal["eventual", "strong"] = "eventual"
    after: str | None = None
    timeout_ms: Milliseconds = DEFAULT_TIMEOUT_MS
    partial: Partial = "refuse"
    at: At | None = None

    def check(self) -> None:
        """Check that there is exactly one of ``vector``, ``vectors`` and ``key``.

        The names in ``filter`` and ``include`` are checked against the dataset, by the service.
        """
        if (self.vector is not None) + (self.vectors is not None) + (self.key is not None) != 1:
            raise InvalidParams(
                "pass exactly one of vector, vectors and key",
                hint='for example "key": 42, or "vector": [0.1, 0.2]',
            )
        if self.vectors is not None and len(self.vectors) * self.k > MAX_RESULTS:
            raise TooLarge(
                f"{len(self.vectors)} vectors with k={self.k} are more than {MAX_RESULTS} rows",
                hint="send fewer vectors at once",
            )


class GetParams(Params, frozen=True):
    """Which rows to look up."""

    dataset: str
    keys: list[WireKey]
    vectors: bool = False
    partial: Partial = "refuse"
    at: At | None = None

    def check(self) -> None:
        """Refuse more keys than a page has."""
        if len(self.keys) > MAX_PAGE_KEYS:
            raise TooLarge(
                f"{len(self.keys)} keys are more than {MAX_PAGE_KEYS}", hint="ask for fewer at once"
            )


class KeysParams(Params, frozen=True):
    """Which page of a dataset's keys."""

    dataset: str
    after_key: WireKey | None = None
    limit: Annotated[int, Meta(ge=1, le=MAX_PAGE_KEYS)] = DEFAULT_PAGE_KEYS
    partial: Partial = "refuse"


class WaitParams(Params, frozen=True):
    """Which transaction to wait for, and how long."""

    after: str
    timeout_ms: Milliseconds = DEFAULT_TIMEOUT_MS


class VerifyParams(Params, frozen=True):
    """Which dataset to compare with its table; None: all. ``deep`` compares the vectors' bytes.

    ``at`` is a leader's snapshot, at which all datasets were captured; see ``CutParams``.
    """

    dataset: str | None = None
    repair: bool = False
    deep: bool = False
    at: WirePosition | None = None

    def check(self) -> None:
        """Refuse what does not go together."""
        if self.at is not None and (self.dataset is not None or self.repair):
            raise InvalidParams(
                "a verify at a leader's snapshot is of all datasets, and only looks"
            )


class RebuildParams(Params, frozen=True):
    """Which dataset to build again."""

    dataset: str


class WhyParams(Params, frozen=True):
    """Which dataset to explain."""

    dataset: str


class AuthenticateParams(Params, frozen=True):
    """The shared secret of a TCP connection."""

    token: str


class MissingShard(msgspec.Struct, frozen=True):
    """A shard that did not answer, and why."""

    shard: str
    reason: str


class SearchResult(msgspec.Struct, frozen=True):
    """Keys with their distances, ascending; for ``vectors``, a list of each per vector.

    ``positions`` are those of the shards that answered, by their names. ``coverage`` is their share
    of all buckets, from 0 to 1. ``missing`` shards did not answer, which the request allowed.
    """

    keys: list[int | str | list[KeyPart | list[KeyPart]]]
    distances: list[float | list[float]]
    position: WirePosition
    lag_seconds: float
    columns: dict[str, list[Any]] | UnsetType = UNSET
    positions: dict[str, WirePosition] = {}
    coverage: float = 1.0
    missing: list[MissingShard] = []


class WireRow(msgspec.Struct, frozen=True):
    """One indexed row."""

    key: WireKey
    vector: WireVector | UnsetType = UNSET


class GetResult(msgspec.Struct, frozen=True):
    """Those of the requested rows that are indexed; see ``SearchResult`` for the rest."""

    rows: list[WireRow]
    positions: dict[str, WirePosition] = {}
    coverage: float = 1.0
    missing: list[MissingShard] = []


class KeysResult(msgspec.Struct, frozen=True):
    """One page of keys; ``next`` is the next page's ``after_key``, null after the last page.

    See ``SearchResult`` for the rest.
    """

    keys: list[WireKey]
    next: WireKey | None
    positions: dict[str, WirePosition] = {}
    coverage: float = 1.0
    missing: list[MissingShard] = []


class WaitResult(msgspec.Struct, frozen=True):
    """A position that includes the token's transaction."""

    position: WirePosition


class CheckpointResult(msgspec.Struct, frozen=True):
    """A checkpoint that is durable."""

    position: WirePosition
    seconds: float
    bytes_written: int


class DatasetVerified(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset compared with its table: its live ``rows``, ``indexed`` rows, differing keys.

    With ``repair`` the differences are those before the repair; ``in_sync`` is the state after it.
    ``quarantined`` rows are not counted as missing.
    """

    dataset: str
    in_sync: bool
    rows: int
    indexed: int
    missing: int
    extra: int
    stale: int
    repaired: int
    quarantined: int
    sample: list[WireKey]


class SourceVerified(msgspec.Struct, frozen=True):
    """One source: whether there were rows to compare.

    ``reason`` says why the comparison failed, or else which rows are in none of its datasets.
    """

    source: str
    outcome: Literal["compared", "empty", "none_live", "failed"]
    reason: str = ""


class VerifyResult(msgspec.Struct, frozen=True):
    """The result of a verify, all of it at one position."""

    position: WirePosition
    datasets: list[DatasetVerified]
    sources: list[SourceVerified]
    seconds: float


class RebuildResult(msgspec.Struct, frozen=True):
    """A dataset that was built again and serves now."""

    dataset: str
    rows: int
    seconds: float


class RecallParams(Params, frozen=True):
    """Which recall to measure."""

    dataset: str
    k: Annotated[int, Meta(ge=1, le=MOST_MEASURED)] = 10


class RecallReached(msgspec.Struct, frozen=True, kw_only=True):
    """Recall@k that searches with one target reach, and the mean time of one.

    ``exact`` is the number of queries that only an exact search answers at this target.
    """

    target: float
    mean: float
    p5: float
    least: float
    exact: int
    milliseconds: float


class RecallResult(msgspec.Struct, frozen=True, kw_only=True):
    """Recall@k of a dataset for each target.

    ``of`` says whether the ``queries`` were asked by clients or are rows of the dataset.
    """

    dataset: str
    k: int
    of: RecallOf
    queries: int
    targets: list[RecallReached]


class ErrorData(msgspec.Struct, frozen=True):
    """``error.data``: the kind of the error, and the repair."""

    kind: str
    hint: str = ""


class ErrorBody(msgspec.Struct, frozen=True):
    """The ``error`` member of an answer."""

    code: int
    message: str
    data: ErrorData | None = None
