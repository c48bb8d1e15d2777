"""The parameters and the results of every RPC method, as they are on the wire.

These structs are the one description of the protocol: the server decodes with them, both clients encode with them, and
``rpc.discover`` is generated from them. Unknown parameters are refused; unknown members of a result are ignored, so
that a client of today reads the answers of tomorrow.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from syncd.errors import InvalidParams, TooLarge
from syncd.types import Metric, Position, Snapshot

MAX_INCLUDED = 100
MAX_RESULTS = 1_000_000
"""Rows that one search may ask for, all its vectors together: their keys and distances are in memory at once."""
MAX_PAGE_KEYS = 100_000
MAX_GET_BYTES = 64 << 20
"""Of vectors in one answer."""
DEFAULT_PAGE_KEYS = 10_000
DEFAULT_TIMEOUT_MS = 5000
MAX_TIMEOUT_MS = 86_400_000

KeyPart = int | str | float | bool | None
WireKey = int | str | list[KeyPart]
"""A key on the wire: a number (a string above 2^53), a string, or an array for a composite key."""

WireVector = list[float] | bytes
"""Numbers, or little-endian float32, which JSON has as base64."""

State = Literal["backfilling", "catching_up", "ready", "rebuilding", "must_rebuild", "failed"]
IndexKind = Literal["exact", "building", "codes"]
Milliseconds = Annotated[int, Meta(ge=0, le=MAX_TIMEOUT_MS)]


class Params(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What every method's parameters have in common."""

    def check(self) -> None:
        """Raise a ``RequestError`` for what the types alone do not say; the server calls it after decoding."""


class NoParams(Params, frozen=True):
    """A method without parameters."""


class SearchParams(Params, frozen=True):
    """The nearest rows to a vector, to each of several vectors, or to a row that is there already."""

    dataset: str
    vector: WireVector | None = None
    vectors: list[WireVector] | None = None
    key: WireKey | None = None
    k: Annotated[int, Meta(ge=1, le=MAX_RESULTS)] = 10
    filter: Annotated[Any, Meta(extra_json_schema={"type": ["object", "null"]})] = (
        None  # what is no object is an invalid filter
    )
    recall: Annotated[float, Meta(gt=0, le=1)] | None = None
    exact: bool = False
    max_distance: float | None = None
    include: Annotated[list[str], Meta(max_length=MAX_INCLUDED)] | None = None
    consistency: Literal["eventual", "strong"] = "eventual"
    after: str | None = None
    timeout_ms: Milliseconds = DEFAULT_TIMEOUT_MS

    def check(self) -> None:
        """Exactly one of ``vector``, ``vectors`` and ``key``. What ``filter`` and ``include`` name is checked against the dataset."""
        if (self.vector is not None) + (self.vectors is not None) + (self.key is not None) != 1:
            raise InvalidParams(
                "pass exactly one of vector, vectors and key", hint='for example "key": 42, or "vector": [0.1, 0.2]'
            )
        if self.vectors is not None and len(self.vectors) * self.k > MAX_RESULTS:
            raise TooLarge(
                f"{len(self.vectors)} vectors with k={self.k} are more than {MAX_RESULTS} rows", hint="send fewer vectors at once"
            )  # fmt: skip


class GetParams(Params, frozen=True):
    """Which rows to look up."""

    dataset: str
    keys: list[WireKey]
    vectors: bool = False

    def check(self) -> None:
        """As many as there are in a page."""
        if len(self.keys) > MAX_PAGE_KEYS:
            raise TooLarge(f"{len(self.keys)} keys are more than {MAX_PAGE_KEYS}", hint="ask for fewer at once")


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
    """Which dataset to compare with its table, or all; ``deep`` compares the vectors' bytes too."""

    dataset: str | None = None
    repair: bool = False
    deep: bool = False


class RebuildParams(Params, frozen=True):
    """Which dataset to build anew."""

    dataset: str


class WhyParams(Params, frozen=True):
    """Which dataset to explain."""

    dataset: str


class AuthenticateParams(Params, frozen=True):
    """The shared secret of a TCP connection."""

    token: str


class WirePosition(msgspec.Struct, frozen=True):
    """A position as JSON has it: the snapshot in Postgres' own text form."""

    snapshot: str
    outbox_id: int

    @classmethod
    def of(cls, position: Position) -> WirePosition:
        """A position on its way out."""
        return cls(str(position.snapshot), position.outbox_id)

    def position(self) -> Position:
        """A position that came in."""
        return Position(Snapshot.parse(self.snapshot), self.outbox_id)


