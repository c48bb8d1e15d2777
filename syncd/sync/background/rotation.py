"""Rotation: keep the outbox no longer than the consumers' checkpoints need it, and no larger than its cap.

The server does it, in one function (``syncd.rotate_outbox``), whoever calls: every consumer does, now and then, and at its start. That nothing is
missed does not hang on this: each pass compares its cursors with what has been freed, under a lock taken before its snapshot, and reads a
source again whose changes may be gone.
"""

from __future__ import annotations

import anyio
import structlog

from syncd.errors import SyncdError
from syncd.postgres.control import Control, report_beginning
from syncd.postgres.freeing import MUST_REBUILD_HINT, Rotation, rotate_query
from syncd.statements import statement
from syncd.sync.background.checkpoints import Checkpointer
from syncd.sync.consumer.consumer import Consumer

ROTATION_SECONDS = 5.0
TRIES = 5
NEXT_TRY_SECONDS = 0.05
"""A slot can be freed only while nobody has it open; a pass of another consumer has it for some milliseconds."""
PASS_SECONDS = 30.0
CHECKPOINTS_KEPT = 2

logger = structlog.get_logger()


class Rotator:
    """Calls for a rotation every few seconds. Two consumers that do it at once are no harm: one of them finds nothing to do."""

    def __init__(self, consumer: Consumer, control: Control, checkpointer: Checkpointer) -> None:
        self.consumer = consumer
        self.control = control
        self.checkpointer = checkpointer
        self.outbox_rows: int | None = None
        """How many rows the outbox held at the last rotation, at most; None before the first."""

    async def run(self) -> None:
        """Rotate, until cancelled. A rotation that fails is tried again at the next turn."""
        said = ""
        while True:
            await anyio.sleep(ROTATION_SECONDS)
            try:
                await self.rotate()
            except SyncdError as error:
                self.consumer.task_failed("rotator", error, ROTATION_SECONDS)
                say = (
                    logger.warning
                    if self.consumer.connected and str(error) != said
                    else logger.debug
                )
                say("rotation_failed", error=str(error), hint=error.hint)
                said = str(error)
            else:
                self.consumer.registry.tasks.well("rotator")
                said = ""

    async def rotate(self) -> None:
        """Free what can be freed, and do what the cap asks of this consumer; raises ``DatabaseError``."""
        for attempt in range(TRIES):
            done = await self.ask()
            done.warn_of_rebuild()
            if done.marked is not None:
                self.consumer.registry.alerts.add(
                    "must_rebuild",
                    f"the outbox is over its cap of {done.max_rows} rows; consumer {done.marked!r} must rebuild",
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
        """One call of the server's function. Between two passes: our own would have the slots open."""
        async with self.consumer.busy, self.control.transaction() as connection:
            # Between the ends of the transaction that we were given: the rotation is one of its own.
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
        """Whether the outbox no longer keeps anything for this consumer, and whether it keeps more for this one than for any other."""
        consumer = self.consumer
        async with self.control.transaction() as connection:
            query = statement("rotation", "read_own_part")
            row = await (
                await connection.execute(query, [consumer.settings.consumer, consumer.run_id])
            ).fetchone()
        return (False, False) if row is None else (row[0], row[1])

    async def heed(self) -> None:
        """Have a pass see what was freed, which begins to read again whatever has lost changes; then ask for what comes to be kept again."""
        consumer = self.consumer
        needed = consumer.passes_begun + 1
        with anyio.move_on_after(PASS_SECONDS):
            while consumer.passes_done < needed:
                done = consumer.pass_done
                consumer.wake("request")
                await done.wait()
        if consumer.passes_done < needed:
            return  # at the next turn
        async with consumer.busy, self.control.transaction() as connection:
            needs = str(consumer.oldest_position().snapshot)
            name, run_id = consumer.settings.consumer, consumer.run_id
            await connection.execute(
                statement("rotation", "end_must_rebuild"), [needs, name, run_id]
            )
