"""Differences between an index and its table: made without an outbox row, and counted by verify."""

from __future__ import annotations

import numpy as np
import psycopg

from syncd.protocol.messages import DatasetVerified, VerifyResult
from tests.daemon import Daemon

HELD_UP_SOON = {
    "syncd.sync.source.source_state.HELD_UP_SECONDS": 0.4,
    "syncd.sync.source.followed.LAST_RETRY_SECONDS": 0.5,
    "syncd.sync.background.verify.FIRST_PAUSE_SECONDS": 0.05,
}
"""Constants by which a verify soon leaves out a locked table, and soon compares it again."""


def unseen(db: psycopg.Connection, statement: str) -> None:
    """Change the table without an outbox row."""
    with db.transaction():
        db.execute(statement.encode())
        db.execute("DELETE FROM syncd.outbox WHERE xid = pg_current_xact_id()")


def of(result: VerifyResult, dataset: str = "default/items") -> DatasetVerified:
    """Result of one dataset."""
    return next(row for row in result.datasets if row.dataset == dataset)


def counts(row: DatasetVerified) -> tuple[bool, int, int, int]:
    """Whether the dataset is in sync, and its missing, extra and stale rows."""
    return row.in_sync, row.missing, row.extra, row.stale


def assert_equal(db: psycopg.Connection, daemon: Daemon) -> None:
    """The index holds the rows of the table."""
    rows: dict[int, list[float]] = dict(
        db.execute("SELECT id, v::real[] FROM items WHERE NOT gone AND v IS NOT NULL").fetchall()
    )
    with daemon.client() as client:
        indexed = {
            row.key: row.vector
            for row in client.get("items", [*client.keys("items")], vectors=True)
        }
    assert indexed.keys() == rows.keys()
    for key, vector in rows.items():
        found = indexed[key]
        assert found is not None
        np.testing.assert_allclose(found, vector, rtol=1e-6)
