"""A map from 64-bit hashes to numbers, for millions of keys: 16 bytes per entry, no Python object.

It is an append-only multimap, similar to a log-structured merge tree: a small unsorted buffer, and
immutable sorted runs that are merged in geometric tiers. One thread adds.

Invariant: a ``HashMultimapView`` never changes. Runs are never changed, a buffer is only appended
to, and a full buffer is replaced.

Nothing is removed. Two keys may share a hash, and a key may have had several numbers, so the caller
of ``find`` compares keys. A merge may leave out entries that no newer view needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Values = NDArray[np.int64]
Run = tuple[Hashes, Values]
Keep = Callable[[Values], NDArray[np.bool_]]
Place = Callable[[NDArray[Any]], NDArray[Any]]
"""Returns an array with the same content, in other memory."""

BUFFER_ENTRIES = 4096
"""Most entries in the buffer: scanning a full buffer for one key costs 3 µs."""

TIER_FACTOR = 4
"""Factor between runs: each run is larger than the next one times this.

A million entries lie in at most five runs.
"""

_FEW_QUERIES = 8


@dataclass(frozen=True, slots=True)
class HashMultimapView:
    """The entries at one moment: ``runs`` of (hashes ascending, values), and a buffer.

    Only the first ``buffered`` entries of the buffer count.
    """

    runs: tuple[Run, ...]
    buffer: Run
    buffered: int

    def find(self, hashes: Hashes) -> tuple[NDArray[np.int64], Values]:
        """Every entry with one of ``hashes``: pairs (index into ``hashes``, value) in any order."""
        if hashes.size == 1:
            return self._find_one(hashes)
        order = hashes.argsort()
        ascending = hashes[order]  # each search then begins near the previous one, in the cache
        found = [_find_sorted(run, ascending) for run in self.runs]
        if self.buffered:
            found.append(self._find_buffered(ascending))
        hits = [(order[queries], values) for queries, values in found if queries.size]
        if not hits:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        if len(hits) == 1:
            return hits[0]
        queries, values = (np.concatenate(each) for each in zip(*hits, strict=True))
        return queries, values

    def from_hash(self, start: int, at_least: int) -> tuple[Hashes, Values, int | None]:
        """The entries with the lowest hashes >= ``start``, ascending: ``at_least`` of them, or all.

        Entries that share a hash stay together. The third value is the next ``start``, or None
        after the last entry.
        """
        first = np.uint64(start)
        buffer_hashes, buffer_values = (
            self.buffer[0][: self.buffered],
            self.buffer[1][: self.buffered],
        )
        chosen = buffer_hashes >= first
        rest = [_sorted_run(buffer_hashes[chosen], buffer_values[chosen])]
        for hashes, values in self.runs:
            position = int(np.searchsorted(hashes, first))
            rest.append((hashes[position:], values[position:]))
        # The smallest of the runs' at_least-th hashes is enough: that run alone has enough entries
        # below it.
        bounds = [hashes[at_least - 1] for hashes, _ in rest if hashes.size >= at_least]
        bound = min(bounds) if bounds else None
        if bound is not None:
            ends = [int(np.searchsorted(hashes, bound, side="right")) for hashes, _ in rest]
            rest = [
                (hashes[:end], values[:end])
                for (hashes, values), end in zip(rest, ends, strict=True)
            ]
        hashes, values = _sorted_run(
            np.concatenate([r[0] for r in rest]), np.concatenate([r[1] for r in rest])
        )
        go_on = None if bound is None or int(bound) == 2**64 - 1 else int(bound) + 1
        return hashes, values, go_on

    @property
    def entries(self) -> int:
        """Number of entries."""
        return self.buffered + sum(hashes.size for hashes, _ in self.runs)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the entries."""
        return sum(hashes.nbytes + values.nbytes for hashes, values in (*self.runs, self.buffer))

    def _find_one(self, hashes: Hashes) -> tuple[NDArray[np.int64], Values]:
        found: list[int] = []
        wanted = hashes[0]
        for run_hashes, run_values in self.runs:
            position = int(run_hashes.searchsorted(wanted))
            while position < run_hashes.size and run_hashes[position] == wanted:
                found.append(int(run_values[position]))
                position += 1
        if self.buffered:
            (positions,) = (self.buffer[0][: self.buffered] == wanted).nonzero()
            found.extend(self.buffer[1][positions].tolist())
        return np.zeros(len(found), dtype=np.int64), np.array(found, dtype=np.int64)

    def _find_buffered(self, hashes: Hashes) -> tuple[NDArray[np.int64], Values]:
        buffer_hashes, buffer_values = (
            self.buffer[0][: self.buffered],
            self.buffer[1][: self.buffered],
        )
        if hashes.size > _FEW_QUERIES:  # more queries than this repay sorting the buffer
            return _find_sorted(_sorted_run(buffer_hashes, buffer_values), hashes)
        queries, positions = (hashes[:, None] == buffer_hashes).nonzero()
        return queries, buffer_values[positions]


