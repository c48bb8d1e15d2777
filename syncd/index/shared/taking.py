"""A reader's side: it takes up the published views of one index.

Invariant: a view is one publication, whole. A caller is busy in the arena's sense from before it
asks for a view until it no longer reads it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.index.codes.codes import Codes
from syncd.index.codes.files import load_codes
from syncd.index.generation.generation import Generation
from syncd.index.rows.key_map import HashMultimapView, Run
from syncd.index.rows.vectors import VectorFormat
from syncd.index.shared.publication import Publication, PublishedCodes
from syncd.index.storage.arena import ArenaView
from syncd.index.storage.bitmap import Live
from syncd.index.view import View

_publications = msgspec.json.Decoder(Publication)
_published_codes = msgspec.json.Decoder(PublishedCodes)


class TakenIndex:
    """The index with the number ``uid``, whose views a word leads to. Any thread may ask for one.

    ``wanted`` is called when codes are to be loaded by ``load``, in another thread.
    """

    def __init__(
        self, arena: ArenaView, word: int, uid: int, wanted: Callable[[TakenIndex], None]
    ) -> None:
        self.uid = uid
        self._arena = arena
        self._word = word
        self._wanted = wanted
        self._lock = threading.Lock()
        self._seen = -1
        self._view: View | None = None
        self._has_codes = False
        self._generation: Generation | None = None
        self._codes: Codes | None = None
        self._saved: PublishedCodes | None = None
        """The record of ``_codes``."""
        self._number = 0
        """Number of the codes that are loaded, or being loaded."""
        self._to_load: tuple[Publication, PublishedCodes] | None = None

    def view(self) -> View | None:
        """The present view; None if the main process is to be asked."""
        if self._arena.word(self._word) != self._seen:
            with self._lock:
                self._take_up()
        return self._view

    @property
    def is_behind(self) -> bool:
        """Whether there is a newer view than the last one that was taken up."""
        return self._arena.word(self._word) != self._seen

    @property
    def lacks_codes(self) -> bool:
        """Whether the last view has codes that are not loaded yet."""
        return self._has_codes and self._codes is None

    def load(self) -> None:
        """Load the codes that the last view has. This may take seconds, so it has its own thread.

        If they cannot be loaded, the main process answers until other codes replace them.
        """
        with self._lock:
            if self._to_load is None:
                return
            (publication, published), self._to_load = self._to_load, None
            number = self._number
        try:
            codes = load_codes(
                Path(publication.directory),
                published.saved,
                {file.name: file for file in published.files},
                metric=publication.metric,
                dim=publication.dim or 0,
                generation=publication.generation,
            )
        except (DamagedFile, DataDirectoryError):
            return
        with self._lock:
            if number == self._number:  # else there are newer ones, which are loaded next
                self._codes, self._saved, self._seen = codes, published, -1

    def _take_up(self) -> None:
        word = self._arena.word(self._word)
        if word == self._seen:
            return
        content = self._arena.content(word)
        publication = None
        if content is not None:
            # The word may lead to another record since the reader found the dataset.
            with contextlib.suppress(msgspec.DecodeError):
                publication = _publications.decode(content)
        if publication is None or publication.uid != self.uid:
            self._seen, self._view, self._has_codes = word, None, False
            return
        generation = self._generation
        if generation is None or generation.number != publication.generation:
            generation = self._generation = Generation(
                Path(publication.directory),
                publication.generation,
                VectorFormat(publication.metric, publication.half),
                publication.key_kind,
                publication.dim,
                publication.chunk_bytes,
                publication.attached,
            )
            self._codes, self._saved, self._number = None, None, 0
        try:
            generation.take_up(
                [(column.mapped, column.chunks) for column in publication.columns],
                self._key_map(publication),
                self._arena,
            )
        except (DamagedFile, DataDirectoryError, MemoryError):
            # a compaction has removed a file, or the system refuses a mapping
            self._seen, self._view, self._has_codes = -1, None, False
            return
        self._note_codes(publication)
        self._has_codes = publication.has_codes
        self._view = generation.view(publication.count, self._live(publication), self._codes)
        self._seen = word

    def _note_codes(self, publication: Publication) -> None:
        if not publication.has_codes:
            self._codes, self._saved, self._number = None, None, 0
        elif publication.codes is not None and publication.codes[0] != self._number:
            self._number, units = publication.codes
            content = self._arena.content(units)
            assert content is not None
            published = _published_codes.decode(content)
            if (
                self._codes is not None
                and self._saved is not None
                and same_parts(self._saved, published)
            ):
                self._codes = measured_again(self._codes, published)
                self._saved, self._to_load = published, None
            else:
                self._to_load = publication, published
                self._wanted(self)

    def _key_map(self, publication: Publication) -> HashMultimapView:
        runs = tuple(self._run(*run) for run in publication.runs)
        return HashMultimapView(runs, self._run(*publication.buffer), publication.buffer[2])

    def _run(self, hashes: int, values: int, entries: int) -> Run:
        return (
            self._arena.array(hashes, (entries,), np.uint64),
            self._arena.array(values, (entries,), np.int64),
        )

    def _live(self, publication: Publication) -> Live:
        bits, size = publication.bits
        dead, chunks = publication.dead
        return Live(
            self._arena.array(bits, (size,), np.uint8),
            publication.live,
            self._arena.array(dead, (chunks,), np.int64),
        )


def measured_again(codes: Codes, published: PublishedCodes) -> Codes:
    """The same codes with the measurements of another record."""
    saved = published.saved
    return replace(
        codes, calibration=saved.calibration, unevenness_trained=saved.unevenness_trained
    )


def same_parts(one: PublishedCodes, other: PublishedCodes) -> bool:
    """Whether two records name the same files: only the measurements differ."""
    return (one.saved.codebook_name, one.saved.parts) == (
        other.saved.codebook_name,
        other.saved.parts,
    )
