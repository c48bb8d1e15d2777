"""The main process's side of shared datasets: it shares those that readers ask for.

Views are published by each index itself, as soon as they are there. This module publishes which
index answers for a name, and then each source's position. Invariant: a position is published after
the views and names that it stands for; and before a request that waits for it is answered.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog
from numpy.typing import NDArray

from syncd.index.dataset import DatasetIndex
from syncd.index.shared.exporting import Exporter
from syncd.index.storage.arena import Arena
from syncd.postgres.source import Source
from syncd.readers.records import SERVICE_WORD, Entry, ServiceRecord, SourceRecord
from syncd.sync.consumer.progress import Progress
from syncd.sync.registry.datasets import Dataset, Follower
from syncd.types import DatasetName

logger = structlog.get_logger()


class Word:
    """A word of the arena with the record that it leads to."""

    def __init__(self, arena: Arena, number: int) -> None:
        self.number = number
        self._arena = arena
        self._record: object = None
        self._block: NDArray[Any] | None = None

    def show(self, record: msgspec.Struct | None) -> None:
        """Let the word lead to a record, or nowhere."""
        if record != self._record:
            block = None if record is None else self._arena.put_bytes(msgspec.json.encode(record))
            self._arena.point(self.number, block)
            self._record, self._block = record, block


@dataclass(slots=True)
class Shared:
    """A dataset that is shared."""

    dataset: Dataset
    index: DatasetIndex
    exporter: Exporter
    entry: Word
    shown: tuple[Follower, Source, bool] | None = None
    """What the entry was made of, and whether the dataset answered; None: make it again."""

    def is_shown(self) -> bool:
        """Whether the entry is up to date. Most are, so a pass over many datasets is quick."""
        dataset, shown = self.dataset, self.shown
        return (
            shown is not None
            and shown[0] is dataset.follower
            and shown[1] is dataset.source
            and shown[2] == dataset.standing.answers
        )


@dataclass(slots=True)
class SharedSource:
    """A source of shared datasets."""

    follower: Follower
    word: Word
    uid: int


class Publisher:
    """The shared datasets of a service. Any thread may call it."""

    def __init__(self, arena: Arena, progress: Progress) -> None:
        self.arena = arena
        self.progress = progress
        self.registry = progress.registry
        self._lock = threading.Lock()
        self._sharing = threading.Lock()
        """Held while a dataset is shared, which may take long; publishing does not wait for it."""
        self._shared: dict[DatasetName, Shared] = {}
        self._sources: dict[int, SharedSource] = {}
        self._uids = itertools.count(1)
        self._entries_made = 0
        self.replaced: deque[DatasetName] = deque()
        """Names whose shared index was replaced: the new one is to be shared."""
        service = self._new_word()
        assert service is not None
        assert service.number == SERVICE_WORD
        self._service = service
        progress.publish = self.publish

    def share(self, name: DatasetName) -> int | None:
        """Share a dataset; returns the number of its entry's word, or None if it cannot be shared.

        It takes as long as copying the dataset's key map.
        """
        with self._sharing:
            with self._lock:
                shared, dataset = self._shared.get(name), self.registry.by_name.get(name)
                if shared is not None:
                    return shared.entry.number
                if dataset is None:
                    return None
                entry, word, index = self._new_word(), self.arena.new_word(), dataset.index
            try:
                if entry is None or word is None:
                    raise MemoryError("readers cannot share more datasets")  # noqa: TRY301
                exporter = Exporter(self.arena, word)
                index.share(exporter)
            except MemoryError as error:
                logger.error("not_shared", dataset=name, error=str(error))
                index.withdraw()
                for number in (word, None if entry is None else entry.number):
                    if number is not None:
                        self.arena.free_word(number)
                return None
            with self._lock:
                self._shared[name] = Shared(dataset, index, exporter, entry)
        self.publish()
        return entry.number

    def publish(self) -> None:
        """Publish what has changed: names first, then positions."""
        with self._lock:
            try:
                before = self._entries_made
                for name, shared in list(self._shared.items()):
                    self._publish_entry(name, shared)
                if self._entries_made != before:
                    self._forget_sources()
                for source in list(self._sources.values()):
                    self._publish_source(source)
                progress = self.progress
                self._service.show(
                    ServiceRecord(progress.connected, progress.last_pass_at, progress.hangs_seconds)
                )
            except MemoryError as error:
                logger.error("not_published", error=str(error))
                for shared in self._shared.values():
                    shared.entry.show(None)
                    shared.shown = None

    def _publish_entry(self, name: DatasetName, shared: Shared) -> None:
        dataset = self.registry.by_name.get(name)
        if dataset is shared.dataset and dataset.index is shared.index and shared.is_shown():
            return
        self._entries_made += 1
        exporter = shared.exporter
        if dataset is not shared.dataset or dataset.index is not shared.index:
            shared.entry.show(None)
            shared.index.withdraw()
            self.arena.free_word(exporter.word)
            self.arena.free_word(shared.entry.number)
            del self._shared[name]
            if dataset is not None:
                self.replaced.append(name)
            return
        made_of = dataset.follower, dataset.source, dataset.standing.answers
        if not made_of[2]:
            shared.entry.show(None)
            shared.shown = made_of
            return
        source = self._source_of(made_of[0])
        if source is None:
            return
        shared.entry.show(
            Entry(
                name,
                exporter.word,
                exporter.uid,
                source.word.number,
                source.uid,
                made_of[1].key_kind,
                made_of[1].key_kinds,
            )
        )
        shared.shown = made_of

    def _source_of(self, follower: Follower) -> SharedSource | None:
        source = self._sources.get(id(follower))
        if source is None:
            word = self._new_word()
            if word is None:
                return None
            source = SharedSource(follower, word, next(self._uids))
            self._sources[id(follower)] = source
            self._publish_source(source)
        return source

    def _publish_source(self, source: SharedSource) -> None:
        follower = source.follower
        position = follower.cursor.position
        source.word.show(
            SourceRecord(
                source.uid,
                str(position.snapshot),
                position.outbox_id,
                follower.lags,
                follower.moved_at,
            )
        )

    def _forget_sources(self) -> None:
        used = {id(shared.dataset.follower) for shared in self._shared.values()}
        for key in self._sources.keys() - used:
            source = self._sources.pop(key)
            self.arena.free_word(source.word.number)

    def _new_word(self) -> Word | None:
        number = self.arena.new_word()
        return None if number is None else Word(self.arena, number)