class SearchResult(msgspec.Struct, frozen=True):
    """Keys with their distances, ascending; with ``vectors``, a list of each for every vector."""

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
    """The rows that are indexed, of those that were asked for."""

    rows: list[WireRow]


class KeysResult(msgspec.Struct, frozen=True):
    """One page of keys; ``next`` is the following page's ``after_key``, null after the last page."""

    keys: list[WireKey]
    next: WireKey | None


class DatasetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset, as ``datasets`` shows it. ``dim`` and ``index`` are null while nothing is indexed; ``verified`` says whether all its files
    have been compared with their checksums."""

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
    """In memory and on disk."""
    bytes_memory: int = 0
    lag_seconds: float
    verified_at: datetime | None = None
    """When it was last compared with its table."""
    in_sync: bool | None = None
    """Whether the two were equal then, or are since a repair; None where it has not been compared."""


class CheckpointStatus(msgspec.Struct, frozen=True):
    """The last checkpoint: when it was saved, by this process or the one before; how long that took, null where it was not this one; and the error
    of the last attempt."""

    at: datetime | None = None
    seconds: float | None = None
    error: str | None = None


class Work(msgspec.Struct, frozen=True):
    """Something that takes long and is under way. ``name`` is a source, a dataset, or empty for all; ``expected`` is about how many rows there
    are in all, 0 where nobody knows."""

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
    """A background task that fails: its last error, how many there were in a row, and when it is tried again."""

    task: str
    error: str
    failures: int
    retry_in_seconds: float


class VerifyStatus(msgspec.Struct, frozen=True):
    """Verify in the background: since when no table was left out; ``overdue`` says why the next whole one is late, and is empty otherwise."""

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
    """The same by source and reason, the most frequent first; counted every few seconds."""
    database_error: str | None = None
    """Why the database cannot be used just now; null where it can."""
    failing_tasks: list[FailingTask] = []
    verify: VerifyStatus | None = None


class QuarantineCount(msgspec.Struct, frozen=True):
    """Rows of a dataset that are in quarantine for one reason, and the keys of a few."""

    reason: str
    rows: int
    sample: list[WireKey]


class SourceProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How a source is being followed. ``scanned_rows`` is null unless the table is being read as a whole."""

    source: str
    failure: str | None
    retry_in_seconds: float
    scanned_rows: int | None
    moved_seconds: float | None
    """Since everything up to a position was applied; null where that has not happened yet."""
    position: WirePosition
    unconfirmed_keys: int | None
    """Keys that were applied since the last checkpoint's proof of durability; null: too many to list."""


class WhyResult(msgspec.Struct, frozen=True, kw_only=True):
    """What only the service knows about a dataset. One that it does not know has no ``status``."""

    dataset: str
    status: DatasetStatus | None
    reason: str
    progress: SourceProgress | None
    quarantine: list[QuarantineCount]
    near: list[str]
    """Names of datasets that are like the one asked for, the likeliest first."""
    pending: dict[str, str]
    """Sources that are not read to the end, with the reason."""
    consumer: str
    connected: bool
    database_error: str = ""
    """Why it is not connected, and what to do; both empty where it is."""
    database_hint: str = ""
    notifies: bool
    listener_connected: bool
    last_pass_seconds: float
    open_writers: int
    checkpoint: CheckpointStatus


class WaitResult(msgspec.Struct, frozen=True):
    """A position that includes the token."""

    position: WirePosition


class CheckpointResult(msgspec.Struct, frozen=True):
    """A checkpoint that is durable."""

    position: WirePosition
    seconds: float
    bytes_written: int


class DatasetVerified(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset against its table: live ``rows`` there, ``indexed`` ones here, and how many keys differ. With ``repair`` the differences are
    those found before it, and ``in_sync`` says how it is after it. ``quarantined`` rows are accounted for, and not counted as missing."""

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
    """One source: whether there was anything to compare, why it ``failed`` where it did, else which of its rows are in none of its datasets."""

    source: str
    outcome: Literal["compared", "empty", "none_live", "failed"]
    reason: str = ""


class VerifyResult(msgspec.Struct, frozen=True):
    """What a verify found, all at one position."""

    position: WirePosition
    datasets: list[DatasetVerified]
    sources: list[SourceVerified]
    seconds: float


class RebuildResult(msgspec.Struct, frozen=True):
    """A dataset that was built anew and serves now."""

    dataset: str
    rows: int
    seconds: float


class ErrorData(msgspec.Struct, frozen=True):
    """``error.data``: which error it is, and what to do."""

    kind: str
    hint: str = ""


class ErrorBody(msgspec.Struct, frozen=True):
    """The ``error`` of an answer."""

    code: int
    message: str
    data: ErrorData | None = None
