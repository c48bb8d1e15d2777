"""What somebody should be told of without having looked: kept here, from any thread, until ``syncd.ops`` tells it. Never more than a few."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

ALERTS_KEPT = 100
NAMED = 20
"""Datasets or sources that an alert names; of the others it says how many there are."""

Event = Literal["drift", "checkpoint_failed", "must_rebuild"]


@dataclass(frozen=True, slots=True)
class Alert:
    """``text`` is the sentence for people, ``facts`` the same for programs. No keys, no vectors: it leaves for other systems."""

    event: Event
    text: str
    facts: Mapping[str, object]
    at: datetime = field(default_factory=lambda: datetime.now(UTC))


class Alerts:
    """Those that wait to be told, the oldest first; past the bound the oldest go."""

    def __init__(self) -> None:
        self.waiting: deque[Alert] = deque(maxlen=ALERTS_KEPT)

    def add(self, event: Event, text: str, **facts: object) -> None:
        """Have it told soon."""
        self.waiting.append(Alert(event, text, facts))


def named(names: list[str]) -> str:
    """The first ones, and how many there are beyond."""
    left = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {left} more" if left > 0 else "")
