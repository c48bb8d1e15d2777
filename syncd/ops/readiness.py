"""Readiness of this syncd, with reasons: the answer of ``/readyz``.

syncd is not ready in four cases: some dataset has not answered yet since the start; no dataset
answers; syncd is stopping; the answers are older than the user allows. An unreachable database
alone does not make it unready: syncd answers from its last position, and says so. Neither does
a table that is attached later, nor one failed dataset among others: without the service in the
rotation the other datasets would not answer either.
"""

from __future__ import annotations

from dataclasses import dataclass

from syncd.ops.parts import Parts
from syncd.sync.registry.states import ANSWERING

SHOWN = 20


@dataclass(frozen=True, slots=True)
class Verdict:
    """Readiness: ``reasons`` make the service unready, ``remarks`` are other problems."""

    ready: bool
    reasons: list[str]
    remarks: list[str]
    stale_seconds: float


class Readiness:
    """Computes the verdict; remembers whether every dataset has answered once."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.was_ready = False
        self.stopping = False

    @property
    def stale_seconds(self) -> float:
        """Age of the answers, at most: from changes that wait, or from a heartbeat that is late."""
        return max(self.parts.consumer.lag_seconds, self.parts.reporter.heartbeat.late_seconds)

    def look(self) -> Verdict:
        """The verdict now."""
        consumer, settings = self.parts.consumer, self.parts.settings
        datasets = consumer.registry.listed()
        silent = [
            f"{each.name} is {each.state}{f': {each.reason}' if each.reason else ''}"
            for each in datasets
            if each.state not in ANSWERING
        ]
        pending = [f"{source}: {reason}" for source, reason in consumer.registry.pending.items()]
        amiss = [*silent, *(each for each in pending if not silent)]
        if not consumer.ready.is_set() and not amiss:
            amiss = ["syncd is starting"]
        self.was_ready |= not amiss
        stale, reasons, remarks = self.stale_seconds, [], []
        if self.stopping:
            reasons.append("syncd is stopping")
        if not self.was_ready or (datasets and len(silent) == len(datasets)):
            reasons += some(amiss)
        else:
            remarks += some(amiss)
        if not consumer.connected and consumer.passes_done:
            remarks.append(f"{consumer.unreachable().message}; answers are as of {stale:.0f} s ago")
        elif stale > 0 and consumer.passes_done:
            remarks.append(f"answers may be {stale:.1f} s behind the tables")
        failing = consumer.registry.tasks.listed()
        remarks += [
            f"background task {each.task} fails and is tried again: {each.error}"
            for each in failing
        ]
        late = self.parts.verifier.overdue
        if late.reason and late.at is not None:
            remarks.append(
                f"the last whole verify was at {late.at:%Y-%m-%d %H:%M} UTC, and the next is late: "
                f"{late.reason}"
            )
        allowed = settings.max_staleness_seconds
        if allowed is not None and stale > allowed:
            reasons.append(
                f"answers may be {stale:.1f} s behind, more than "
                f"SYNCD_MAX_STALENESS_SECONDS={allowed:g} allows"
            )
        return Verdict(not reasons, reasons, remarks, stale)


def some(texts: list[str]) -> list[str]:
    """The first texts, and the number of the others."""
    left = len(texts) - SHOWN
    return [*texts[:SHOWN], f"and {left} more: see syncd datasets"] if left > 0 else texts
