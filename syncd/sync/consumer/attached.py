"""The attached sources: loaded at a start, resumed after a lost connection, and kept current."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import structlog

from syncd.postgres.outbox import Cursor
from syncd.postgres.source import Source
from syncd.store.manifest import SavedSource
from syncd.sync.consumer.outcome import NO_LONGER_HELD, alert_of_rebuild
from syncd.sync.consumer.progress import Progress
from syncd.sync.registry.datasets import Registry
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.loading import load_source
from syncd.types import Position, Snapshot

Followed = dict[int, FollowedSource]
"""Followed sources by id."""

logger = structlog.get_logger()


def load_sources(
    registry: Registry,
    sources: Iterable[Source],
    saved_sources: Sequence[SavedSource],
    position: Position,
    *,
    doubt: str,
    freed: Snapshot | None,
    must_rebuild: bool,
) -> Followed:
    """Load the attached sources from a checkpoint as far as it can be trusted.

    ``position`` is the position at which ``sources`` were read, and ``doubt`` the reason not to
    trust the checkpoint. A source also cannot be trusted if its saved position lacks transactions
    whose changes were ``freed``, or if this consumer ``must_rebuild``.
    """
    saved_by_id = {saved.id: saved for saved in saved_sources}
    followed: Followed = {}
    for source in sources:
        saved = saved_by_id.get(source.id)
        if saved is not None and (
            saved.oid != source.oid or saved.arguments_md5 != source.arguments_md5
        ):
            saved = None
        lost = must_rebuild or (
            saved is not None and not doubt and Snapshot.parse(saved.snapshot).lacks(freed)
        )
        why = NO_LONGER_HELD if lost else doubt
        followed[source.id] = load_source(source, registry, saved, position, doubt=why, lost=lost)
    lacking = [each for each in followed.values() if each.must_rebuild]
    if lacking:
        alert_of_rebuild(registry, lacking)
    return followed


def resume_sources(
    followed: Iterable[FollowedSource], position: Position, *, trusted: bool
) -> None:
    """Go on after a lost connection.

    The server may have crashed and lost commits that were not flushed. If it is not ``trusted`` to
    be the server from before, everything is compared with it from ``position`` on.
    """
    for each in followed:
        if trusted:
            each.return_to_confirmed()
            each.doubt_unlogged()
        else:
            each.cursor = Cursor(position)
            each.begin_scan()
    if not trusted:
        logger.warning(
            "reconciling", reason="the database does not hold this run's last checkpoint"
        )


def follow_attached(progress: Progress, sources: Sequence[Source], position: Position) -> None:
    """Follow the sources that were attached, and stop those that were detached.

    ``position`` is the position at which ``sources`` were read.
    """
    attached = {source.id: source for source in sources}
    kept: Followed = {}
    gone: dict[int, FollowedSource] = {}
    for source_id, each in progress.sources.items():
        if source_id in attached and each.source.is_same(attached[source_id]):
            kept[source_id] = each
        else:
            gone[each.source.oid] = each
    for source in sources:
        if source.id in kept:
            kept[source.id].rename(source)
            continue
        before = gone.pop(source.oid, None)
        new = kept[source.id] = FollowedSource(source, progress.registry, Cursor(position))
        new.begin_scan()
        new.replaces(before)
        logger.info("source_attached" if before is None else "source_altered", source=source.name)
    progress.sources = kept
    for each in gone.values():
        each.stop()
        logger.info("source_detached", source=each.source.name)
