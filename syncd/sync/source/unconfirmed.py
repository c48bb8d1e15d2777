"""Changes that were applied and may be lost in a crash of the server.

They were applied since the last nonce that the server has confirmed to be durable.
"""

from __future__ import annotations

from collections.abc import Iterable

from syncd.postgres.outbox import Cursor
from syncd.types import Key

MAX_UNCONFIRMED_KEYS = 200_000
"""Above this many keys, the whole source is read again instead."""


class Unconfirmed:
    """Keys of one source that were applied since the last confirmed position."""

    def __init__(self, confirmed: Cursor) -> None:
        self.confirmed = confirmed
        self.keys: set[Key] = set()
        self.everything = False
        """Whether all rows must be read again: too many keys to list, or a whole table."""

    def note(self, keys: Iterable[Key]) -> None:
        """Remember keys of changes until a nonce confirms the commits that changed them."""
        if not self.everything:
            self.keys.update(keys)
            if len(self.keys) > MAX_UNCONFIRMED_KEYS:
                self.everything = True
                self.keys.clear()
