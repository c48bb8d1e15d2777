"""The transaction of a pass: how it begins, and how it ends.

Invariant: the outbox is locked before the transaction has a snapshot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import LiteralString

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from syncd.postgres import session
from syncd.postgres.batch import PreparingConnection, ask
from syncd.statements import filled, statement
from syncd.sync.consumer.ahead import COMMIT, Prepared

SETTINGS = ("service_settings", "plan_settings")


@dataclass(frozen=True, slots=True)
class Transaction:
    """A transaction on a connection in autocommit mode; see ``Pass`` for ``pooled``."""

    connection: PreparingConnection
    pooled: bool
    prepared: Prepared

    def beginning(self) -> list[sql.Composable]:
        """The statements that open the transaction and lock the outbox."""
        begin: list[sql.Composable] = [filled("passes", "begin_pass")]
        if self.pooled:
            begin.append(sql.SQL(local_settings(self.connection)))
        begin.append(filled("passes", "lock_outbox"))
        return begin

    @property
    def ended(self) -> bool:
        """Whether the transaction has ended, for example with the last read."""
        return self.connection.info.transaction_status is TransactionStatus.IDLE

    def commit(self) -> None:
        """End the transaction, if it has not ended with the last read."""
        if not self.ended:
            ask(self.connection, COMMIT)

    def rollback(self) -> None:
        """End the transaction, if the connection is still there."""
        if not self.connection.closed and not self.ended:
            self.connection.execute(statement("passes", "rollback"))
            self.forget_prepared()

    def forget_prepared(self) -> None:
        """Prepare each statement again when it is needed."""
        self.prepared.tried.clear()
        if self.connection.kept is not None:
            self.connection.kept.forget(self.connection)


def local_settings(connection: psycopg.Connection) -> LiteralString:
    """Settings of a pass, for its transaction."""
    return ";\n".join((session.settings(connection, *SETTINGS), statement("passes", "limits")))


def session_settings(connection: psycopg.Connection) -> LiteralString:
    """Settings of a pass, for a session that is not shared."""
    return session.own_session_settings(connection, *SETTINGS, limits=statement("passes", "limits"))
