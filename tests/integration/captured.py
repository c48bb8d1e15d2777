"""What a write leaves behind: its rows in the outbox, and notifications."""

from __future__ import annotations

from collections.abc import Callable
from typing import LiteralString

import psycopg
import pytest

Entry = tuple[str, str | None]


def outbox(db: psycopg.Connection) -> list[Entry]:
    """Op and key of every row, in order; within one statement the order of keys does not matter."""
    return db.execute("SELECT op::text, key FROM syncd.outbox ORDER BY xid, op, key, id").fetchall()


def keys(*names: object) -> list[Entry]:
    """The rows that changes of these keys leave."""
    return [("k", str(name)) for name in names]


def execute(db: psycopg.Connection, write: LiteralString) -> None:
    """Run a statement; skips the test where the server is older than it."""
    if write.startswith("MERGE") and db.info.server_version < 150_000:
        pytest.skip("PostgreSQL 14 has no MERGE")
    db.execute(write)


class listening:  # noqa: N801  it reads as a statement
    """A session that listens; calling what it yields tells how many notifications have come since."""

    def __init__(self, conninfo: str) -> None:
        self.connection = psycopg.connect(conninfo, autocommit=True)

    def __enter__(self) -> Callable[[], int]:
        self.connection.execute("LISTEN syncd")
        self.connection.execute("LISTEN mark")
        return self.heard

    def heard(self) -> int:
        """A notification of our own closes the burst: what comes before it is what there was."""
        self.connection.execute("NOTIFY mark")
        for earlier, notification in enumerate(self.connection.notifies(timeout=30)):
            if notification.channel == "mark":
                return earlier
        raise AssertionError("our own notification did not come")

    def __exit__(self, *_: object) -> None:
        self.connection.close()
