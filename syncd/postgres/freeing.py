"""Rotation of the outbox: the server's function that frees rows, its call and its result.

At a start it runs as one blocking step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import psycopg
import structlog
from psycopg import errors as pg

from syncd.postgres import session
from syncd.statements import statement, with_numbers

SLOT_ROWS = 200_000
SLOT_SECONDS = 60.0
"""Writers use one slot for this many rows or seconds, whichever limit comes first."""
START_TRIES = 20
NEXT_TRY_SECONDS = 0.05
MUST_REBUILD_HINT = (
    "that consumer reads the tables again when it runs; "
    "if it is gone for good: DELETE FROM syncd.consumers WHERE name = …; "
    "to keep more rows for slow consumers, raise SYNCD_OUTBOX_MAX_ROWS"
)

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Rotation:
    """Result of one call of the rotation.

    ``freed`` counts slots; ``later`` if another transaction has a slot open, so that it could not
    be freed; ``marked`` is the consumer that has to rebuild.
    """

    freed: int
    later: bool
    marked: str | None
    rows: int
    max_rows: int

    def warn_of_rebuild(self) -> None:
        """Log which consumer has to rebuild, if one has."""
        if self.marked is not None:
            logger.warning(
                "outbox_full",
                rows=self.rows,
                max_rows=self.max_rows,
                must_rebuild=self.marked,
                hint=MUST_REBUILD_HINT,
            )


def rotate_query(connection: session.AnyConnection) -> bytes:
    """The whole transaction of a rotation, as one message without parameters."""
    rotate = with_numbers(
        "rotation", "rotate", slot_rows=int(SLOT_ROWS), slot_seconds=float(SLOT_SECONDS)
    )
    return b";\n".join((session.beginning(connection).encode(), rotate))


def apply_cap(connection: psycopg.Connection) -> None:
    """At a start, free the outbox until it is below its cap, before the first read.

    While no syncd ran, no row was freed.
    """
    for _ in range(START_TRIES):
        done = rotate(connection)
        if done is not None:
            done.warn_of_rebuild()
            if done.rows <= done.max_rows or not (done.later or done.marked):
                return
        time.sleep(NEXT_TRY_SECONDS)


def rotate(connection: psycopg.Connection) -> Rotation | None:
    """Call the rotation once; ``None`` if another transaction held its lock."""
    try:
        cursor = connection.execute(rotate_query(connection), prepare=False)
    except BaseException as error:
        if not connection.closed:
            connection.execute(statement("passes", "rollback"))
        if isinstance(error, pg.LockNotAvailable):
            return None
        raise
    while cursor.description is None and cursor.nextset():
        pass
    row = cursor.fetchone()
    assert row is not None
    return Rotation(*row)


def read_outbox_rows(connection: psycopg.Connection) -> int:
    """Upper bound of the number of rows in the outbox.

    It follows from ids and sizes, and costs a few look-ups.
    """
    row = connection.execute(statement("rotation", "read_outbox_rows")).fetchone()
    assert row is not None
    return int(row[0])
