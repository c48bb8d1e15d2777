"""The rotator: it keeps the outbox as long as the consumers' checkpoints need it, within its cap.

One function of the server does the work (``syncd.rotate_outbox``). Each consumer calls it at its
start and every few seconds.

No change is missed if this fails or runs early. Each pass compares its cursors with the freed
transactions, under a lock that is older than its snapshot. A source whose changes may be gone is
read again.
"""

from __future__ import annotations

import anyio
import structlog

from syncd.errors import SyncdError
from syncd.postgres.control import Control, report_beginning
from syncd.postgres.freeing import MUST_REBUILD_HINT, Rotation, rotate_query
from syncd.statements import statement
from syncd.sync.background.checkpoints import Checkpointer
from syncd.sync.consumer.progress import Progress
from syncd.sync.consumer.session import Session

ROTATION_SECONDS = 5.0
"""Time between two rotations."""
TRIES = 5
"""Number of attempts to free a slot that another session has open."""
NEXT_TRY_SECONDS = 0.05
"""Time between two of these attempts; a pass of another consumer opens a slot for milliseconds."""
PASS_SECONDS = 30.0
"""Longest wait for a pass that sees the freed transactions."""
CHECKPOINTS_KEPT = 2
"""Number of checkpoints on disk; the outbox is kept for each of them."""

logger = structlog.get_logger()


class Rotator:
    """Calls for a rotation every few seconds.

    If two consumers do it at once, one of them finds nothing to do.
    """

    def __init__(
        self, progress: Progress, session: Session, control: Control, checkpointer: Checkpointer
    ) -> None:
        self.progress = progress
        self.session = session
        self.control = control
        self.checkpointer = checkpointer
        self.outbox_rows: int | None = None
        """Largest possible number of outbox rows at the last rotation; None before the first."""

    async def run(self) -> None:
        """Rotate until cancelled. A rotation that fails is tried again at the next interval."""
        said = ""
        while True:
            await anyio.sleep(ROTATION_SECONDS)
            try:
                await self.rotate()
            except SyncdError as error:
                self.progress.task_failed("rotator", error, ROTATION_SECONDS)
                say = (
                    logger.warning
                    if self.progress.connected and str(error) != said
                    else logger.debug
                )
                say("rotation_failed", error=str(error), hint=error.hint)
                said = str(error)
            else:
                self.progress.registry.tasks.well("rotator")
                said = ""

    async def rotate(self) -> None:
        """Free slots of the outbox, and keep the cap on this consumer's side.

        Raises ``DatabaseError``.
        """
        for attempt in range(TRIES):
            done = await self.ask()
            done.warn_of_rebuild()
            if done.marked is not None:
                self.progress.registry.alerts.add(
                    "must_rebuild",
                    f"the outbox is over its cap of {done.max_rows} rows; "
                    f"consumer {done.marked!r} must rebuild",
                    marked=done.marked,
                    rows=done.rows,
                    max_rows=done.max_rows,
                    hint=MUST_REBUILD_HINT,
                )
            if not done.later or attempt == TRIES - 1:
                break
            await anyio.sleep(NEXT_TRY_SECONDS)
        self.outbox_rows = done.rows
        told_to_rebuild, holds_it_back = await self.read_own_part()
        if told_to_rebuild:
            await self.heed()
        if told_to_rebuild or (holds_it_back and done.rows > done.max_rows // 2):
            for _ in range(CHECKPOINTS_KEPT):  # the outbox is kept for all of them
                await self.checkpointer.save()

    async def ask(self) -> Rotation:
        """Call the server's function once, between two passes: a pass of ours opens the slots."""
        async with self.progress.busy, self.control.transaction() as connection:
            # The rotation is its own transaction: end the given one before, begin another behind.
            commit, begin = (
                statement("passes", "commit").encode(),
                report_beginning(connection).encode(),
            )
            query = b";\n".join((commit, rotate_query(connection), begin))
            cursor = await connection.execute(query, prepare=False)
            while cursor.description is None and cursor.nextset():
                pass
            row = await cursor.fetchone()
        assert row is not None
        done = Rotation(*row)
        if done.freed:
            logger.debug("outbox_freed", slots=done.freed, rows=done.rows)
        return done

    async def read_own_part(self) -> tuple[bool, bool]:
        """Whether this consumer must rebuild, and whether the outbox keeps most for this consumer.

        If it must rebuild, the outbox no longer keeps anything for it.
        """
        async with self.control.transaction() as connection:
            query = statement("rotation", "read_own_part")
            row = await (
                await connection.execute(query, [self.session.consumer, self.session.run_id])
            ).fetchone()
        return (False, False) if row is None else (row[0], row[1])

    async def heed(self) -> None:
        """Wait for a pass that sees the freed transactions, then have the outbox kept again.

        That pass begins to read the sources again that have lost changes.
        """
        progress = self.progress
        needed = progress.passes_begun + 1
        with anyio.move_on_after(PASS_SECONDS):
            while progress.passes_done < needed:
                done = progress.pass_done
                progress.wake("request")
                await done.wait()
        if progress.passes_done < needed:
            return  # try again at the next interval
        async with progress.busy, self.control.transaction() as connection:
            needs = str(progress.oldest_position().snapshot)
            name, run_id = self.session.consumer, self.session.run_id
            await connection.execute(
                statement("rotation", "end_must_rebuild"), [needs, name, run_id]
            )
