"""Checkpoints: at regular intervals, at a stop, and on request.

A checkpoint is safe to resume because of the order of its four steps:

1. Capture the indexes and their positions between two passes.
2. Commit a nonce durably; that flushes every commit that these positions include.
3. Make the index files durable.
4. Write the manifest, which names the nonce, the positions and the files.

A crash at any point leaves the previous checkpoint.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import anyio
import msgspec
import psycopg
import structlog
from anyio import to_thread

from syncd.errors import DatabaseError, DatabaseUnreachable, DataDirectoryError, SyncdError
from syncd.index.generation.saving import CapturedIndex
from syncd.postgres.connection import translated_errors
from syncd.postgres.control import Control
from syncd.postgres.identity import Nonce, write_nonce
from syncd.statements import statement
from syncd.store.checkpoint import CheckpointStore
from syncd.store.manifest import Manifest, SavedDataset, SavedQuarantined, SavedSource, SavedWindow
from syncd.sync.consumer.progress import Progress
from syncd.sync.consumer.session import Session
from syncd.sync.registry.datasets import Dataset
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.unconfirmed import Unconfirmed
from syncd.types import Position

CONNECTION_SECONDS = 10.0
"""Longest wait for a connection that the consumer trusts."""
SAVING_THREADS = 8
"""Number of datasets that are saved at once.

Saving a small dataset only waits for the disk, which can flush many files at a time.
"""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CheckpointDone:
    """The result of ``save``."""

    position: Position
    seconds: float
    bytes_written: int


@dataclass(frozen=True, slots=True)
class CapturedSource:
    """One source as it was between two passes."""

    followed: FollowedSource
    saved: SavedSource
    indexes: list[tuple[Dataset, CapturedIndex]]
    unconfirmed: Unconfirmed


class Checkpointer:
    """Saves the consumer's indexes and position, one checkpoint at a time."""

    def __init__(
        self, progress: Progress, session: Session, control: Control, store: CheckpointStore
    ) -> None:
        self.progress = progress
        self.session = session
        self.control = control
        self.store = store
        self.lock = anyio.Lock()
        self.last_at: datetime | None = None
        self.last_seconds: float | None = None
        self.last_error: str | None = None

    @property
    def last_success_at(self) -> datetime | None:
        """Time when the newest checkpoint was saved, by this process or the previous one."""
        newest = self.store.newest
        return self.last_at or (
            datetime.fromisoformat(newest.saved_at) if newest is not None else None
        )

    async def run(self, interval_seconds: float) -> None:
        """Save at each interval, until cancelled. A failure is logged, and tried again at the next.

        If there is no checkpoint yet, the first one does not wait: without one, a lost connection
        means that everything is read again.
        """
        with anyio.move_on_after(interval_seconds):
            if self.store.newest is None:
                await self.progress.ready.wait()
            else:
                await anyio.sleep_forever()
        while True:
            try:
                await self.save()
            except SyncdError as error:
                logger.error("checkpoint_failed", error=str(error), hint=error.hint)
                self.progress.task_failed("checkpointer", error, interval_seconds)
            await anyio.sleep(interval_seconds)

    async def save(self, proof_seconds: float = math.inf) -> CheckpointDone:
        """Write a checkpoint.

        Raises ``DatabaseError`` or ``DataDirectoryError``; then the previous checkpoint is kept.
        ``proof_seconds`` limits the time until the database has confirmed the nonce; writing files
        is not limited.
        """
        try:
            with anyio.move_on_after(proof_seconds) as proving:
                return await self.save_one(proving)
            raise self.progress.unreachable(
                f"the database did not confirm the checkpoint within {proof_seconds:g} s; "
                "the previous checkpoint is kept"
            )
        except SyncdError as error:
            if self.last_error is None:  # one alert, not one per minute while the disk is full
                self.progress.registry.alerts.add(
                    "checkpoint_failed",
                    f"a checkpoint failed: {error}",
                    reason=str(error),
                    hint=error.hint,
                )
            self.last_error = str(error)
            self.progress.registry.counters.checkpoint_failures += 1
            raise

    async def save_one(self, proving: anyio.CancelScope) -> CheckpointDone:
        """``save``, within a time-out that ends when the database has confirmed the nonce."""
        async with self.lock:
            begun = time.monotonic()
            position, bytes_written = await self.write(proving)
            self.last_seconds = time.monotonic() - begun
            self.progress.registry.counters.checkpoint_seconds.observe(self.last_seconds)
            self.last_at, self.last_error = datetime.now(UTC), None
            self.progress.registry.tasks.well("checkpointer")
            logger.debug(
                "checkpoint_saved", seconds=round(self.last_seconds, 3), bytes_written=bytes_written
            )
            return CheckpointDone(position, self.last_seconds, bytes_written)

    async def write(self, proving: anyio.CancelScope) -> tuple[Position, int]:
        """The four steps of the module's docstring."""
        connection = await self.progress.settled_connection(CONNECTION_SECONDS)
        try:
            position, captured, nonce, doubts = await self.capture_and_prove(connection)
        except DatabaseUnreachable:  # the connection was lost; the consumer opens another one
            connection = await self.progress.settled_connection(CONNECTION_SECONDS)
            position, captured, nonce, doubts = await self.capture_and_prove(connection)
        proving.deadline = math.inf
        try:
            bytes_written = await to_thread.run_sync(self.write_files, captured, nonce, doubts)
        except OSError as error:
            raise DataDirectoryError(
                f"the checkpoint cannot be written to {self.store.data_dir}: "
                f"{error.strerror or error}",
                hint="free space on its disk; the previous checkpoint is kept, nothing is lost",
            ) from error
        try:
            with anyio.fail_after(self.session.patience.seconds):
                await self.note()
        except (DatabaseError, TimeoutError) as error:  # the checkpoint is complete nevertheless
            logger.debug("checkpoint_not_noted", error=str(error))
        return position, bytes_written

    async def note(self) -> None:
        """Note the checkpoint in the database, which frees the changes that none needs any more.

        Raises ``DatabaseError``.
        """
        async with self.control.transaction() as control:
            await control.execute(
                statement("consumer", "note_checkpoint"),
                [self.session.consumer, self.session.run_id],
            )
            await control.execute(
                statement("consumer", "note_needs"),
                {"consumer": self.session.consumer, "kept": self.store.nonces},
            )

    async def capture_and_prove(
        self, connection: psycopg.Connection
    ) -> tuple[Position, list[CapturedSource], Nonce, int]:
        """Steps 1 and 2. The last value says which doubts the captured indexes have settled.

        Raises ``DatabaseError``.
        """
        progress = self.progress
        async with progress.busy:
            position, doubts = progress.oldest_position(), progress.doubts.saved
            captured = [capture(followed) for followed in progress.sources.values()]
            try:
                with translated_errors():
                    nonce = await self.session.in_thread(
                        write_nonce,
                        connection,
                        self.session.consumer,
                        position,
                        self.store.nonces,
                    )
            except BaseException:
                for each in captured:
                    each.followed.not_confirmed(each.unconfirmed)
                progress.unsettle(connection)
                raise
            self.session.nonce = nonce
        return position, captured, nonce, doubts

    def write_files(self, captured: list[CapturedSource], nonce: Nonce, doubts: int) -> int:
        """Write the index files, then the manifest, in a worker thread while passes go on."""
        self.store.check_directory()
        bytes_written = 0
        sources = []
        with ThreadPoolExecutor(SAVING_THREADS) as threads:
            indexes = [index for each in captured for _, index in each.indexes]
            done = iter(list(threads.map(CapturedIndex.save, indexes)))
        for each in captured:
            datasets = []
            for dataset, index in each.indexes:
                saved = next(done)
                bytes_written += saved.bytes_written
                directory = index.directory.relative_to(self.store.data_dir).as_posix()
                datasets.append(SavedDataset(dataset.name, directory, saved.saved))
            sources.append(with_datasets(each.saved, datasets))
        manifest = Manifest(
            consumer=self.session.consumer,
            incarnation=self.session.incarnation,
            nonce=nonce.value,
            nonce_xid=nonce.xid,
            fingerprint_probe=self.session.fingerprint_probe,
            saved_at=datetime.now(UTC).isoformat(),
            sources=sources,
            doubts=doubts,
            shard=str(self.session.shard),
            bucket_probe=self.session.bucket_probe,
        )
        bytes_written += self.store.save(manifest)
        registry = self.progress.registry
        left, registry.left = registry.left, []
        registry.left += self.store.remove_left(left)
        return bytes_written


