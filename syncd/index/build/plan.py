"""Decides what to build for a dataset now, and builds it from a view, in any one thread.

Readers and the writer go on meanwhile. Invariant: a build reads only its view, whose rows and live
bits never change, and returns new codes. Whether they are still wanted is decided when they are
swapped in. Memory is bounded: rows are read in blocks, and the number of training rows is limited.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np

from syncd.index.asked import AskedQueries, Sample
from syncd.index.build.ahead import Ahead
from syncd.index.build.encoding import Encoder
from syncd.index.build.joining import joined
from syncd.index.build.measuring import calibrate
from syncd.index.build.reached import filtered_limit
from syncd.index.build.training import train, training_rows
from syncd.index.codes.calibration import KS, VERSION, Calibration
from syncd.index.codes.codes import Codebook, Codes, Part
from syncd.index.search.exact import use_one_thread
from syncd.index.storage.bitmap import Bitmap
from syncd.index.storage.stopping import Stop
from syncd.index.view import View

EXACT_ELEMENTS = 3_000_000
EXACT_ROWS = (5_000, 20_000)
"""Below this many elements a dataset is searched exactly: 0.4 to 0.6 ms.

``EXACT_ROWS`` is the least and the most rows for this limit.
"""

TAIL_ELEMENTS = 1 << 20
TAIL_ROWS = 2048
"""Largest tail, in elements, but at least this many rows: 0.1 to 0.25 ms per search."""

WAITING_TAILS = 16
"""Length, in largest tails, from which the codes of a tail do not wait for anything.

Such a tail makes a search 2.8 ms longer (32,768 rows of 768) or 2.0 ms (131,072 of 128).
"""
WAITING_ROWS = 1 << 17
"""The same in rows, for few dimensions: 8,000,000 rows of 2 take a search 18 ms."""

AHEAD_BYTES = 8 << 20
"""Bytes of new rows that are encoded at once while a dataset is being read."""

MOST_PARTS = 5
"""Most parts: a search of five parts costs twice as much as a search of one."""
TIER_FACTOR = 4
"""Factor between parts: unless a part is larger than the next one times this, both are merged."""
MOST_DEAD = 0.2
"""Largest share of dead rows in a part before it is built again."""
RETRAIN_GROWTH = 4.0
RETRAIN_UNEVENNESS = 2.0
"""Largest growth of the lists' unevenness since training, as a factor."""
MEASURE_AGAIN = 0.25
"""Largest share of rows that may come or go before recall is measured again.

If a codebook no longer reaches the recall, this share of new rows makes it trained again.
"""
LEAST_DEAD_SLOTS = 4096
MOST_DEAD_SLOTS = 0.5
"""Number and share of dead slots above which they are given back; both must be exceeded."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One thing to build.

    - ``train``: all codes again, with recall measured quickly.
    - ``extend``: the tail's rows below ``stop``, joined with the parts ``first <= part < last``.
    - ``purge``: the part ``first`` without its dead rows.
    - ``measure``: only the recall.
    - ``drop``: remove the codes, because the dataset is too small now.
    - ``compact``: the live rows without the dead slots.
    - ``ahead``: codes of the present rows, kept for ``train``, while the dataset is being read and
      about ``rows`` rows are expected.
    """

    kind: Literal["train", "extend", "purge", "measure", "drop", "compact", "ahead"]
    first: int = 0
    last: int = 0
    stop: int = 0
    rows: int = 0
    for_queries: bool = False
    """Whether recall is measured because other queries are asked, and not because of the rows."""


