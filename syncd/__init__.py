"""Vector search that is provably in step with PostgreSQL.

``connect`` and ``AsyncClient`` talk to a running ``syncd serve``; their errors are ``SyncdError``.
The rest of the package is the service itself and its command line.
"""

from syncd.client.async_client import AsyncClient
from syncd.client.calls import Found, Hit
from syncd.client.client import Client, connect
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