def capture(followed: FollowedSource) -> CapturedSource:
    """A copy of a source's state, to save while passes go on; views never change."""
    source, scan, cursor = followed.source, followed.scan, followed.cursor
    saved = SavedSource(
        id=source.id,
        oid=source.oid,
        arguments_md5=source.arguments_md5,
        snapshot=str(cursor.position.snapshot),
        outbox_id=cursor.position.outbox_id,
        scanning=followed.reading or bool(followed.reread),
        scanned_to=scan.after
        if scan is not None and scan.resumable and not followed.reread
        else None,
        scanned_rows=scan.rows if scan is not None else 0,
        quarantine=[
            SavedQuarantined(key, row.dataset, row.reason, row.since.isoformat(), row.fingerprint)
            for key, row in followed.quarantine.items()
        ],
        datasets=[],
        catalogue=(followed.is_failed and followed.catalogue.before) or followed.catalogue.seen,
        doubted=followed.is_believed
        or followed.catalogue.rewritten
        or followed.catalogue.doubt is not None,
        retired=list(followed.datasets.emptied.names),
        compared_at="" if followed.compared_at is None else followed.compared_at.isoformat(),
        window=None
        if cursor.window is None
        else SavedWindow(str(cursor.window.end), cursor.window.after),
    )
    indexes = [(dataset, dataset.index.capture()) for dataset in followed.datasets.values()]
    return CapturedSource(followed, saved, indexes, followed.begin_confirming())


def with_datasets(saved: SavedSource, datasets: list[SavedDataset]) -> SavedSource:
    """``saved`` with its datasets' files."""
    return msgspec.structs.replace(saved, datasets=datasets)