def exact_rows(dim: int) -> int:
    """Largest number of rows of a dataset that is searched exactly."""
    return min(max(EXACT_ELEMENTS // dim, EXACT_ROWS[0]), EXACT_ROWS[1])


def tail_rows(dim: int) -> int:
    """Number of slots in the tail at which it is encoded."""
    return max(TAIL_ELEMENTS // dim, TAIL_ROWS)


def ahead_rows(dim: int) -> int:
    """Number of new slots that are encoded while a dataset is being read."""
    return max(AHEAD_BYTES // (4 * dim), TAIL_ROWS)


def wants_codes(view: View) -> bool:
    """Whether a dataset without codes has too many rows for exact search."""
    return view.live.count > exact_rows(view.dim or 1)


def plan_build(view: View, recall: float, asked: AskedQueries | None = None) -> Plan | None:
    """The next thing to build for ``view``, whose searches want ``recall``; None if nothing is
    needed.

    ``asked`` has the queries that were asked of it.
    """
    rows, dim = view.live.count, view.dim or 1
    if view.count - rows > max(LEAST_DEAD_SLOTS, MOST_DEAD_SLOTS * view.count):
        return Plan("compact")
    if view.codes is None:
        return Plan("train") if wants_codes(view) else None
    codes = view.codes.codes
    if rows < exact_rows(dim) // 4:
        return Plan("drop")
    if (
        rows >= RETRAIN_GROWTH * codes.codebook.trained_rows
        or codes.unevenness > RETRAIN_UNEVENNESS * codes.unevenness_trained
        or not codes.codebook.is_current
    ):
        return Plan("train")
    if view.count - codes.stop >= tail_rows(dim):
        return _extended(view, codes)
    for number, part in enumerate(codes.parts):
        alive = live_between(view.live.bits, part.start, part.stop)
        if part.rows - alive > MOST_DEAD * part.rows:
            return Plan("purge", number, number + 1)
    measured = codes.calibration
    if not measured.whole or measured.version != VERSION:
        return Plan("measure")
    came, went = view.count - measured.slots, measured.rows + view.count - measured.slots - rows
    if max(came, went) > MEASURE_AGAIN * measured.rows:
        return Plan("measure")
    if asked is not None and asked.is_due(dim, measured.of):
        return Plan("measure", for_queries=True)
    return Plan("train") if _worn_out(view, codes, recall) else None


def plan_ahead(view: View, ahead: Ahead | None, expected: int) -> Plan | None:
    """What to encode of a dataset that is being read, and will have about ``expected`` rows."""
    if view.codes is not None or view.dim is None or expected <= exact_rows(view.dim):
        return None
    done = 0 if ahead is None else ahead.encoder.stop
    wanted = training_rows(expected, view.dim) if ahead is None else ahead_rows(view.dim)
    if view.live.count < wanted or view.count - done < wanted:
        return None
    return Plan("ahead", rows=expected)


def may_wait(view: View, plan: Plan) -> bool:
    """Whether searches stay fast enough if ``plan`` is built later."""
    coded = 0 if view.codes is None else view.codes.codes.stop
    longest = min(WAITING_TAILS * tail_rows(view.dim or 1), WAITING_ROWS)
    return plan.kind in ("train", "extend") and view.count - coded < longest


def build(
    view: View,
    plan: Plan,
    generation: int,
    next_number: Callable[[], int],
    stop: Stop = lambda: False,
    sample: Sample | None = None,
    ahead: Ahead | None = None,
) -> Codes | None:
    """The codes that ``plan`` describes, built from ``view``; None for ``drop``.

    ``compact`` and ``ahead`` are never passed. ``next_number`` returns numbers for files.
    ``sample`` are queries that were asked, and ``ahead`` the codes that were made of the same rows
    while they were read. Raises ``Cancelled`` soon after ``stop()`` is true.
    """
    use_one_thread()
    if plan.kind == "drop":
        return None
    if plan.kind == "train" or view.codes is None:
        number = next_number()
        if ahead is None:
            ahead = Ahead(generation, Encoder(train(view, number, number, stop)))
        ahead.encoder.encode(view, view.count & ~7, stop)
        part = ahead.encoder.part(next_number())
        codes = Codes(generation, ahead.encoder.codebook, (part,), Calibration(0, 0, ()))
        codes = replace(codes, unevenness_trained=ahead.unevenness or codes.unevenness)
        found = calibrate(view, codes, number, stop, sample=sample, in_haste=True)
        return replace(codes, calibration=found)
    codes = view.codes.codes
    if plan.kind == "measure":
        found = calibrate(view, codes, view.count, stop, sample=sample)
        codes = replace(codes, calibration=found)
        if sample is None:
            return codes
        limit = filtered_limit(view, codes, sample, stop)
        return replace(codes, calibration=msgspec.structs.replace(found, filtered=limit))
    number, parts = next_number(), codes.parts[plan.first : plan.last]
    if plan.kind == "extend":
        parts = (*parts, encode(view, codes.codebook, codes.stop, plan.stop, number, stop))
    part = joined(codes.codebook, parts, view.live.bits, number, stop)
    return replace(codes, parts=(*codes.parts[: plan.first], part, *codes.parts[plan.last :]))


def encode(
    view: View, codebook: Codebook, start: int, stop: int, number: int, cancelled: Stop
) -> Part:
    """The part of the live rows in ``start <= slot < stop``, both multiples of eight."""
    encoder = Encoder(codebook, start)
    encoder.encode(view, stop, cancelled)
    return encoder.part(number)


def live_between(live: Bitmap, start: int, stop: int) -> int:
    """Number of live slots in ``start <= slot < stop``, both multiples of eight."""
    return int(np.bitwise_count(live[start >> 3 : stop >> 3]).sum(dtype=np.int64))


def _extended(view: View, codes: Codes) -> Plan:
    """The plan to encode the tail, joined with the last parts unless they are much larger."""
    stop = view.count & ~7
    first = len(codes.parts)
    rows = live_between(view.live.bits, codes.stop, stop)
    while first and (codes.parts[first - 1].rows <= TIER_FACTOR * rows or first + 1 > MOST_PARTS):
        first -= 1
        rows += codes.parts[first].rows
    return Plan("extend", first, len(codes.parts), stop)


def _worn_out(view: View, codes: Codes, recall: float) -> bool:
    """Whether the codebook no longer reaches the recall and there are many rows that it does not
    know.
    """
    new = view.count - codes.codebook.trained_slots
    return (
        new > MEASURE_AGAIN * codes.codebook.trained_rows
        and codes.calibration.choose(KS[0], recall) is None
    )
