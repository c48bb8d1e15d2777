"""The snapshot of a pass, and the facts that decide whether and how the pass goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from syncd.errors import ConsumerReplaced, DatabaseUnreachable
from syncd.sync.source.followed import FollowedSource
from syncd.types import Snapshot

FACTS = 8
"""Number of columns of ``read_snapshot`` before those of a table."""


class Taken(NamedTuple):
    """The answer to ``read_snapshot``."""

    snapshot: Snapshot
    newest_outbox_id: int
    in_recovery: bool
    run_id: str | None
    freed: Snapshot | None
    history: str | None
    next_xid: int
    doubts: int
    tables: Sequence[tuple[int, str, str, str]]
    """Oid, schema, present name and mark of each table that was asked about."""

    @classmethod
    def parse(cls, rows: Sequence[Sequence[Any]]) -> Taken:
        """The facts of some rows: each has those of the snapshot, and one table's."""
        snapshot, newest, in_recovery, run_id, freed, history, next_xid, doubts = rows[0][:FACTS]
        tables = [tuple(row[FACTS:]) for row in rows if row[FACTS] is not None]
        return cls(
            Snapshot.parse(snapshot),
            newest,
            in_recovery,
            run_id,
            None if freed is None else Snapshot.parse(freed),
            history,
            next_xid,
            doubts,
            tables,
        )

    def check(self, *, consumer: str, run_id: str, incarnation: str) -> None:
        """Raise an error if this process or this server must no longer be followed."""
        if self.in_recovery:
            raise DatabaseUnreachable(
                "the server has become a standby", hint="name all hosts in SYNCD_DSN"
            )
        # before the consumer: its row may not have been restored yet
        if self.history is None or not self.history.startswith(incarnation[:8]):
            raise DatabaseUnreachable(
                "the database was restored from a dump",
                hint="wait: syncd connects again, and compares every row",
            )
        if self.run_id is None:
            raise ConsumerReplaced(
                f"the row of consumer {consumer!r} was deleted from syncd.consumers",
                hint="start syncd again if it was not meant to go: it reads the tables again",
            )
        if self.run_id != run_id:
            raise ConsumerReplaced(
                f"another process has taken the consumer name {consumer!r}",
                hint="stop one of them, or give each its own SYNCD_CONSUMER",
            )

    @property
    def marks(self) -> dict[int, str]:
        """The mark of each table, by oid."""
        return {oid: mark for oid, _, _, mark in self.tables}

    def renamed(self, locked: Sequence[FollowedSource]) -> bool:
        """Whether the name of a locked table now belongs to another oid."""
        names = {oid: (schema, name) for oid, schema, name, _ in self.tables}
        return any(
            names.get(each.source.oid) != (each.source.schema, each.source.table) for each in locked
        )
