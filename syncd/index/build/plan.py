"""What should be built for a dataset now, and building it: from a view, beside readers and the
writer, in any one thread.

A build reads nothing but its view, whose rows and live bits never change, and gives new codes;
whether they are still wanted is decided when they are swapped in. Memory is bounded: rows are read
in blocks, and training rows have a limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from syncd.index.build.joining import joined
from syncd.index.build.measuring import calibrate
from syncd.index.build.training import train
from syncd.index.codes.calibration import KS, Calibration
from syncd.index.codes.codes import Codebook, Codes, Part, empty_part, list_sizes, without_quantizer
from syncd.index.rows.vectors import StoredVectors
from syncd.index.search.exact import use_one_thread
from syncd.index.storage.bitmap import Bitmap
from syncd.index.storage.stopping import Cancelled, Stop
from syncd.index.view import View

EXACT_ELEMENTS = 3_000_000
EXACT_ROWS = (5_000, 20_000)
"""Up to so many elements, and so many rows at least and at most, a dataset is searched exactly: 0.4
to 0.6 ms.
"""

TAIL_ELEMENTS = 1 << 20
TAIL_ROWS = 2048
"""So many elements, and at least so many rows, may wait in the tail: 0.1 to 0.25 ms a search."""

MOST_PARTS = 5
"""A search of five costs twice one of one."""
TIER_FACTOR = 4
"""Parts shrink by more than this from one to the next, or are merged."""
MOST_DEAD = 0.2
"""The share of a part's rows that may be dead before it is built again."""
RETRAIN_GROWTH = 4.0
RETRAIN_UNEVENNESS = 2.0
"""How many times as uneven as they were the lists may become."""
MEASURE_AGAIN = 0.25
"""The share of rows that may come or go before recall is measured again, or a codebook out of whose
reach the recall is, is made anew.
"""
LEAST_DEAD_SLOTS = 4096
MOST_DEAD_SLOTS = 0.5
"""More dead slots than this, and a larger share of all than this, are given back."""
BLOCK_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Plan:
    """One thing to build.

    ``train``: everything anew, and recall in haste. ``extend``: the tail's rows below ``stop`` are
    encoded, and become one part with the parts ``first <= part < last`` before them. ``purge``: the
    part ``first`` without its dead rows. ``measure``: only the recall. ``drop``: nothing is worth
    codes any more. ``compact``: the live rows without the dead slots.
    """

    kind: Literal["train", "extend", "purge", "measure", "drop", "compact"]
    first: int = 0
    last: int = 0
    stop: int = 0


