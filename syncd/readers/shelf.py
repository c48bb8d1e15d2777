"""A reader's datasets: what the main process has published of them.

Invariant: a search is answered from one published view, with a position that was published after
this view's rows or before them, never with one that is ahead of it. What is not published raises
``NotHere``, and the main process answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

import msgspec

from syncd.errors import RequestError
from syncd.index.filter.language import Filter
from syncd.index.rows.vectors import Vectors
from syncd.index.shared.taking import TakenIndex
from syncd.index.storage.arena import ArenaView
from syncd.index.view import View
from syncd.protocol.messages import SearchParams, WirePosition
from syncd.readers.board import FIRST_EPOCH, Board
from syncd.readers.records import SERVICE_WORD, Entry, ServiceRecord, SourceRecord
from syncd.types import DatasetName, Key, KeyKind, full_dataset_name

MOST_NAMES = 100_000
"""Names that are remembered: clients can invent any number."""
TIDIED = 100
"""Views that are taken up at once for datasets that nobody searches now."""
MOST_QUESTIONS = 64
"""Names of which the main process is asked at once whether they can be shared."""
ASK_AGAIN_SECONDS = 1.0
"""Least time between two questions whether a dataset can be shared."""

R = TypeVar("R", bound=msgspec.Struct)


class NotHere(RequestError):
    """The main process is to answer this request."""

    def __init__(self) -> None:
        super().__init__("the main process answers this")


class Record(Generic[R]):
    """A word, and its record as it was last seen."""

    def __init__(self, arena: ArenaView, word: int, kind: type[R]) -> None:
        self._arena = arena
        self.word = word
        self._decoder = msgspec.json.Decoder(kind)
        self._seen: tuple[int, R | None] = (-1, None)

    def look(self) -> R | None:
        """The present record; None if there is none."""
        word = self._arena.word(self.word)
        seen, record = self._seen
        if word != seen:
            content = self._arena.content(word)
            try:
                record = None if content is None else self._decoder.decode(content)
            except msgspec.MsgspecError:  # the word belongs to something else now
                record = None
            self._seen = word, record
        return record


class Busy:
    """Marks this reader as busy while any of its threads may read the arena."""

    def __init__(self, arena: ArenaView, board: Board) -> None:
        self._arena = arena
        self._board = board
        self._number = 0
        self._since: dict[int, int] = {}

    def enter(self) -> int:
        """Begin; returns the ticket for ``leave``. Call it on the event loop's thread."""
        if not self._since:
            self._board.note_busy(FIRST_EPOCH)  # no block is freed while the epoch is read
        self._number += 1
        self._since[self._number] = self._arena.epoch
        self._note()
        return self._number

    def leave(self, ticket: int) -> None:
        """End; the event loop's thread calls it too."""
        del self._since[ticket]
        self._note()

    def _note(self) -> None:
        # a dictionary keeps its order, so the first one is the oldest
        self._board.note_busy(next(iter(self._since.values()), 0))


class ReaderDataset:
    """A dataset, for ``syncd.rpc.reads``."""

    def __init__(self, shelf: Shelf, entry: Entry) -> None:
        self.entry = entry
        self.shelf = shelf
        self.source = shelf.source(entry.source_word)
        self.index = TakenIndex(shelf.arena, entry.index_word, entry.index_uid, shelf.load)

    @property
    def name(self) -> DatasetName:
        """Its full name."""
        return self.entry.name

    @property
    def key_kind(self) -> KeyKind:
        """Kind of its keys."""
        return self.entry.key_kind

    @property
    def key_kinds(self) -> list[KeyKind]:
        """Kinds of the columns of a composite key."""
        return self.entry.key_kinds

    def record(self) -> SourceRecord:
        """Its source. Raises ``NotHere``."""
        record = self.source.look()
        if record is None or record.uid != self.entry.source_uid:
            raise NotHere
        return record

    def look(self) -> tuple[WirePosition, View]:
        """Its position, and then its view. Raises ``NotHere``."""
        record = self.record()
        view = self.index.view()
        if view is None or self.index.lacks_codes:
            raise NotHere
        return WirePosition(record.snapshot, record.outbox_id), view

    def lag_seconds(self) -> float:
        """See ``Status.lag_seconds``."""
        record, service = self.record(), self.shelf.service.look()
        if service is None:
            raise NotHere
        now = time.monotonic()
        if service.is_answered(now) and not record.lags:
            return 0.0
        moved_at = service.last_pass_at
        if record.moved_at is not None:
            moved_at = min(moved_at, record.moved_at)
        return now - moved_at

    def note_queries(
        self, params: SearchParams, queries: Vectors, wanted: Filter | None, own: Key | None
    ) -> None:
        """See ``Searched``: they go to the main process with the next report."""
        del wanted, own
        self.shelf.note_queries(self.name, params, queries)


class Shelf:
    """The datasets by name.

    ``ask`` has the main process share one. ``load`` loads codes in another thread.
    """

    def __init__(
        self,
        arena: ArenaView,
        *,
        ask: Callable[[DatasetName], None],
        load: Callable[[TakenIndex], None],
        note_queries: Callable[[DatasetName, SearchParams, Vectors], None],
    ) -> None:
        self.arena = arena
        self.load = load
        self.note_queries = note_queries
        self.service = Record(arena, SERVICE_WORD, ServiceRecord)
        self._ask = ask
        self._entries: dict[DatasetName, Record[Entry]] = {}
        self._datasets: dict[DatasetName, ReaderDataset] = {}
        self._sources: dict[int, Record[SourceRecord]] = {}
        self._asked_at: dict[DatasetName, float] = {}
        self._asking: set[DatasetName] = set()

    def find(self, name: str) -> ReaderDataset:
        """A dataset that answers. Raises ``NotHere``."""
        full = full_dataset_name(name)
        record = self._entries.get(full)
        entry = None if record is None else record.look()
        if entry is None or entry.name != full:
            self._want(full)
            raise NotHere
        dataset = self._datasets.get(full)
        if dataset is None or dataset.entry is not entry:
            if dataset is not None and dataset.entry == entry:
                dataset.entry = entry
            else:
                dataset = self._datasets[full] = ReaderDataset(self, entry)
        return dataset

    def answered(self, name: DatasetName, word: int | None) -> None:
        """Note the word of a dataset that the main process has shared; None if it has not."""
        self._asking.discard(name)
        if word is not None:
            self._entries[name] = Record(self.arena, word, Entry)

    def source(self, word: int) -> Record[SourceRecord]:
        """The record of a source."""
        return self._sources.setdefault(word, Record(self.arena, word, SourceRecord))

    def tidy(self) -> None:
        """Let go of what the main process has replaced: files and codes of idle datasets.

        The caller is busy. A call costs a dataset that has not changed 0.5 µs.
        """
        changed = 0
        for name, dataset in list(self._datasets.items()):
            if self._entries[name].look() != dataset.entry:
                del self._datasets[name]
            elif dataset.index.is_behind and changed < TIDIED:
                changed += 1
                dataset.index.view()

    def _want(self, name: DatasetName) -> None:
        now = time.monotonic()
        if now < self._asked_at.get(name, 0.0) or len(self._asking) >= MOST_QUESTIONS:
            return
        if len(self._asked_at) >= MOST_NAMES:
            self._asked_at.clear()
        self._asked_at[name] = now + ASK_AGAIN_SECONDS
        self._asking.add(name)
        self._ask(name)
