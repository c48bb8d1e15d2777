"""Loads one source at a start, from its part of a checkpoint.

The rest is read from PostgreSQL: everything if there is a doubt about the database, one dataset if
one of its files is damaged. An index from a doubted checkpoint is kept and compared row by row,
because most of it is probably right.
"""

from __future__ import annotations

from datetime import UTC, datetime

import structlog

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.index.dataset import DatasetIndex
from syncd.postgres.outbox import Cursor, Window
from syncd.postgres.source import Source
from syncd.store.manifest import SavedDataset, SavedSource
from syncd.supervision import describe
from syncd.sync.registry.datasets import Dataset, Registry
from syncd.sync.registry.states import Standing
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.quarantined import Quarantined
from syncd.sync.source.scan import Scan
from syncd.types import DatasetName, Position, Snapshot

logger = structlog.get_logger()


def load_source(
    source: Source,
    registry: Registry,
    saved: SavedSource | None,
    position: Position,
    *,
    doubt: str,
    lost: bool = False,
) -> FollowedSource:
    """A source that is ready for its first pass.

    ``position`` is the present one; a source that must be read starts from it. ``lost`` says that
    the doubt is about changes that the outbox no longer holds.
    """
    followed = FollowedSource(source, registry, Cursor(position))
    if saved is None:
        followed.begin_scan()
        logger.info(
            "source_to_be_read", source=source.name, reason=doubt or "it is not in the checkpoint"
        )
        return followed
    try:
        take_up(followed, saved, doubt=doubt, lost=lost)
    except Exception:  # an unexpected error must not come back at each start
        logger.exception("checkpoint_not_used", source=source.name)
        followed.stop()
        followed = FollowedSource(source, registry, Cursor(position))
        followed.begin_scan()
    return followed


def take_up(followed: FollowedSource, saved: SavedSource, *, doubt: str, lost: bool) -> None:
    """Load a source from its part of the checkpoint."""
    source, registry = followed.source, followed.registry
    damaged = []
    for entry in saved.datasets:
        name = DatasetName(entry.name)
        try:
            check_kind(source, entry)
            index = DatasetIndex.load(registry.data_dir / entry.directory, entry.index, name=name)
        except Exception as error:
            known = isinstance(error, DamagedFile | DataDirectoryError | OSError)
            logger.warning(
                "dataset_damaged",
                dataset=name,
                reason=describe(error),
                exc_info=None if known else error,
            )
            damaged.append(name)
            dataset = registry.create(name, source, followed)
        else:
            dataset = Dataset(name, source, index, followed, Standing(began_empty=False))
            if index.codes_damage:
                logger.warning("codes_damaged", dataset=name, reason=index.codes_damage)
        followed.datasets.adopt(dataset)
    followed.datasets.load_emptied(saved.retired)
    for row in saved.quarantine:
        since = datetime.fromisoformat(row.since)
        followed.quarantine.take_up(
            row.key, Quarantined(DatasetName(row.dataset), row.reason, since, row.fingerprint)
        )
    followed.compared_at = (
        datetime.fromisoformat(saved.compared_at) if saved.compared_at else datetime.now(UTC)
    )
    if doubt:
        logger.warning("reconciling", source=source.name, reason=doubt)
        if lost:
            followed.rebuild(followed.cursor.position)
        else:
            followed.begin_scan()
        return
    followed.catalogue.remember(saved.catalogue)
    if saved.doubted:
        followed.catalogue.note_doubt(
            f"{source.name}: a comparison was under way at the last checkpoint", believed=True
        )
    window = (
        None
        if saved.window is None
        else Window(Snapshot.parse(saved.window.end), saved.window.after)
    )
    followed.cursor = Cursor(Position(Snapshot.parse(saved.snapshot), saved.outbox_id), window)
    followed.unconfirmed.confirmed = followed.cursor
    if damaged:
        followed.begin_scan(None if saved.scanning else frozenset(damaged), reason="damaged_file")
    elif saved.scanning and saved.scanned_to is not None:
        rows = saved.scanned_rows
        followed.scan = Scan(after=saved.scanned_to, rows=rows, passed=rows, resumable=True)
        followed.unconfirmed.everything = True
    elif saved.scanning:
        followed.begin_scan()
    else:
        followed.doubt_unlogged()


def check_kind(source: Source, entry: SavedDataset) -> None:
    """Raise ``DamagedFile`` if the source's rows do not fit into the saved index.

    In another history of the database, the same id and oid may belong to another table.
    """
    index = entry.index
    wanted = (source.metric, source.key_kind, source.half, source.dimension or index.dim)
    if (index.metric, index.key_kind, index.half, index.dim or source.dimension) != wanted:
        raise DamagedFile("it was saved for a table with another key, metric or vector")
    if index.columns != source.attached_columns:
        raise DamagedFile("it was saved for a table with other columns to filter on")
