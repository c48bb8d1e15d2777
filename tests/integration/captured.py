"""Traces of a write: its rows in the outbox, and notifications."""

from __future__ import annotations

from collections.abc import Callable
from typing import LiteralString

import psycopg
import pytest

Entry = tuple[str, str | None]


def outbox(db: psycopg.Connection) -> list[Entry]:
    """Op and key of every outbox row, in order; sorted by key within one transaction."""
    return db.execute("SELECT op::text, key FROM syncd.outbox ORDER BY xid, op, key, id").fetchall()


def keys(*names: object) -> list[Entry]:
    """Outbox rows for changes of these keys."""
    return [("k", str(name)) for name in names]


def execute(db: psycopg.Connection, write: LiteralString) -> None:
    """Run a statement; skips the test if the server is too old for it."""
    if write.startswith("MERGE") and db.info.server_version < 150_000:
        pytest.skip("PostgreSQL 14 has no MERGE")
    db.execute(write)


class listening:  # noqa: N801  it reads as a statement
    """A session that listens; yields a function that counts notifications since its last call."""

    def __init__(self, conninfo: str) -> None:
        self.connection = psycopg.connect(conninfo, autocommit=True)

    def __enter__(self) -> Callable[[], int]:
        self.connection.execute("LISTEN syncd")
        self.connection.execute("LISTEN mark")
        return self.heard

    def heard(self) -> int:
        """Notifications before one that this session sends itself."""
        self.connection.execute("NOTIFY mark")
        for earlier, notification in enumerate(self.connection.notifies(timeout=30)):
            if notification.channel == "mark":
                return earlier
        raise AssertionError("the session's own notification did not come")

    def __exit__(self, *_: object) -> None:
        self.connection.close()
