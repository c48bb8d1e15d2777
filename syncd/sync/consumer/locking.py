"""The locks of a pass, one by one: a table that is locked elsewhere delays no other table."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psycopg
from psycopg import errors as pg
from psycopg import sql

from syncd.errors import Trouble
from syncd.statements import statement
from syncd.sync.source.followed import FollowedSource

OUTBOX_LOCK_TRIES = 10
"""Number of attempts to lock the outbox, of 100 ms each.

A slot is freed in milliseconds. Only VACUUM FULL and similar commands lock the outbox for longer;
then the pass is put off.
"""


def begin_with_outbox(connection: psycopg.Connection, begin: sql.Composed) -> None:
    """Open the transaction and lock the outbox.

    Raises ``psycopg.errors.LockNotAvailable`` if another session keeps it locked.
    """
    for _ in range(OUTBOX_LOCK_TRIES - 1):
        try:
            connection.execute(begin)
            return
        except pg.LockNotAvailable:
            if not connection.closed:
                connection.execute(statement("passes", "rollback"))
    connection.execute(begin)


def lock_each(
    connection: psycopg.Connection, wanted: Sequence[FollowedSource]
) -> list[FollowedSource]:
    """Lock the sources one after the other; returns those that could be locked.

    The others note why they could not.
    """
    locked = []
    for each in wanted:
        connection.execute(statement("passes", "savepoint"))
        try:
            connection.execute(each.source.lock())
        except pg.LockNotAvailable:
            connection.execute(statement("passes", "rollback_to_savepoint"))
            each.behind(
                Trouble("another transaction holds a lock on the table"), now=time.monotonic()
            )
        except pg.InsufficientPrivilege:
            connection.execute(statement("passes", "rollback_to_savepoint"))
            role = sql.Identifier(connection.info.user).as_string()
            grant = f"GRANT SELECT ON {each.source.identifier.as_string()} TO {role};"
            refused = Trouble(f"role {role} may not read {each.source.name}", grant)
            each.failed(refused, now=time.monotonic())
        else:
            locked.append(each)
        connection.execute(statement("passes", "release_savepoint"))
    return locked
