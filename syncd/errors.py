"""All errors that users can see.

Invariant: every error has a stable ``kind`` and a ``hint`` with the next step.

SyncdError
├── RequestError              answered to one RPC request, which alone fails
│   ├── UnknownDataset  UnknownKey  DimensionMismatch
│   ├── InvalidVector  InvalidFilter  InvalidParams
│   ├── NotReady  Overloaded  TimedOut  Unauthorized  TooLarge
│   └── ShardsUnavailable
├── SettingsError             a wrong setting or wrong usage: exit 2
├── DatabaseError             the database cannot be used in its present state
│   ├── DatabaseUnreachable  NotInstalled  WrongSchemaVersion  ConsumerReplaced  LockTaken
├── InvalidDocument           an app's store cannot store this document
├── AddressInUse              another process listens on the address
├── RayUnavailable            Ray is not installed, does not answer, or has too few nodes
├── EmbeddedUnavailable       the embedded PostgreSQL is not installed, or does not start
├── DataDirectoryError        locked, read-only, or full
├── DamagedFile               a checkpoint's file is missing or differs from the manifest
└── ServiceUnavailable        no process listens on the socket

A message says what happened and why; ``hint`` is the next step, often a command to type.
"""

from __future__ import annotations

from dataclasses import dataclass

SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why something cannot go on as it is, and the next step. As text: both, for users."""

    reason: str
    fix: str = ""
    """Command to type; empty if syncd knows of none."""
    how: str = ""
    """Words that introduce the command, such as ``attach it again``."""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.reason, self.how, self.fix) if part)


class SyncdError(Exception):
    """syncd could not do something."""

    kind = "internal_error"
    next_step = "see the log of syncd serve, and: syncd check"
    """The hint of errors that are raised without one."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.next_step


def shortened(name: str) -> str:
    """A name, short enough for a message."""
    return name if len(name) <= SHOWN_CHARACTERS else f"{name[:SHOWN_CHARACTERS]}…"


class RequestError(SyncdError):
    """One request failed; the connection and the service continue."""


class UnknownDataset(RequestError):
    """No dataset has this name."""

    kind = "unknown_dataset"

    def __init__(self, dataset: str) -> None:
        super().__init__(f"there is no dataset {shortened(dataset)!r}", hint="see: syncd datasets")


class UnknownKey(RequestError):
    """The key is not in the index."""

    kind = "unknown_key"

    def __init__(self, dataset: str, key: object) -> None:
        super().__init__(
            f"dataset {dataset!r} has no row with the key {key!r}",
            hint="the row may be deleted, not live, without a vector, in quarantine, or not yet "
            f"applied; see: syncd why {dataset}; to wait for a write, pass its token as `after`",
        )


class DimensionMismatch(RequestError):
    """The vector has a different dimension than the dataset."""

    kind = "dimension_mismatch"

    def __init__(self, dataset: str, *, expected: int, got: int) -> None:
        super().__init__(
            f"dataset {dataset!r} has dimension {expected}, the vector has {got}",
            hint=f"embed with the model that filled {dataset!r}",
        )


class InvalidVector(RequestError):
    """The vector has a NaN, an infinity, no element, or zero norm under cosine."""

    kind = "invalid_vector"

    def __init__(
        self,
        message: str,
        *,
        hint: str = "send finite numbers, and under cosine not all zero",
    ) -> None:
        super().__init__(message, hint=hint)


class InvalidFilter(RequestError):
    """The filter cannot be applied."""

    kind = "invalid_filter"


class InvalidParams(RequestError):
    """The request's parameters are wrong for the method (JSON-RPC -32602)."""

    kind = "invalid_params"
    next_step = "rpc.discover lists each method's parameters"


class NotReady(RequestError):
    """The dataset has not caught up with its table yet."""

    kind = "not_ready"


class Overloaded(RequestError):
    """More requests are waiting than the service accepts."""

    kind = "overloaded"

    def __init__(self, waiting: int) -> None:
        super().__init__(
            f"{waiting} requests are already waiting",
            hint="send fewer at once, or try again in a moment",
        )


class TimedOut(RequestError):
    """The request's time ran out."""

    kind = "timeout"


class Unauthorized(RequestError):
    """The connection has not authenticated."""

    kind = "unauthorized"


class TooLarge(RequestError):
    """The request is larger than the service accepts."""

    kind = "too_large"


class ShardsUnavailable(RequestError):
    """Some shards did not answer, and the request does not allow an answer without them."""

    kind = "shards_unavailable"


class SettingsError(SyncdError):
    """A setting, or the way a command was used, is wrong."""

    kind = "settings"
    next_step = "see: syncd config, and syncd --help"


class InvalidDocument(SyncdError, ValueError):
    """A document cannot be stored or indexed; no document of this write was stored."""

    kind = "invalid_document"
    next_step = "correct the document, and write again"


class AddressInUse(SyncdError):
    """Another process listens on the address."""

    kind = "address_in_use"


class DatabaseError(SyncdError):
    """The database cannot be used in its present state."""

    kind = "database"


class DatabaseUnreachable(DatabaseError):
    """No connection to the database."""

    kind = "database_unreachable"


class NotInstalled(DatabaseError):
    """The database has no schema ``syncd``."""

    kind = "not_installed"


class WrongSchemaVersion(DatabaseError):
    """The database's schema ``syncd`` has another version than this program."""

    kind = "wrong_schema_version"


class ConsumerReplaced(DatabaseError):
    """Another process has taken this consumer's name."""

    kind = "consumer_replaced"


class LockTaken(DatabaseError):
    """Another session holds a lock that the command needs: a time-out or a deadlock ended it."""

    kind = "lock_taken"


class RayUnavailable(SyncdError):
    """Ray cannot be used, or cannot run the shards."""

    kind = "ray_unavailable"
    next_step = "see: ray status"


class EmbeddedUnavailable(SyncdError):
    """The embedded PostgreSQL cannot be used."""

    kind = "embedded_unavailable"
    next_step = "pip install --force-reinstall 'syncd[embedded]', or set SYNCD_DSN"


class DataDirectoryError(SyncdError):
    """The data directory is locked, read-only or full."""

    kind = "data_directory"


class DamagedFile(SyncdError):
    """A checkpoint's file is missing, or differs from the manifest."""

    kind = "damaged_file"
    next_step = "syncd reads the table again by itself; check the disk, and watch: syncd datasets"


class ServiceUnavailable(SyncdError):
    """No process listens on the socket."""

    kind = "service_unavailable"
