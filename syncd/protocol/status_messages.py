"""Results of the RPC methods that show state: ``status``, ``datasets`` and ``why``."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

from syncd.protocol.messages import MissingShard, WireKey, WirePosition
from syncd.types import IndexKind, Metric, RecallOf, State


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
    recall_p5: float | None = None
    """The 5th percentile of the recall of single queries."""
    recall_of: RecallOf | None = None
    """Queries on which recall was measured; null: not measured, because every search is exact."""
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


class ReaderStatus(msgspec.Struct, frozen=True):
    """One reader process; ``memory_bytes`` counts no mapped file and no shared memory."""

    pid: int
    connections: int
    memory_bytes: int


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
    shard: str = "0/1"
    """The shard whose rows it has; all rows are ``0/1``."""
    positions: dict[str, WirePosition] = {}
    """Of a router: the positions of the shards; see ``SearchResult``."""
    coverage: float = 1.0
    missing: list[MissingShard] = []
    verify: VerifyStatus | None = None
    readers: list[ReaderStatus] = []
    """The processes that answer searches beside the main process."""


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