def exact_rows(dim: int) -> int:
    """Up to how many rows a dataset is searched exactly."""
    return min(max(EXACT_ELEMENTS // dim, EXACT_ROWS[0]), EXACT_ROWS[1])


def tail_rows(dim: int) -> int:
    """How many slots may wait in the tail."""
    return max(TAIL_ELEMENTS // dim, TAIL_ROWS)


def wants_codes(view: View) -> bool:
    """Whether a dataset without codes is too large for that."""
    return view.live.count > exact_rows(view.dim or 1)


def plan_build(view: View, recall: float) -> Plan | None:
    """What to build for ``view``, whose searches want ``recall``; None when all is well."""
    rows, dim = view.live.count, view.dim or 1
    if view.count - rows > max(LEAST_DEAD_SLOTS, MOST_DEAD_SLOTS * view.count):
        return Plan("compact")
    if view.codes is None:
        return Plan("train") if wants_codes(view) else None
    codes = view.codes.codes
    if rows < exact_rows(dim) // 4:
        return Plan("drop")
    if rows >= RETRAIN_GROWTH * codes.codebook.trained_rows or (
        codes.unevenness > RETRAIN_UNEVENNESS * codes.unevenness_trained
    ):
        return Plan("train")
    if view.count - codes.stop >= tail_rows(dim):
        return _extended(view, codes)
    for number, part in enumerate(codes.parts):
        alive = live_between(view.live.bits, part.start, part.stop)
        if part.rows - alive > MOST_DEAD * part.rows:
            return Plan("purge", number, number + 1)
    measured = codes.calibration
    if not measured.whole:
        return Plan("measure")
    came, went = view.count - measured.slots, measured.rows + view.count - measured.slots - rows
    if max(came, went) > MEASURE_AGAIN * measured.rows:
        return Plan("measure")
    return Plan("train") if _worn_out(view, codes, recall) else None


def build(
    view: View,
    plan: Plan,
    generation: int,
    next_number: Callable[[], int],
    stop: Stop = lambda: False,
) -> Codes | None:
    """What ``plan`` says, made from ``view``; None for ``drop``, and never for ``compact``.
    ``next_number`` names files.

    Raises ``Cancelled`` soon after ``stop`` says so.
    """
    use_one_thread()
    if plan.kind == "drop":
        return None
    if plan.kind == "train" or view.codes is None:
        number = next_number()
        codebook = train(view, number, number, stop)
        part = encode(view, codebook, 0, view.count & ~7, next_number(), stop)
        codes = Codes(generation, codebook, (part,), Calibration(0, 0, ()))
        codes = replace(codes, unevenness_trained=codes.unevenness)
        return replace(codes, calibration=calibrate(view, codes, number, stop, in_haste=True))
    codes = view.codes.codes
    if plan.kind == "measure":
        return replace(codes, calibration=calibrate(view, codes, view.count, stop))
    number, parts = next_number(), codes.parts[plan.first : plan.last]
    if plan.kind == "extend":
        parts = (*parts, encode(view, codes.codebook, codes.stop, plan.stop, number, stop))
    part = joined(codes.codebook, parts, view.live.bits, number, stop)
    return replace(codes, parts=(*codes.parts[: plan.first], part, *codes.parts[plan.last :]))


def encode(
    view: View, codebook: Codebook, start: int, stop: int, number: int, cancelled: Stop
) -> Part:
    """The part of the rows that live in ``start <= slot < stop``, both multiples of eight."""
    index = empty_part(codebook)
    rows = 0
    for first in range(start, stop, BLOCK_ROWS):
        if cancelled():
            raise Cancelled
        last = min(first + BLOCK_ROWS, stop)
        alive = np.unpackbits(view.live.bits[first >> 3 : last >> 3], bitorder="little").view(
            np.bool_
        )
        slots = np.flatnonzero(alive) + first
        if not slots.size:
            continue
        norms = None if view.norms is None else view.norms.read(first, last)
        stored = StoredVectors(view.vectors.read(first, last), norms)
        if slots.size < last - first:
            stored = stored.select(alive)
        index.add_with_ids(codebook.encodable(view.format.as_compared(stored)), slots)
        rows += slots.size
    return Part(number, start, stop, rows, list_sizes(index), without_quantizer(codebook, index))


def live_between(live: Bitmap, start: int, stop: int) -> int:
    """How many slots in ``start <= slot < stop``, both multiples of eight, are live."""
    return int(np.bitwise_count(live[start >> 3 : stop >> 3]).sum(dtype=np.int64))


def _extended(view: View, codes: Codes) -> Plan:
    """The tail becomes a part, together with the last parts where they are not larger by far."""
    stop = view.count & ~7
    first = len(codes.parts)
    rows = live_between(view.live.bits, codes.stop, stop)
    while first and (codes.parts[first - 1].rows <= TIER_FACTOR * rows or first + 1 > MOST_PARTS):
        first -= 1
        rows += codes.parts[first].rows
    return Plan("extend", first, len(codes.parts), stop)


def _worn_out(view: View, codes: Codes, recall: float) -> bool:
    """Whether the codebook has aged: what is wanted is out of its reach, and there are rows that it
    does not know.
    """
    new = view.count - codes.codebook.trained_slots
    return (
        new > MEASURE_AGAIN * codes.codebook.trained_rows
        and codes.calibration.choose(KS[0], recall) is None
    )
