"""State of a dataset, derived from facts: nothing assigns it.

Invariant: a dataset answers only if it has caught up since it was last to be read again, and if its
source has not failed since.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from syncd.errors import Trouble
from syncd.types import State

ANSWERING: frozenset[State] = frozenset({"ready", "rebuilding"})
MUST_REBUILD_REASON = "it is compared with its table"


@dataclass(slots=True)
class Standing:
    """How far a dataset has come since it was last to be read again."""

    caught_up: bool = False
    began_empty: bool = True
    """Whether it had no rows when the reading began."""
    failed: Trouble | None = None
    """Why the source failed, if it did and the dataset has not caught up since."""

    @property
    def answers(self) -> bool:
        """Whether a search may be answered."""
        return self.caught_up and self.failed is None

    def begin(self, *, empty: bool) -> None:
        """The dataset is to be read again."""
        self.caught_up, self.began_empty, self.failed = False, empty, None

    def fail(self, trouble: Trouble) -> None:
        """Its source cannot be read."""
        self.failed, self.caught_up = trouble, False

    def catch_up(self) -> None:
        """Everything that a pass saw is applied."""
        self.caught_up, self.failed = True, None


class Facts(NamedTuple):
    """Everything that the state of a dataset follows from."""

    failed: Trouble | None = None
    """Why its source failed, if it did and the dataset has not caught up since."""
    caught_up: bool = True
    """Whether it has answered since it was last to be read again."""
    must_rebuild: bool = False
    """Whether the outbox no longer holds the changes that it needs."""
    began_empty: bool = False
    """Whether it had no rows when the reading began."""
    replaced: bool = False
    """Whether its table was attached again, and the new source is still being read."""
    rebuilt: bool = False
    """Whether another index is being built alongside the one that answers."""
    weakness: Trouble | None = None
    """Why the triggers do not record every write; None if they do."""
    doubt: str = ""
    """Why it is compared with its table, unless it is believed to be right."""


class Condition(NamedTuple):
    """A state, its reason, and the command that ends it; both may be empty."""

    state: State
    reason: str = ""
    fix: str = ""

    @classmethod
    def of(cls, state: State, trouble: Trouble) -> Condition:
        """A state with a trouble as its reason."""
        return cls(state, str(trouble), trouble.fix)


def state_of(facts: Facts) -> Condition:
    """The state that follows from the facts: the first that applies."""
    if facts.failed is not None:
        return Condition.of("failed", facts.failed)
    if not facts.caught_up:
        if facts.must_rebuild:
            return Condition("must_rebuild", MUST_REBUILD_REASON)
        return Condition("backfilling" if facts.began_empty else "catching_up")
    if facts.weakness is not None:
        return Condition.of("rebuilding", facts.weakness)
    if facts.replaced or facts.rebuilt or facts.doubt:
        return Condition("rebuilding", facts.doubt)
    return Condition("ready")
