"""Checkpoints: every so often, at stop, and when asked.

The order is what makes a checkpoint safe to resume: (1) take the indexes and their positions as they are between two passes; (2) commit a nonce
durably, which flushes every commit that those positions include; (3) make the index files durable; (4) write the manifest, which names the nonce,
the positions and the files. A crash anywhere leaves the checkpoint before.
"""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

import anyio
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
from syncd.sync.consumer.consumer import Consumer
from syncd.sync.registry.datasets import Dataset
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.unconfirmed import Unconfirmed
from syncd.types import Position

CONNECTION_SECONDS = 10.0
SAVING_THREADS = 8
"""Datasets saved at once: a small one is nothing but waiting for its files to be durable, and the disk takes many at a time."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class CheckpointDone:
    """What ``save`` did."""

    position: Position
    seconds: float
    bytes_written: int


@dataclass(frozen=True, slots=True)
class CapturedSource:
    """One source between two passes."""

    followed: FollowedSource
    saved: SavedSource
    indexes: list[tuple[Dataset, CapturedIndex]]
    unconfirmed: Unconfirmed


class Checkpointer:
    """Saves the consumer's indexes and position, one checkpoint at a time."""

    def __init__(self, consumer: Consumer, control: Control, store: CheckpointStore) -> None:
        self.consumer = consumer
        self.control = control
        self.store = store
        self.lock = anyio.Lock()
        self.last_at: datetime | None = None
        self.last_seconds: float | None = None
        self.last_error: str | None = None

    @property
    def last_success_at(self) -> datetime | None:
        """When the newest checkpoint was saved, by this process or the one before."""
        newest = self.store.newest
        return self.last_at or (
            datetime.fromisoformat(newest.saved_at) if newest is not None else None
        )

    async def run(self, interval_seconds: float) -> None:
        """Save every so often, until cancelled. A checkpoint that fails is logged and tried again at the next interval.

        Where there is none yet the first one does not wait: until then a lost connection means reading everything again.
        """
        with anyio.move_on_after(interval_seconds):
            if self.store.newest is None:
                await self.consumer.ready.wait()
            else:
                await anyio.sleep_forever()
        while True:
            try:
                await self.save()
            except SyncdError as error:
                logger.error("checkpoint_failed", error=str(error), hint=error.hint)
                self.consumer.task_failed("checkpointer", error, interval_seconds)
            await anyio.sleep(interval_seconds)

    async def save(self, proof_seconds: float = math.inf) -> CheckpointDone:
        """Write a checkpoint; raises ``DatabaseError`` or ``DataDirectoryError``, and then the one before stays.

        ``proof_seconds`` is how long the database may take for its part; files may take as long as they need.
        """
        try:
            with anyio.move_on_after(proof_seconds) as proving:
                return await self.save_one(proving)
            raise self.consumer.unreachable(
                f"the database has not proved within {proof_seconds:g} s that it holds what is to be saved, and the checkpoint before stays"
            )
        except SyncdError as error:
            if (
                self.last_error is None
            ):  # and not again each minute, for as long as the disk is full
                self.consumer.registry.alerts.add(
                    "checkpoint_failed",
                    f"a checkpoint failed: {error}",
                    reason=str(error),
                    hint=error.hint,
                )
            self.last_error = str(error)
            self.consumer.registry.counters.checkpoint_failures += 1
            raise

    async def save_one(self, proving: anyio.CancelScope) -> CheckpointDone:
        """``save``, within a time-out that ends when the database has done its part."""
        async with self.lock:
            begun = time.monotonic()
            position, bytes_written = await self.write(proving)
            self.last_seconds = time.monotonic() - begun
            self.consumer.registry.counters.checkpoint_seconds.observe(self.last_seconds)
            self.last_at, self.last_error = datetime.now(UTC), None
            self.consumer.registry.tasks.well("checkpointer")
            logger.debug(
                "checkpoint_saved", seconds=round(self.last_seconds, 3), bytes_written=bytes_written
            )
            return CheckpointDone(position, self.last_seconds, bytes_written)

    async def write(self, proving: anyio.CancelScope) -> tuple[Position, int]:
        """The four steps."""
        connection = await self.consumer.settled_connection(CONNECTION_SECONDS)
        try:
            position, captured, nonce, doubts = await self.capture_and_prove(connection)
        except DatabaseUnreachable:  # the connection was lost unnoticed; the consumer opens another
            connection = await self.consumer.settled_connection(CONNECTION_SECONDS)
            position, captured, nonce, doubts = await self.capture_and_prove(connection)
        proving.deadline = math.inf
        try:
            bytes_written = await to_thread.run_sync(self.write_files, captured, nonce, doubts)
        except OSError as error:
            raise DataDirectoryError(
                f"the checkpoint cannot be written to {self.store.data_dir}: {error.strerror or error}",
                hint="free some space on its disk; the checkpoint before this one stays, and nothing is lost",
            ) from error
        try:
            with anyio.fail_after(self.consumer.patience.seconds):
                await self.note()
        except (DatabaseError, TimeoutError) as error:  # the checkpoint is there all the same
            logger.debug("checkpoint_not_noted", error=str(error))
        return position, bytes_written

    async def note(self) -> None:
        """Tell the database, which frees what no checkpoint needs any more; raises ``DatabaseError``."""
        async with self.control.transaction() as control:
            await control.execute(
                statement("consumer", "note_checkpoint"),
                [self.consumer.settings.consumer, self.consumer.run_id],
            )
            await control.execute(
                statement("consumer", "note_needs"),
                {"consumer": self.consumer.settings.consumer, "kept": self.store.nonces},
            )

    async def capture_and_prove(
        self, connection: psycopg.Connection
    ) -> tuple[Position, list[CapturedSource], Nonce, int]:
        """Steps 1 and 2, and the doubts that are settled in what was taken; raises ``DatabaseError``."""
        consumer = self.consumer
        async with consumer.busy:
            position, doubts = consumer.oldest_position(), consumer.doubts.saved
            captured = [capture(followed) for followed in consumer.sources.values()]
            try:
                with translated_errors():
                    nonce = await consumer.in_thread(
                        write_nonce,
                        connection,
                        consumer.settings.consumer,
                        position,
                        self.store.nonces,
                    )
            except BaseException:
                for each in captured:
                    each.followed.not_confirmed(each.unconfirmed)
                consumer.unsettle(connection)
                raise
            consumer.nonce = nonce
        return position, captured, nonce, doubts

    def write_files(self, captured: list[CapturedSource], nonce: Nonce, doubts: int) -> int:
        """Index files first, then the manifest. Runs in a worker thread while passes go on."""
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
            consumer=self.consumer.settings.consumer,
            incarnation=self.consumer.incarnation,
            nonce=nonce.value,
            nonce_xid=nonce.xid,
            fingerprint_probe=self.consumer.fingerprint_probe,
            saved_at=datetime.now(UTC).isoformat(),
            sources=sources,
            doubts=doubts,
        )
        bytes_written += self.store.save(manifest)
        registry = self.consumer.registry
        left, registry.left = registry.left, []
        registry.left += self.store.remove_left(left)
        return bytes_written


def capture(followed: FollowedSource) -> CapturedSource:
    """A source's state, to be saved while passes go on: views never change, the rest is copied."""
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
        retired=list(followed.emptied.names),
        compared_at="" if followed.compared_at is None else followed.compared_at.isoformat(),
        window=None
        if cursor.window is None
        else SavedWindow(str(cursor.window.end), cursor.window.after),
    )
    indexes = [(dataset, dataset.index.capture()) for dataset in followed.datasets.values()]
    return CapturedSource(followed, saved, indexes, followed.begin_confirming())


def with_datasets(saved: SavedSource, datasets: list[SavedDataset]) -> SavedSource:
    """The same source with its datasets' files."""
    return SavedSource(
        **{**{name: getattr(saved, name) for name in saved.__struct_fields__}, "datasets": datasets}
    )
