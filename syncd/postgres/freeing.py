"""What the server's rotation of the outbox is asked and what it answers; at a start, in one blocking step."""

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
"""A slot is written to for so many rows, or so long, whichever is first."""
START_TRIES = 20
NEXT_TRY_SECONDS = 0.05
MUST_REBUILD_HINT = (
    "that consumer reads the tables again when it runs; if it is gone for good: DELETE FROM syncd.consumers WHERE name = …; "
    "to keep more for slow ones, raise SYNCD_OUTBOX_MAX_ROWS"
)

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Rotation:
    """What one call did: slots freed, whether one could not be because somebody has it open, and which consumer was told to rebuild."""

    freed: int
    later: bool
    marked: str | None
    rows: int
    max_rows: int

    def warn_of_rebuild(self) -> None:
        """Log which consumer was told to rebuild, if one was."""
        if self.marked is not None:
            logger.warning(
                "outbox_full",
                rows=self.rows,
                max_rows=self.max_rows,
                must_rebuild=self.marked,
                hint=MUST_REBUILD_HINT,
            )


def rotate_query(connection: session.AnyConnection) -> bytes:
    """The whole transaction, as one message without parameters."""
    rotate = with_numbers(
        "rotation", "rotate", slot_rows=int(SLOT_ROWS), slot_seconds=float(SLOT_SECONDS)
    )
    return b";\n".join((session.beginning(connection).encode(), rotate))


def apply_cap(connection: psycopg.Connection) -> None:
    """At a start: while no syncd ran, nothing was freed. Where the outbox is over its cap, have it brought below before anything is read."""
    for _ in range(START_TRIES):
        done = rotate(connection)
        if done is not None:
            done.warn_of_rebuild()
            if done.rows <= done.max_rows or not (done.later or done.marked):
                return
        time.sleep(NEXT_TRY_SECONDS)


def rotate(connection: psycopg.Connection) -> Rotation | None:
    """One call; ``None`` where another transaction was in the way."""
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
    """About how many rows the outbox holds, at most that many; it is read from ids and sizes, and costs a few look-ups."""
    row = connection.execute(statement("rotation", "read_outbox_rows")).fetchone()
    assert row is not None
    return int(row[0])
