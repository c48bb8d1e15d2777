"""Parameters and results of the methods by which a leader takes a cut: one snapshot for all shards.

Only routers and ``syncd cluster verify`` call them.
"""

from __future__ import annotations

import msgspec

from syncd.protocol.messages import Milliseconds, Params, WirePosition


class HoldParams(Params, frozen=True):
    """How long the call may wait for the pass under way."""

    timeout_ms: Milliseconds


class HoldResult(msgspec.Struct, frozen=True):
    """The shard's position: it takes no snapshot of its own now."""

    positions: dict[str, WirePosition]


class CutParams(Params, frozen=True):
    """The leader's snapshot, as ``pg_export_snapshot`` names it; null: the hold only ends.

    ``tables`` are the oids of the tables that the leader has locked. ``blocked`` are those that it
    could not lock, with the reasons. With ``verify`` all tables are kept at the snapshot too, for a
    ``verify`` that follows.
    """

    snapshot: str | None = None
    position: WirePosition | None = None
    tables: tuple[int, ...] = ()
    blocked: dict[int, str] = msgspec.field(default_factory=dict)
    verify: bool = False


class CutResult(msgspec.Struct, frozen=True):
    """The snapshot that the shard has views of now."""

    positions: dict[str, WirePosition]
