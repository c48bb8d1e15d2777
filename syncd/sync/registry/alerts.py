"""Alerts: events that a user should learn of without looking.

Any thread adds them; they wait here until ``syncd.ops`` sends them. Their number is bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

ALERTS_KEPT = 100
NAMED = 20
"""Largest number of datasets or sources that an alert names; the others are counted."""

Event = Literal["drift", "checkpoint_failed", "must_rebuild", "recall_missed"]


@dataclass(frozen=True, slots=True)
class Alert:
    """One event: ``text`` is a sentence for people, ``facts`` says the same to programs.

    Neither holds keys or vectors, because alerts are sent to other systems.
    """

    event: Event
    text: str
    facts: Mapping[str, object]
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


class Alerts:
    """Alerts that wait to be sent, oldest first; beyond the bound the oldest are dropped."""

    def __init__(self) -> None:
        self.waiting: deque[Alert] = deque(maxlen=ALERTS_KEPT)

    def add(self, event: Event, text: str, **facts: object) -> None:
        """Add an alert."""
        self.waiting.append(Alert(event, text, facts))


def named(names: list[str]) -> str:
    """The first names, and the number of the others."""
    left = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {left} more" if left > 0 else "")
