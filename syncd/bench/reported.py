"""The recall that syncd reports, compared with the recall that is measured.

syncd chooses its settings by a sample of the queries that were asked. So half of the queries are
held back until it has chosen: the measured recall is that of queries that syncd did not know.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from syncd.bench.clients import Clients
from syncd.bench.environment import LOOK_SECONDS
from syncd.bench.vector_set import Truth
from syncd.bench.versus import FOLLOWED, Pair, Recalls
from syncd.index.asked import ENOUGH
from syncd.protocol.status_messages import DatasetStatus
from syncd.types import RecallOf

FIRST = ENOUGH - 1
"""Number of queries that can be asked before syncd measures recall on them."""
KNOWN_SECONDS = 120.0
"""How long syncd may take to measure recall on the queries."""


@dataclass(frozen=True, slots=True)
class Reported:
    """One recall target, when ``asked`` different queries had been asked.

    ``recall`` and ``recall_p5`` are measured here, on ``queries`` others. ``reported`` and
    ``reported_p5`` are what syncd says, by one of two RPC methods. ``datasets`` says it for
    ``SYNCD_RECALL``, as it was measured when the settings were chosen. ``recall`` measures for
    this answer, for some targets. ``recall_of`` says on which queries.
    """

    asked: int
    target: float
    queries: int
    recall: float
    recall_p5: float
    by: Literal["datasets", "recall"] | None
    """None: syncd says nothing of this target."""
    recall_of: RecallOf | None
    reported: float | None
    reported_p5: float | None


Said = tuple[Literal["datasets", "recall"] | None, RecallOf | None, float | None, float | None]


def halves(both: Pair, queries: int) -> tuple[slice, slice]:
    """The queries to ask first, and those to measure: every second one, if there are enough.

    If there are not, or if every search is exact, both are all queries.
    """
    if both.approximate and queries >= 2 * ENOUGH:
        return slice(0, None, 2), slice(1, None, 2)
    return slice(None), slice(None)


def report(
    both: Pair, searchers: Clients, exact: Truth, recalls: Sequence[float]
) -> tuple[Recalls, list[Reported]]:
    """Compare before any query was asked, and after; returns the recall of the queries after it.

    The first measurement asks fewer queries than syncd needs to measure recall on them.
    """
    first, held_back = halves(both, len(searchers.queries))
    asked = searchers.queries[first]
    after = Recalls(searchers.asking(searchers.queries[held_back]), exact)
    if not both.approximate:
        return after, []
    with both.where.step("syncd: recall before any query was asked"):
        both.service.settle()
        before = Recalls(searchers.asking(asked[:FIRST]), exact)
        found = compared(both, before, recalls, asked=0)
    with both.where.step("syncd: recall of the queries"):
        have_measured(both, searchers.asking(asked[FIRST:]), recalls)
        found += compared(both, after, recalls, asked=len(asked))
    return after, found


def have_measured(both: Pair, searchers: Clients, recalls: Sequence[float]) -> None:
    """Ask the queries for each target, and return when syncd has chosen its settings for them."""
    for target in recalls:
        searchers.answers(both.syncd(target))
    queries_known(both)


def queries_known(both: Pair) -> None:
    """Return when syncd has chosen its settings for the queries that were asked.

    Reader processes report what they were asked each second, and the builder works at the lowest
    priority. The wait ends after ``KNOWN_SECONDS``: too few of the queries may differ.
    """
    end = time.monotonic() + KNOWN_SECONDS
    while status_of(both).recall_of != "queries" and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)
    both.service.settle()


def compared(
    both: Pair, measured: Recalls, recalls: Sequence[float], *, asked: int
) -> list[Reported]:
    """What syncd reports now, next to the recall that is then measured.

    In this order: a measurement asks queries, which then belong to syncd's sample.
    """
    status = status_of(both)
    with both.service.client() as client:
        reached = client.recall(FOLLOWED)
    found = []
    for target in recalls:
        one = measured.measured(both.syncd(target))
        said: list[Said] = []
        if target == both.where.recall:
            said.append(("datasets", status.recall_of, status.recall, status.recall_p5))
        said += [
            ("recall", reached.of, each.mean, each.p5)
            for each in reached.targets
            if each.target == target
        ]
        found += [
            Reported(
                asked,
                target,
                one.queries,
                one.mean,
                one.p5,
                by,
                recall_of,
                None if mean is None else round(mean, 4),
                None if p5 is None else round(p5, 2),
            )
            for by, recall_of, mean, p5 in said or [(None, None, None, None)]
        ]
    return found


def status_of(both: Pair) -> DatasetStatus:
    """syncd's status of the dataset."""
    with both.service.client() as client:
        (found,) = (row for row in client.datasets() if row.dataset == f"default/{FOLLOWED}")
    return found