class HashMultimap:
    """The multimap as its one writer sees it; ``view`` is for readers."""

    def __init__(self, buffer: int = BUFFER_ENTRIES) -> None:
        self._buffer_entries = buffer
        self.view = HashMultimapView((), _new_buffer(0), 0)
        self._place: Place = _where_it_is

    def move(self, place: Place) -> None:
        """Keep all runs where ``place`` puts them, from now on. The writer calls it."""
        self._place = place
        runs = tuple((place(hashes), place(values)) for hashes, values in self.view.runs)
        self.view = HashMultimapView(runs, self.view.buffer, self.view.buffered)

    def add(self, hashes: Hashes, values: Values, keep: Keep | None = None) -> None:
        """Add entries: in the buffer if it has room, which older views do not see; else as a sorted
        run.

        ``keep`` tells which values are still needed; a merge leaves the others out for newer views.
        Raises only ``MemoryError``, and then changes nothing.
        """
        view = self.view
        stop = view.buffered + hashes.size
        if stop <= self._buffer_entries:
            buffer = _grown(view.buffer, view.buffered, stop, self._buffer_entries)
            buffer[0][view.buffered : stop], buffer[1][view.buffered : stop] = hashes, values
            self.view = HashMultimapView(view.runs, buffer, stop)
            return
        runs = list(view.runs)
        run = _sorted_run(
            np.concatenate((view.buffer[0][: view.buffered], hashes)),
            np.concatenate((view.buffer[1][: view.buffered], values)),
        )
        run = _kept(run, keep)
        while runs and runs[-1][0].size <= TIER_FACTOR * run[0].size:
            run = _merged(_kept(runs.pop(), keep), run)
        if run[0].size:
            runs.append((self._place(run[0]), self._place(run[1])))
        self.view = HashMultimapView(tuple(runs), _new_buffer(0), 0)


def _where_it_is(array: NDArray[Any]) -> NDArray[Any]:
    return array


def _kept(run: Run, keep: Keep | None) -> Run:
    if keep is None or not run[0].size:
        return run
    kept = keep(run[1])
    return run if kept.all() else (run[0][kept], run[1][kept])


def _new_buffer(entries: int) -> Run:
    return np.empty(entries, dtype=np.uint64), np.empty(entries, dtype=np.int64)


def _grown(buffer: Run, used: int, needed: int, most: int) -> Run:
    """``buffer`` or a larger copy. It grows step by step, so ten rows do not cost a buffer of
    thousands.
    """
    if needed <= buffer[0].size:
        return buffer
    larger = _new_buffer(min(most, max(needed, 2 * buffer[0].size, 16)))
    larger[0][:used], larger[1][:used] = buffer[0][:used], buffer[1][:used]
    return larger


def _sorted_run(hashes: Hashes, values: Values) -> Run:
    order = np.argsort(hashes)  # a million: 20 ms, a stable sort takes 90 ms
    return hashes[order], values[order]


def _merged(larger: Run, smaller: Run) -> Run:
    """Both runs merged into one, in linear time.

    Placing 4,096 entries among a million costs 1 ms; sorting all of them costs 70 ms.
    """
    size = larger[0].size + smaller[0].size
    places = np.searchsorted(larger[0], smaller[0]) + np.arange(smaller[0].size)
    others = np.ones(size, dtype=np.bool_)
    others[places] = False
    hashes, values = np.empty(size, dtype=np.uint64), np.empty(size, dtype=np.int64)
    hashes[places], values[places] = smaller
    hashes[others], values[others] = larger
    return hashes, values


def _find_sorted(run: Run, hashes: Hashes) -> tuple[NDArray[np.int64], Values]:
    first = run[0].searchsorted(hashes)
    # Most hashes have one entry or none, so compare first and search for the end only after a hit.
    inside = np.minimum(first, run[0].size - 1)
    (hit,) = (run[0][inside] == hashes).nonzero()
    if not hit.size:
        return hit, hit
    start = first[hit]
    following = np.minimum(start + 1, run[0].size - 1)
    alone = (run[0][following] != hashes[hit]) | (following == start)
    if alone.all():  # the usual case, without another search in a large run
        return hit, run[1][start]
    last = run[0].searchsorted(hashes[hit], side="right")
    lengths = last - start
    offsets = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return np.repeat(hit, lengths), run[1][np.repeat(start, lengths) + offsets]
