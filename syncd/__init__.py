"""Vector search that is provably in step with PostgreSQL.

``connect`` and ``AsyncClient`` talk to a running ``syncd serve``; their errors are ``SyncdError``.
The rest of the package is the service itself and its command line.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from syncd.errors import (
    AddressInUse,
    ConsumerReplaced,
    DamagedFile,
    DatabaseError,
    DatabaseUnreachable,
    DataDirectoryError,
    DimensionMismatch,
    EmbeddedUnavailable,
    InvalidDocument,
    InvalidFilter,
    InvalidParams,
    InvalidVector,
    LockTaken,
    NotInstalled,
    NotReady,
    Overloaded,
    RayUnavailable,
    RequestError,
    ServiceUnavailable,
    SettingsError,
    ShardsUnavailable,
    SyncdError,
    TimedOut,
    TooLarge,
    Unauthorized,
    UnknownDataset,
    UnknownKey,
    WrongSchemaVersion,
)

if TYPE_CHECKING:
    from syncd.client.async_client import AsyncClient
    from syncd.client.calls import Found, Hit
    from syncd.client.client import Client, connect

__all__ = [
    "AddressInUse",
    "AsyncClient",
    "Client",
    "ConsumerReplaced",
    "DamagedFile",
    "DataDirectoryError",
    "DatabaseError",
    "DatabaseUnreachable",
    "DimensionMismatch",
    "EmbeddedUnavailable",
    "Found",
    "Hit",
    "InvalidDocument",
    "InvalidFilter",
    "InvalidParams",
    "InvalidVector",
    "LockTaken",
    "NotInstalled",
    "NotReady",
    "Overloaded",
    "RayUnavailable",
    "RequestError",
    "ServiceUnavailable",
    "SettingsError",
    "ShardsUnavailable",
    "SyncdError",
    "TimedOut",
    "TooLarge",
    "Unauthorized",
    "UnknownDataset",
    "UnknownKey",
    "WrongSchemaVersion",
    "connect",
]

CLIENT = {
    "AsyncClient": "async_client",
    "Client": "client",
    "Found": "calls",
    "Hit": "calls",
    "connect": "client",
}
"""What is imported when it is first used, with its module: the service needs no client."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in CLIENT:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(import_module(f"syncd.client.{CLIENT[name]}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *CLIENT})
