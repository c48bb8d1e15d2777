"""Parameters and results of every RPC method, as they are in JSON.

These structs are the only description of the protocol. The server decodes with them, both clients
encode with them, and ``rpc.discover`` is generated from them. Unknown parameters are refused.
Unknown members of a result are ignored, so that an older client can read a newer service's answers.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from syncd.errors import InvalidParams, TooLarge
from syncd.types import Metric, Position, Snapshot, State

MAX_INCLUDED = 100
MAX_RESULTS = 1_000_000
"""Rows that one search may ask for, over all its vectors.

Their keys and distances are in memory at once.
"""
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

IndexKind = Literal["exact", "building", "codes"]
Milliseconds = Annotated[int, Meta(ge=0, le=MAX_TIMEOUT_MS)]


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


class WaitParams(Params, frozen=True):
    """Which transaction to wait for, and how long."""

    after: str
    timeout_ms: Milliseconds = DEFAULT_TIMEOUT_MS


class VerifyParams(Params, frozen=True):
    """Which dataset to compare with its table; None: all. ``deep`` compares the vectors' bytes."""

    dataset: str | None = None
    repair: bool = False
    deep: bool = False


class RebuildParams(Params, frozen=True):
    """Which dataset to build again."""

    dataset: str


class WhyParams(Params, frozen=True):
    """Which dataset to explain."""

    dataset: str


class AuthenticateParams(Params, frozen=True):
    """The shared secret of a TCP connection."""

    token: str


class WirePosition(msgspec.Struct, frozen=True):
    """A position in JSON: the snapshot is in PostgreSQL's own text form."""

    snapshot: str
    outbox_id: int

    @classmethod
    def of(cls, position: Position) -> WirePosition:
        """JSON form of a position."""
        return cls(str(position.snapshot), position.outbox_id)

    def position(self) -> Position:
        """The position that this is the JSON form of."""
        return Position(Snapshot.parse(self.snapshot), self.outbox_id)


class SearchResult(msgspec.Struct, frozen=True):
    """Keys with their distances, ascending; for ``vectors``, a list of each per vector."""

    keys: list[int | str | list[KeyPart | list[KeyPart]]]
    distances: list[float | list[float]]
    position: WirePosition
    lag_seconds: float
    columns: dict[str, list[Any]] | UnsetType = UNSET


class WireRow(msgspec.Struct, frozen=True):
    """One indexed row."""

    key: WireKey
    vector: WireVector | UnsetType = UNSET


class GetResult(msgspec.Struct, frozen=True):
    """Those of the requested rows that are indexed."""

    rows: list[WireRow]


class KeysResult(msgspec.Struct, frozen=True):
    """One page of keys; ``next`` is the next page's ``after_key``, null after the last page."""

    keys: list[WireKey]
    next: WireKey | None


class DatasetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset, as ``datasets`` shows it.

    ``dim`` and ``index`` are null while nothing is indexed. ``verified`` says whether all its files
    have been compared with their checksums.
    """

    dataset: str
    source: str
    state: State
    count: int
    tombstones: int
    dim: int | None
    metric: Metric
    index: IndexKind | None
    recall: float | None
    verified: bool
    bytes: int
    """Bytes in memory and on disk."""
    bytes_memory: int = 0
    lag_seconds: float
    verified_at: datetime | None = None
    """Time of the last comparison with its table."""
    in_sync: bool | None = None
    """Whether the dataset was equal to its table then, or was repaired; None: never compared."""


class CheckpointStatus(msgspec.Struct, frozen=True):
    """The last checkpoint of this process or the previous one, and the last attempt's error.

    ``seconds`` is how long it took; null if the previous process saved it.
    """

    at: datetime | None = None
    seconds: float | None = None
    error: str | None = None


class Work(msgspec.Struct, frozen=True):
    """A long piece of work that runs now.

    ``name`` is a source or a dataset; empty: all of them. ``expected`` is the approximate number of
    rows in total; 0 if it is not known.
    """

    what: Literal["reading", "rebuilding", "verifying", "building"]
    name: str
    rows: int
    expected: int


class QuarantineReason(msgspec.Struct, frozen=True):
    """Rows of a source that are in quarantine for one reason."""

    source: str
    reason: str
    rows: int


class FailingTask(msgspec.Struct, frozen=True):
    """A background task that fails: last error, errors in a row, and seconds until the retry."""

    task: str
    error: str
    failures: int
    retry_in_seconds: float


class VerifyStatus(msgspec.Struct, frozen=True):
    """The verify in the background.

    ``at`` is the time of the last one that left out no table. ``overdue`` says why the next such
    verify is late; empty: it is not late.
    """

    at: datetime | None
    interval_seconds: float
    overdue: str


class ServiceStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The whole service, as ``status`` shows it."""

    version: str
    consumer: str
    state: State
    position: WirePosition | None
    lag_rows: int | None
    lag_seconds: float
    listener_connected: bool
    checkpoint: CheckpointStatus
    quarantined: int
    uptime_seconds: float
    work: list[Work] = []
    quarantine: list[QuarantineReason] = []
    """Rows in quarantine by source and reason, most frequent first; counted every few seconds."""
    database_error: str | None = None
    """Why the database cannot be used now; null if it can."""
    failing_tasks: list[FailingTask] = []
    verify: VerifyStatus | None = None


class QuarantineCount(msgspec.Struct, frozen=True):
    """Rows of a dataset that are in quarantine for one reason, and keys of some of them."""

    reason: str
    rows: int
    sample: list[WireKey]


class SourceProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a source is read. ``scanned_rows`` is null unless the whole table is being read."""

    source: str
    failure: str | None
    fix: str = ""
    """Command that ends the failure; empty if syncd knows of none."""
    retry_in_seconds: float
    scanned_rows: int | None
    moved_seconds: float | None
    """Seconds since everything up to a position was applied; null if that has not happened yet."""
    position: WirePosition
    unconfirmed_keys: int | None
    """Keys that were applied since the last checkpoint that PostgreSQL confirmed.

    Null: too many to list.
    """


class WhyResult(msgspec.Struct, frozen=True, kw_only=True):
    """The service's knowledge of a dataset, for ``syncd why``. An unknown one has no ``status``."""

    dataset: str
    status: DatasetStatus | None
    reason: str
    fix: str = ""
    """Command that ends the state; empty if syncd knows of none."""
    progress: SourceProgress | None
    quarantine: list[QuarantineCount]
    near: list[str]
    """Names of datasets that are similar to the requested name, most similar first."""
    pending: dict[str, str]
    """Sources that are not read to the end, each with the reason."""
    consumer: str
    connected: bool
    database_error: str = ""
    """Why the service is not connected; empty if it is."""
    database_hint: str = ""
    """The repair for ``database_error``."""
    notifies: bool
    listener_connected: bool
    last_pass_seconds: float
    open_writers: int
    checkpoint: CheckpointStatus


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


class ErrorData(msgspec.Struct, frozen=True):
    """``error.data``: the kind of the error, and the repair."""

    kind: str
    hint: str = ""


class ErrorBody(msgspec.Struct, frozen=True):
    """The ``error`` member of an answer."""

    code: int
    message: str
    data: ErrorData | None = None
