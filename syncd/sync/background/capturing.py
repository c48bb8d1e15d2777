"""Indexes and their tables at one snapshot, for a comparison that takes its time.

A pass hands over its snapshot and the indexes' views while its transaction is open. A transaction
on another connection imports the snapshot, and locks the tables while the pass still has its locks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import anyio
from anyio import to_thread
from psycopg import errors as pg
from psycopg import sql

from syncd.postgres import session
from syncd.postgres.connection import PassConnection, open_pass_connection, translated_errors
from syncd.statements import filled
from syncd.sync.background.comparison import (
    Captured,
    Found,
    compare_or_fail,
    in_the_way,
    not_in_step,
)
from syncd.sync.background.turns import take_turn
from syncd.sync.background.verified import Work
from syncd.sync.consumer.cuts import Imported
from syncd.sync.consumer.outcome import Handover
from syncd.sync.consumer.progress import Progress
from syncd.sync.consumer.session import Session
from syncd.sync.source.followed import FollowedSource
from syncd.types import Position


class Taken(NamedTuple):
    """Sources at one snapshot, which the connection's transaction sees."""

    connection: PassConnection
    position: Position
    sources: list[Captured]


async def take(
    progress: Progress,
    own: Session,
    ids: Sequence[int],
    capture: Callable[[FollowedSource], Captured],
    seconds: float,
    imported: Imported | None = None,
) -> Taken:
    """Capture some sources in a pass: the next one, or the one at a leader's snapshot.

    Raises ``DatabaseError``, ``CutFailed``, ``InTheWay``, or ``OthersVerify`` if a shard has no
    turn. At a leader's snapshot it is taken later: every shard must capture at once.
    """
    connection = await to_thread.run_sync(
        open_pass_connection,
        own.settings.conninfo,
        own.settings.consumer,
        own.patience,
        abandon_on_cancel=True,
    )
    taken: list[Taken] = []
    refused: list[Exception] = []

    def take_views(snapshot: str, position: Position, sources: Sequence[FollowedSource]) -> None:
        try:
            begin = filled("verify", "begin", snapshot=sql.Literal(snapshot))
            limits = filled("verify", "limits")
            connection.execute(
                sql.SQL(";\n").join((begin, sql.SQL(session.service_settings(connection)), limits))
            )
            if imported is None:
                take_turn(connection, own.shard)
            present = [each for each in sources if not each.is_failed]
            for each in present:
                connection.execute(each.source.lock())
            taken.append(Taken(connection, position, [capture(each) for each in present]))
        except Exception as error:  # noqa: BLE001 - it fails this verify, not the pass
            refused.append(error)

    try:
        with anyio.move_on_after(seconds) as waiting:
            await progress.hand_over(Handover(frozenset(ids), take_views), imported)
        if waiting.cancelled_caught:
            raise not_in_step(seconds)  # noqa: TRY301 - closes the connection too
        with translated_errors(own.settings.conninfo):
            raise_first(refused)
    except BaseException:
        with anyio.CancelScope(shield=True):
            async with progress.busy:  # the pass under way may be using it
                connection.close()
        raise
    return taken[0]


def raise_first(errors: Sequence[Exception]) -> None:
    """Raise the first of some errors, if there is one."""
    for error in errors:
        raise in_the_way() if isinstance(error, pg.LockNotAvailable) else error


async def compare(own: Session, taken: Taken, work: Work, *, deep: bool) -> list[Found]:
    """Compare what was captured with the tables, and close the connection."""
    stop = threading.Event()

    def run() -> list[Found]:
        with taken.connection:
            return [
                compare_or_fail(taken.connection, each, deep=deep, stop=stop, note=work.note)
                for each in taken.sources
            ]

    try:
        with translated_errors(own.settings.conninfo):
            return await to_thread.run_sync(run, abandon_on_cancel=True)
    except BaseException:
        stop.set()
        raise
